"""Whenever a stage is killed, the next run ends in the same bytes and repeats no finished work."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import model_hub
import pytest
import runtime_process
from internvl_runtime.artifacts import (
    convert,
    download,
    layout,
    safetensors_file,
    shapes,
    synthesize,
)
from internvl_runtime.model import config
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

RANKS = 2
CI, LONG = 5, 50
TRIES = [pytest.param(n, marks=[] if n < CI else pytest.mark.long) for n in range(LONG)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    recipe = synthesize.Recipe(shapes.TINY, config.Family.INTERNLM2, 9)
    synthesize.write_checkpoint(recipe, folder, tokenizer_model=folder, report=lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def hub(published):
    with model_hub.serve(published) as running:
        yield running


class Stages:
    """The commands of one cache, as processes."""

    def __init__(self, hub, root):
        self.root = root
        source = {"huggingFace": {"repository": "org/model", "endpoint": hub.url}}
        self.source = ["--source", json.dumps(source)]
        self.weights = runtime_process.result_of("resolve", *self.source, cache=root)["weights"]
        self.checkpoint = keys.key_of(
            keys.Kind.CHECKPOINTS,
            keys.checkpoint_inputs(
                weights=self.weights, dtype="float32", quantization="None",
                tensor_parallel_size=RANKS,
            ),
        )  # fmt: skip
        self.commands = {
            keys.Kind.WEIGHTS: ["fetch", "--weights", self.weights, *self.source],
            keys.Kind.CHECKPOINTS: [
                "convert", "--weights", self.weights, "--dtype", "float32",
                "--tensor-parallel-size", str(RANKS),
            ],
        }  # fmt: skip

    def key(self, kind):
        return self.weights if kind is keys.Kind.WEIGHTS else self.checkpoint

    def workspace(self, kind):
        return self.root / "tmp" / f"{kind.value}-{self.key(kind)}"

    def start(self, kind):
        """Start a stage; returns it when it has told of its first work."""
        process = subprocess.Popen(
            [sys.executable, "-m", "internvl_runtime", *self.commands[kind]],
            env={**os.environ, "INTERNVL_RUNTIME_CACHE_ROOT": str(self.root),
                 "INTERNVL_RUNTIME_TERMINATION_LOG": "/nonexistent"},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        process.stdout.readline()
        return process


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in {caches.MANIFEST, caches.MARKER}
    }


@pytest.fixture(scope="module")
def undisturbed(hub, tmp_path_factory):
    """What both stages publish, and how long each works, in seconds."""
    stages = Stages(hub, tmp_path_factory.mktemp("undisturbed"))
    found, lasted = {}, {}
    for kind in stages.commands:
        with stages.start(kind) as process:
            began = time.monotonic()
            process.stdout.read()
        lasted[kind] = time.monotonic() - began
        found[kind] = contents(stages.root / kind.value / stages.key(kind))
    return found, lasted


class Marks:
    """Bytes changed in groups that count as done: who writes such a group again is found out."""

    def __init__(self, stages, published):
        self.workspace = stages.workspace(keys.Kind.CHECKPOINTS)
        model = config.read_model_config(published)
        self.places = {
            group.name: (
                files.files[0],
                safetensors_file.place(files.infos(layout.Encoding("F32")))[first].offset,
            )
            for files in layout.layouts(model, RANKS)
            for group in files.groups
            for first in [group.tensors[0].name]
        }
        self.made = set()

    def add(self):
        journal = self.workspace / convert._JOURNAL
        done = journal.read_text().split("\n")[:-1] if journal.exists() else []
        for group in done:
            if self.places[group] not in self.made:
                name, offset = self.places[group]
                path = self.workspace / name
                path.write_bytes(self.flip(path.read_bytes(), offset))
                self.made.add(self.places[group])

    def undo(self, found):
        for name, offset in self.made:
            found[name] = self.flip(found[name], offset)

    @staticmethod
    def flip(content, offset):
        return content[:offset] + bytes([content[offset] ^ 255]) + content[offset + 1 :]


def kill(stages, kind, after):
    process = stages.start(kind)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()


def finish(stages, kind):
    with stages.start(kind) as process:
        process.stdout.read()
    assert process.returncode == 0
    return contents(stages.root / kind.value / stages.key(kind))


@pytest.mark.parametrize("number", TRIES)
def test_a_kill_at_any_moment_costs_only_what_was_not_finished(
    hub, published, undisturbed, tmp_path, number
):
    expected, lasted = undisturbed
    rng = random.Random(number)
    (tmp_path / "cache").mkdir()
    stages = Stages(hub, tmp_path / "cache")
    marks = Marks(stages, published)

    kind = keys.Kind.WEIGHTS
    finished, seen = set(), 0
    for _ in range(rng.randint(1, 2)):
        kill(stages, kind, rng.uniform(0, 1.2 * lasted[kind]))
        journal = stages.workspace(kind) / download.JOURNAL
        lines = journal.read_text().splitlines() if journal.exists() else []
        finished, seen = {line.rsplit(" ", 1)[0] for line in lines}, len(hub.requests)
    assert finish(stages, kind) == expected[kind]
    again = {name for name, _ in hub.requests[seen:]}
    # Its dimensions are read anew: the source may have changed.
    assert not again & finished - {"config.json"}

    kind = keys.Kind.CHECKPOINTS
    for _ in range(rng.randint(1, 2)):
        kill(stages, kind, rng.uniform(0, 1.2 * lasted[kind]))
        marks.add()
    found = finish(stages, kind)
    marks.undo(found)
    assert found == expected[kind]
    assert not list((stages.root / "tmp").glob("*-*"))


def test_of_two_builders_one_builds_and_the_other_adopts(hub, tmp_path):
    (tmp_path / "cache").mkdir()
    stages = Stages(hub, tmp_path / "cache")
    runtime_process.result_of(*stages.commands[keys.Kind.WEIGHTS], cache=stages.root)
    first, second = (
        subprocess.Popen(
            [sys.executable, "-m", "internvl_runtime", *stages.commands[keys.Kind.CHECKPOINTS]],
            env={**os.environ, "INTERNVL_RUNTIME_CACHE_ROOT": str(stages.root)},
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    )  # fmt: skip
    told = [process.communicate()[0].splitlines() for process in (first, second)]

    assert [json.loads(lines[-1]) for lines in told] == [{"checkpoint": stages.checkpoint}] * 2
    # Only one of them had anything to report.
    assert sorted(len(lines) > 1 for lines in told) == [False, True]


def test_a_builder_that_is_killed_leaves_its_work_to_the_one_that_waits(hub, tmp_path):
    (tmp_path / "cache").mkdir()
    stages = Stages(hub, tmp_path / "cache")
    runtime_process.result_of(*stages.commands[keys.Kind.WEIGHTS], cache=stages.root)
    first = stages.start(keys.Kind.CHECKPOINTS)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.Popen(
        [sys.executable, "-m", "internvl_runtime", *stages.commands[keys.Kind.CHECKPOINTS]],
        env={**os.environ, "INTERNVL_RUNTIME_CACHE_ROOT": str(stages.root)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(3)
    first.send_signal(signal.SIGKILL)
    first.stdout.close()
    first.wait()

    assert json.loads(second.communicate()[0].splitlines()[-1]) == {"checkpoint": stages.checkpoint}
