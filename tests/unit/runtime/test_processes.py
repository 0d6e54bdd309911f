"""What the server makes of an mpirun that does not do its part."""

import asyncio
import sys
import textwrap

import pytest
from internvl_runtime import errors
from internvl_runtime.engine import mpi, processes

FAKE = """
    import socket, sys, time
    from internvl_runtime.engine import channel
    (path,) = [each.partition("=")[2] for each in sys.argv if each.startswith("--socket=")]
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(path)
        connected.sendall(channel.encode(channel.Joined(1)))
        time.sleep(float({lasts}))
    time.sleep(60)
"""
"""An mpirun that stays when its only rank has left."""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def write(*, lasts):
        program = tmp_path / "mpirun"
        text = textwrap.dedent(FAKE.format(lasts=lasts))
        program.write_text(f"#!{sys.executable}\n{text}")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(processes, "_NOTICE_SECONDS", 0.2)
    return write


async def end_of_start(*, seconds):
    started = processes.Processes(2, speak_mpi=True)
    with pytest.raises(errors.StageError) as caught:
        await started.unless_failed(started.start([]), seconds=seconds)
    await started.stop(seconds=30)
    return caught.value


@pytest.mark.parametrize(
    ("lasts", "seconds", "words"),
    [
        (0, 30, "a rank ended while loading, and mpirun went on"),
        (60, 3, "the engine worker was not ready within 3 s"),
    ],
)
def test_an_mpirun_that_goes_on_is_ended(fake, lasts, seconds, words):
    fake(lasts=lasts)
    error = asyncio.run(end_of_start(seconds=seconds))
    assert (error.reason, error.message) == (errors.Reason.RANK_FAILED, words)
    assert "NCCL_DEBUG=INFO" in error.remedy


def test_an_mpirun_that_ends_is_told_with_its_code(fake, tmp_path):
    (tmp_path / "mpirun").write_text(f"#!{sys.executable}\nraise SystemExit(7)\n")
    (tmp_path / "mpirun").chmod(0o755)
    error = asyncio.run(end_of_start(seconds=30))
    assert error.message == "the engine's ranks ended while loading: mpirun ended with code 7"


def test_a_socket_whose_path_is_too_long_is_told_before_anything_starts(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(mpi.tempfile, "tempdir", str(long))

    async def create():
        processes.Processes(2, speak_mpi=True)

    with pytest.raises(errors.StageError, match="may have 107 bytes") as caught:
        asyncio.run(create())
    assert "TMPDIR" in caught.value.remedy
