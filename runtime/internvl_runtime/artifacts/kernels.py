"""Compiles FlashInfer's kernels ahead, so that serving starts without a compiler.

What FlashInfer keeps on disk while compiling is no use to another process, which
compiles again; finished modules in a folder of their own are loaded as they are.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from internvl_runtime import errors
from internvl_runtime.artifacts import progress
from internvl_runtime.model import config, tensor_parallel

_POLL_SECONDS = 1.0
_LAST_LINES = 12


def pack(
    language: config.LanguageConfig,
    *,
    dtype: str,
    ranks: int,
    output: Path,
    scratch: Path,
    report: progress.Report,
) -> list[str]:
    """Compile what serving this model needs into `output`; return the modules' names.

    Objects that are compiled stay in `scratch` for the next try. Must run before
    anything else of FlashInfer does, which reads its folders when it is imported.
    Raises StageError (BuildFailed) with the compiler's last words.
    """
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(scratch)
    import torch

    from internvl_runtime.engine.pytorch import flashinfer

    share = tensor_parallel.share(language, ranks)
    modules = flashinfer.list_modules(share, dtype=getattr(torch, dtype))
    if modules:
        from flashinfer.jit import core

        total = sum(len(module.sources) for module in modules)
        with _reporting([module.build_dir for module in modules], total, report):
            try:
                core.build_jit_specs(modules)
            except (OSError, RuntimeError) as e:
                raise errors.StageError(
                    errors.Reason.BUILD_FAILED,
                    f"FlashInfer's kernels do not compile: {_last_lines(str(e))}",
                    remedy="use the builder variant of the image, which has nvcc, of the CUDA "
                    "version that its torch was built for",
                ) from e
    for module in modules:
        packed = output / module.name / f"{module.name}.so"
        packed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module.jit_library_path, packed)
    return [module.name for module in modules]


@contextlib.contextmanager
def _reporting(folders: Sequence[Path], total: int, report: progress.Report) -> Iterator[None]:
    """Count the object files in folders while they come to be."""
    is_over = threading.Event()

    def count() -> None:
        told = -1
        while not is_over.wait(_POLL_SECONDS):
            found = sum(len(list(folder.glob("*.o"))) for folder in folders)
            if found != told:
                report(min(found, total), total)
            told = found

    counting = threading.Thread(target=count, name="kernels")
    counting.start()
    try:
        yield
    finally:
        is_over.set()
        counting.join()
    report(total, total)


def _last_lines(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-_LAST_LINES:])
