"""NVIDIA's image and its H200s, as fakes for this process and those that it starts."""

import os
import sys

from internvl_doubles import site


def enter(patch, folder, *, gpus=1):
    """Make `tensorrt`, `tensorrt_llm`, `trtllm-build` and `pynvml` the fakes, until undone."""
    made = site.write(folder)
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", made["PYTHONPATH"], prepend=os.pathsep)
    patch.setenv("FAKE_GPUS", str(gpus))
    patch.setenv("PATH", f"{made['PATH']}:{os.environ['PATH']}")
    for name in list(sys.modules):
        if name.partition(".")[0] in {"tensorrt", "tensorrt_llm", "pynvml"}:
            patch.delitem(sys.modules, name)
