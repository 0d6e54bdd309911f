"""What mpirun is called with, and what its ranks and their children inherit."""

import os
import sys
from pathlib import Path

import pytest
from internvl_runtime import errors
from internvl_runtime.engine import mpi

OF_A_JOB = {"OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3", "PRTE_LAUNCHED": "1", "PMI_ID": "3"}
OF_THE_USER = {
    "OPAL_PREFIX": "/opt/ompi",
    "OMPI_MCA_btl": "tcp,self",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "NCCL_DEBUG": "INFO",
}


@pytest.fixture
def program(tmp_path, monkeypatch):
    made = tmp_path / "mpirun"
    made.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return str(made)


@pytest.mark.parametrize("user", [0, 1000])
def test_ranks_have_no_cores_of_their_own_and_need_no_slots(program, monkeypatch, user):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    expected = [program, *(["--allow-run-as-root"] if user == 0 else [])]
    expected += ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", "4", "a", "b"]
    assert mpi.command(4, ["a", "b"]) == expected


def test_one_rank_needs_no_mpirun(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert mpi.command(1, ["a", "b"]) == ["a", "b"]


def test_mpirun_may_lie_beside_python_or_lack(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(errors.StageError, match="no mpirun on PATH") as caught:
        mpi.command(2, ["a"])
    assert caught.value.reason is errors.Reason.INCOMPATIBLE_VERSIONS
    (tmp_path / "mpirun").touch()
    assert mpi.command(2, ["a"])[0] == str(tmp_path / "mpirun")


def test_a_worker_belongs_to_no_other_job_and_keeps_what_the_user_sets():
    given = {"PATH": "/bin", "HOME": "/root", **OF_A_JOB, **OF_THE_USER}
    assert mpi.environment(given) == {"PATH": "/bin", "HOME": "/root", **OF_THE_USER}


def test_ranks_need_no_shell_and_no_home():
    with mpi.meeting({"OMPI_MCA_plm": "slurm", **OF_A_JOB}) as (_, made):
        assert made["OMPI_MCA_plm"] == "slurm"
        assert made["OMPI_MCA_btl_vader_single_copy_mechanism"] == "none"
        assert made["OMPI_MCA_ess_singleton_isolated"] == "1"
        assert made["HOME"]
        assert made.keys().isdisjoint(OF_A_JOB)
    with mpi.meeting({"HOME": "/root"}) as (_, made):
        assert made["HOME"] == "/root"


def test_what_a_killed_mpirun_leaves_goes_with_the_meeting():
    with mpi.meeting({}) as (folder, made):
        segments = Path(made["OMPI_MCA_btl_sm_backing_directory"])
        assert made["OMPI_MCA_btl_vader_backing_directory"] == str(segments)
        assert segments.parent == mpi.SHARED_MEMORY
        assert made["TMPDIR"] == str(folder)
        (folder / "ompi.vm").mkdir()
        (segments / "segment").touch()
    assert not folder.exists()
    assert not segments.exists()


def test_a_ranks_children_are_no_ranks():
    environment = {"PATH": "/bin", **OF_A_JOB, **OF_THE_USER}
    mpi.leave(environment)
    assert environment == {"PATH": "/bin", **OF_THE_USER}


def test_place_is_what_mpirun_says():
    assert mpi.place({}) == (0, 1)
    assert mpi.place({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}) == (1, 2)


OPEN_MPI_4 = """\
some words of a rank
--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
--------------------------------------------------------------------------
{}
--------------------------------------------------------------------------
"""
OPEN_MPI_5 = """\
--------------------------------------------------------------------------
{}
--------------------------------------------------------------------------
"""
KILLED_4 = "mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed)."
KILLED_5 = (
    "prterun noticed that process rank 10 with PID 9670 on node vm exited on\nsignal 9 (Killed)."
)
FAILED_4 = """mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[18771,1],1]
  Exit code:    3"""
FAILED_5 = """prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-9680@1,10]
   Exit code:    3"""
NO_ROOM = "There are not enough slots available in the system\nto satisfy the 4 slots"


@pytest.mark.parametrize(
    ("frame", "words", "expected"),
    [
        (OPEN_MPI_4, KILLED_4, (1, "signal 9 (Killed)")),
        (OPEN_MPI_5, KILLED_5, (10, "signal 9 (Killed)")),
        (OPEN_MPI_4, FAILED_4, (1, "exit code: 3")),
        (OPEN_MPI_5, FAILED_5, (10, "exit code: 3")),
        ("a rank's\n" + 40 * "-" + "\n" + OPEN_MPI_5, KILLED_5, (10, "signal 9 (Killed)")),
        (
            OPEN_MPI_4,
            "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 1.",
            (1, "MPI_ABORT"),
        ),
        (OPEN_MPI_5, NO_ROOM, (None, " ".join(NO_ROOM.split()))),
    ],
)
def test_what_mpirun_says_of_an_end_is_read(frame, words, expected):
    assert mpi.last_notice(frame.format(words)) == expected


def test_a_log_without_notice_says_nothing():
    assert mpi.last_notice("rank 1: another rank is gone\n") is None


FAILED_2 = """\
2026-11-28 16:00:00,000 ERROR internvl_runtime.engine.mpi [rank 0] rank 0: another rank is gone
2026-11-28 16:00:00,000 ERROR internvl_runtime.engine.mpi [rank 1] this rank has failed
2026-11-28 16:00:00,000 ERROR internvl_runtime.engine.mpi [rank 1] rank 1: ValueError: too much
"""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            FAILED_2 + OPEN_MPI_4.format(FAILED_4),
            "rank 1 of 2 ended while serving: exit code: 3: ValueError: too much",
        ),
        (OPEN_MPI_5.format(KILLED_4), "rank 1 of 2 ended while serving: signal 9 (Killed)"),
        ("", "the engine's ranks ended while serving: mpirun ended with code 7"),
    ],
)
def test_an_end_is_told_with_the_last_words_of_the_rank(said, told):
    assert mpi.describe_end(said, 7, ranks=2, doing="serving") == told


def test_one_rank_s_end_is_told_without_mpirun():
    told = mpi.describe_end(FAILED_2, 1, ranks=1, doing="answering")
    assert told == "rank 0 of 1 ended while answering: exit code: 1: another rank is gone"


def test_a_place_that_can_not_be_written_to_is_named(monkeypatch):
    monkeypatch.setattr(mpi, "SHARED_MEMORY", Path("/proc/shm"))
    with (
        pytest.raises(errors.StageError, match="no folder below /proc/shm") as caught,
        mpi.meeting({}),
    ):
        pass
    assert "emptyDir" in caught.value.remedy


def ended_with(monkeypatch, main):
    """The exit code of a rank's program, and the seconds that it has slept before."""
    slept = []
    monkeypatch.setattr(mpi.time, "sleep", slept.append)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as caught:
        mpi.end_with(main)
    return caught.value.code, slept


def test_a_rank_says_in_a_line_why_it_ends(monkeypatch, caplog):
    def fail():
        raise ValueError("too\nmuch")

    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    ended_with(monkeypatch, fail)
    assert caplog.messages == ["this rank has failed", "rank 3: ValueError: too much"]


def test_a_rank_that_fails_leaves_at_once_and_one_that_lost_another_is_ended(monkeypatch):
    def fail(error):
        raise error

    assert ended_with(monkeypatch, lambda: 0) == (None, [])
    assert ended_with(monkeypatch, lambda: 1) == (1, [])
    assert ended_with(monkeypatch, lambda: fail(ValueError())) == (1, [])
    assert ended_with(monkeypatch, lambda: fail(errors.RankFailedError())) == (1, [])
    assert ended_with(monkeypatch, lambda: fail(errors.RankLostError())) == (1, [10.0])
