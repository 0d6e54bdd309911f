"""Each way to fail has its reason, from its real cause, within seconds."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runtime_process
import safetensors.torch
from internvl_runtime.artifacts import language_engine, shapes, synthesize
from internvl_runtime.engine import device
from internvl_runtime.model import config
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

SECONDS = 10


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    recipe = synthesize.Recipe(shapes.TINY, config.Family.QWEN2, 3)
    synthesize.write_checkpoint(recipe, folder, tokenizer_model=folder, report=lambda *_: None)
    return folder


@pytest.fixture
def checkpoint(published, tmp_path):
    """A converted checkpoint for one rank; returns its folder."""
    source = json.dumps({"folder": {"path": str(published)}})
    weights = runtime_process.result_of("resolve", "--source", source, cache=tmp_path)["weights"]
    runtime_process.result_of("fetch", "--source", source, "--weights", weights, cache=tmp_path)
    key = runtime_process.result_of("convert", "--weights", weights, cache=tmp_path)["checkpoint"]
    return tmp_path / "checkpoints" / key


def end_of(tmp_path, *arguments, **environment):
    """Run a command that fails; returns what its termination message says."""
    told = tmp_path / "termination"
    told.write_text("")
    began = time.monotonic()
    done = runtime_process.run(*arguments, cache=tmp_path, termination_log=told, **environment)
    assert time.monotonic() - began < SECONDS
    assert done.returncode in {80, 81}, done.stderr
    assert "Traceback" not in done.stderr
    ended = json.loads(told.read_text())
    assert ended["remedy"]
    return ended


def build(checkpoint, *more):
    flags = json.dumps(runtime_process.FLAGS)
    return ["build", "--checkpoint", checkpoint.name, "--flags", flags, *more]


def sign(checkpoint):
    """Make the manifest fit the files as they are: the damage is older than the manifest."""
    manifest = json.loads((checkpoint / caches.MANIFEST).read_text())
    names = [p for p in checkpoint.rglob("*") if p.is_file()]
    manifest["files"] = [
        caches.describe_file(path, checkpoint, {})
        for path in sorted(names)
        if path.name not in {caches.MANIFEST, caches.MARKER}
    ]
    content = keys.canonical_json(manifest)
    (checkpoint / caches.MANIFEST).write_bytes(content)
    digest = caches.hashlib.sha256(content).hexdigest()
    (checkpoint / caches.MARKER).write_text(digest)


def drop_a_tensor(checkpoint):
    path = checkpoint / "rank0.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["transformer.layers.0.mlp.fc.weight"]
    safetensors.torch.save_file(tensors, path)
    sign(checkpoint)


def add_a_rank(checkpoint):
    (checkpoint / "rank1.safetensors").write_bytes((checkpoint / "rank0.safetensors").read_bytes())
    sign(checkpoint)


def cut_a_rank_short(checkpoint):
    path = checkpoint / "rank0.safetensors"
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_a_tensor, "lacks the tensor transformer.layers.0.mlp.fc.weight"),
        (add_a_rank, "rank1.safetensors does not belong to it"),
        (cut_a_rank_short, "rank0.safetensors has"),
    ],
)
def test_a_damaged_checkpoint(checkpoint, tmp_path, damage, words):
    damage(checkpoint)
    ended = end_of(tmp_path, *build(checkpoint))
    assert ended["reason"] == "DigestMismatch"
    assert words in ended["message"]


def test_a_wrong_flag(checkpoint, tmp_path):
    flags = json.dumps(runtime_process.FLAGS | {"maxBatch": 3})
    ended = end_of(tmp_path, "build", "--checkpoint", checkpoint.name, "--flags", flags)
    assert ended["reason"] == "InvalidSpec"
    assert "maxBatch" in ended["message"]


def test_limits_that_the_recorded_prompts_are_beyond(checkpoint, tmp_path):
    flags = json.dumps(runtime_process.FLAGS | {"maxSequenceTokens": 300, "maxInputTokens": 299})
    ended = end_of(tmp_path, "build", "--checkpoint", checkpoint.name, "--flags", flags)
    assert ended["reason"] == "InvalidSpec"
    assert "the image prompt that every engine is verified with has" in ended["message"]
    assert "maxSequenceTokens to 1024" in ended["remedy"]


def test_a_builder_without_the_gpu(checkpoint, tmp_path):
    ended = end_of(tmp_path, *build(checkpoint, "--architecture", "sm_90"))
    assert ended["reason"] == "UnsupportedGPU"
    assert "sm_90" in ended["message"]


def test_an_engine_of_another_gpu(checkpoint, tmp_path):
    inputs = keys.engine_inputs(
        checkpoint=checkpoint.name, backend="PyTorch", architecture="sm_90",
        versions=device.versions("PyTorch", "sm_90"), build=runtime_process.FLAGS,
    )  # fmt: skip
    cache = caches.Cache(tmp_path)
    with cache.workspace(keys.Kind.ENGINES, keys.key_of(keys.Kind.ENGINES, inputs)) as workspace:
        (workspace / "verification.json").write_text("[]")
        engine = cache.publish(workspace, kind=keys.Kind.ENGINES, inputs=inputs)
    ended = end_of(tmp_path, "serve", "--engine", engine.path)
    assert ended["reason"] == "EngineIncompatible"
    assert "sm_90" in ended["message"]


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full(published, tmp_path):
    source = json.dumps({"folder": {"path": str(published)}})
    with small_disk(tmp_path / "disk", "600k") as disk:
        weights = runtime_process.result_of("resolve", "--source", source, cache=disk)["weights"]
        runtime_process.result_of("fetch", "--source", source, "--weights", weights, cache=disk)
        told = tmp_path / "termination"
        told.touch()
        done = runtime_process.run(
            "convert", "--weights", weights, cache=disk, termination_log=told
        )
    assert done.returncode == 80, done.stderr
    ended = json.loads(told.read_text())
    assert ended["reason"] == "DiskFull"
    assert "bytes are free" in ended["message"]


@contextlib.contextmanager
def memory_limit(size):
    """A cgroup, of version 1 or 2, for processes that move into it; gives its folder."""
    root = Path("/sys/fs/cgroup")
    is_second = (root / "cgroup.controllers").exists()
    group = (root if is_second else root / "memory") / f"internvl-test-{os.getpid()}"
    try:
        if is_second:
            (root / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        limit = "memory.max" if is_second else "memory.limit_in_bytes"
        (group / limit).write_text(str(size))
    except OSError as e:
        pytest.skip(f"no memory cgroup can be made: {e}")
    try:
        yield group
    finally:
        group.rmdir()


def test_a_build_that_the_kernel_ends_for_want_of_memory(tmp_path):
    with memory_limit(256 * 2**20) as group:
        code = f"open('{group}/cgroup.procs', 'w').write('0'); x = bytearray(2**30)"
        with pytest.raises(language_engine.errors.StageError) as caught:
            language_engine.build(
                [sys.executable, "-c", code], ranks=1, output=tmp_path, report=lambda *_: None
            )
    assert caught.value.reason is language_engine.errors.Reason.OUT_OF_MEMORY
