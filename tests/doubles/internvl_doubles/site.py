"""Writes a folder that makes a process believe it runs in the NVIDIA image, on one H200.

    PYTHONPATH=FOLDER PATH=FOLDER/bin:$PATH

Its `tensorrt`, `tensorrt_llm`, `trtllm-build` and `pynvml` are the fakes of this package.
"""

import sys
from pathlib import Path

_VERSIONS = {"tensorrt": "10.14.1.48.post1", "tensorrt_llm": "1.2.1"}
_MODULES = {
    "tensorrt.py": """
import pathlib
import tempfile
from internvl_doubles import tensorrt as double
with tempfile.TemporaryDirectory() as folder:
    binding = double.import_binding(pathlib.Path(folder))
double.install(double.Module(binding))
""",
    "tensorrt_llm/__init__.py": f"__version__ = {_VERSIONS['tensorrt_llm']!r}",
    "tensorrt_llm/bindings/__init__.py": "",
    "tensorrt_llm/bindings/executor.py": "from internvl_doubles.executor import *",
    "pynvml.py": "from internvl_doubles.nvml import *",
}


def write(folder: Path) -> dict[str, str]:
    """Write the folder; return the variables of such a process, but for what PATH was."""
    for name, text in _MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, version in _VERSIONS.items():
        described = folder / f"{name}-{version}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    program = folder / "bin" / "trtllm-build"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m internvl_doubles.trtllm_build "$@"\n')
    program.chmod(0o755)
    own = Path(__file__).parents[1]
    return {"PYTHONPATH": f"{folder}:{own}", "PATH": str(program.parent)}
