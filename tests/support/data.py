"""Test data that lie outside the repository."""

import os
from pathlib import Path

import pytest

_VARIABLE = "INTERNVL_TEST_DATA"


def require(name: str) -> Path:
    """Return a file of the test data; skips without it, and fails if it was promised."""
    path = Path(os.environ.get(_VARIABLE, "../shared/data")) / name
    if path.exists():
        return path
    if _VARIABLE in os.environ:
        pytest.fail(f"{_VARIABLE} is set, but there is no {path}")
    return pytest.skip(f"no test data: {path}")
