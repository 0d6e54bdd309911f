"""Ranks as processes: the command that starts them, and what each of them knows.

Nothing here speaks MPI: `mpirun` starts the ranks and ends all of them when one
fails; TensorRT-LLM's executor or torch.distributed connect them.
"""

import contextlib
import ctypes
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from internvl_runtime import errors

logger = logging.getLogger(__name__)

_PROGRAM = "mpirun"
_PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
_LOST_SECONDS = 10.0
_MOST_WORDS = 500
"""Characters of an error that nobody has foreseen."""
_OF_A_JOB = re.compile(
    r"OMPI_(APP_CTX|ARGV|COMM_WORLD|COMMAND|FILE_LOCATION|FIRST_RANKS|NUM_APP_CTX|UNIVERSE)"
    r"|OMPI_MCA_(ess|orte)|PMI_|PMIX_(BFROP|GDS_MODULE|HOSTNAME|ID|NAMESPACE|PTL|RANK|SECURITY"
    r"|SERVER|SYSTEM|VERSION)|PRTE_LAUNCHED"
)
"""What mpirun tells its ranks; parameters, and where it lies (OPAL_PREFIX), are the user's."""
_SETTINGS = {
    # One machine: no remote shell is looked for. Open MPI 5 needs none for itself.
    "OMPI_MCA_plm": "isolated",
    # Without CAP_SYS_PTRACE ranks can not read each other's memory (Open MPI 4, then 5).
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    "OMPI_MCA_btl_sm_single_copy_mechanism": "none",
    "PMIX_MCA_gds": "hash",
    # One rank alone, which TensorRT-LLM makes an MPI process, too, needs no daemon (Open MPI 4).
    "OMPI_MCA_ess_singleton_isolated": "1",
    # Addresses of other machines are of no use, and a pod's name may have none.
    "GLOO_SOCKET_IFNAME": "lo",
}

_SEGMENT_FOLDERS = ("OMPI_MCA_btl_vader_backing_directory", "OMPI_MCA_btl_sm_backing_directory")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's, not a file of ours
"""Through which ranks of one machine talk."""


_NOTICE = re.compile(r"^-{20,}\n(.*?)\n-{20,}$", re.DOTALL | re.MULTILINE)
"""How mpirun sets what it says apart."""
_CULPRIT = re.compile(
    r"process rank (?P<killed>\d+) .{0,200}?exited on (?P<signal>signal \d+ \([^)]*\))"
    r"|Process name: \[.{0,200}?[,.](?P<failed>\d+)\] E(?P<code>xit code: \d+)"
    r"|MPI_ABORT was invoked on rank (?P<aborted>\d+)"
)
"""Of Open MPI 4 and 5, with every run of white space as one space."""


_REMEDY = (
    "read the container's log; out of memory is the usual cause; NCCL_DEBUG=INFO tells of GPUs' "
    "connections"
)
_LAST_WORDS = re.compile(r"\brank (\d+): (.+)")
"""How a rank says why it ends, in a line of its log."""


class Notice(NamedTuple):
    """What mpirun has said at its end."""

    rank: int | None
    """The one that ended by itself, where it says so."""
    how: str


class Place(NamedTuple):
    """Where a process stands among its ranks."""

    rank: int
    size: int


def place(environment: Mapping[str, str]) -> Place:
    """Return this process's rank, 0 of 1 where no mpirun has started it."""
    return Place(
        int(environment.get("OMPI_COMM_WORLD_RANK", 0)),
        int(environment.get("OMPI_COMM_WORLD_SIZE", 1)),
    )


def command(ranks: int, program: Sequence[str]) -> list[str]:
    """Return what starts a program as so many ranks: the program itself, where it is one.

    Raises StageError where there is no mpirun.
    """
    if ranks == 1:
        return list(program)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    # A rank's threads may use every core of the pod, which may have fewer than there are ranks.
    placed = ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    return [_find_program(), *root, *placed, "-n", str(ranks), *program]


def _find_program() -> str:
    """Return mpirun's path: TensorRT-LLM wants that of its own image, which is on PATH."""
    beside = Path(sys.executable).with_name(_PROGRAM)
    found = shutil.which(_PROGRAM) or (str(beside) if beside.exists() else None)
    if found is None:
        raise errors.StageError(
            errors.Reason.INCOMPATIBLE_VERSIONS,
            "there is no mpirun on PATH or beside python, which starts the ranks of a model on "
            "several GPUs",
            remedy="use the runtime image of this release, or install Open MPI 4.1 or 5",
        )
    return found


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return a process's environment: that of no MPI job."""
    return {name: value for name, value in base.items() if not _OF_A_JOB.match(name)}


@contextlib.contextmanager
def meeting(base: Mapping[str, str]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Lend ranks a folder to meet in, and their environment.

    What the user has set of their settings stays. What a killed mpirun can not remove lies in
    this folder and in one in shared memory, which go at the end. Raises StageError where there
    is no place for them.
    """
    with create_folder() as folder, create_folder(below=SHARED_MEMORY) as segments:
        # Open MPI 5 does not start without HOME.
        own = {"HOME": folder, **dict.fromkeys(_SEGMENT_FOLDERS, segments)}
        yield Path(folder), {**_SETTINGS, **own, **environment(base), "TMPDIR": folder}


def create_folder(below: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """Return a folder that goes at the end. Raises StageError where it can not be made."""
    try:
        return tempfile.TemporaryDirectory(
            prefix="internvl-", dir=below, ignore_cleanup_errors=True
        )
    except OSError as e:
        raise errors.StageError(
            errors.Reason.CRASH_LOOP,
            f"the engine's processes can have no folder below {below or tempfile.gettempdir()}: "
            f"{e.strerror}",
            remedy="mount an emptyDir there that this user may write to (medium Memory for "
            f"{SHARED_MEMORY}), or name another folder in TMPDIR",
        ) from e


def failure(message: str, *, limit: str = "") -> errors.StageError:
    """Return the error of ranks that have ended, or hang; its remedy tells of the limit, too."""
    return errors.StageError(errors.Reason.RANK_FAILED, message, remedy=_REMEDY + limit)


def describe(error: BaseException) -> str:
    """Return the words of an error that nobody has foreseen, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_WORDS]


def last_notice(said: str) -> Notice | None:
    """Return what names a rank last in the log of mpirun and its ranks, else the last notice."""
    for found in reversed(list(_CULPRIT.finditer(" ".join(said.split())))):
        if found["killed"]:
            return Notice(int(found["killed"]), found["signal"])
        if found["failed"]:
            return Notice(int(found["failed"]), f"e{found['code']}")
        return Notice(int(found["aborted"]), "MPI_ABORT")
    notices = _NOTICE.findall(said)
    return Notice(None, " ".join(notices[-1].split())) if notices else None


def describe_end(said: str, code: int | None, *, ranks: int, doing: str) -> str:
    """Return which rank has ended and its last words, or what else mpirun has said."""
    notice = last_notice(said) if ranks > 1 else Notice(0, f"exit code: {code}")
    if notice is None or notice.rank is None:
        how = notice.how if notice else f"mpirun ended with code {code}"
        return f"the engine's ranks ended while {doing}: {how}"
    words = [text for rank, text in _LAST_WORDS.findall(said) if int(rank) == notice.rank]
    told = [f"rank {notice.rank} of {ranks} ended while {doing}", notice.how, *words[-1:]]
    return ": ".join(told)


def leave(environment: MutableMapping[str, str]) -> None:
    """Take away what would make a rank's child believe that it is a rank."""
    for name in [name for name in environment if _OF_A_JOB.match(name)]:
        del environment[name]


def die_with_parent() -> None:
    """Let the kernel end this process when mpirun is gone, whoever has killed it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a rank's program to its end, and end the process.

    One that fails leaves at once: MPI's own end waits for the other ranks, which wait for this one.
    """
    code, rank = 1, place(os.environ).rank
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s %(name)s [rank {rank}] %(message)s",
    )
    try:
        code = main()
    except errors.RankLostError as e:
        logger.error("rank %d: %s", rank, e)
        # mpirun ends this one, and says which has ended by itself.
        time.sleep(_LOST_SECONDS)
    except errors.RuntimeBaseError as e:
        logger.error("rank %d: %s", rank, e)
    except Exception as e:
        logger.exception("this rank has failed")
        logger.error("rank %d: %s", rank, describe(e))
    if code:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    sys.exit()
