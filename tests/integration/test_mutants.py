"""Every mistake in the adapter of the executor that a rule forbids fails a test."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADAPTER = Path("internvl_runtime/engine/tensorrt")
TESTS = {
    "engine": ["tests/unit/runtime/test_tensorrt_requests.py",
               "tests/integration/test_tensorrt_engine.py"],
    "ranks": ["tests/integration/test_ranks.py", "-k", "sigterm and executor"],
}  # fmt: skip
MUTANTS = tomllib.loads((ROOT / "tests/data/executor-mutants.toml").read_text())["mutant"]
FAILED = 1
"""pytest's exit code where tests have run and failed."""


def copy_with(mutant, folder):
    """Copy the runtime; returns what finds the copy before the original."""
    shutil.copytree(ROOT / "runtime" / "internvl_runtime", folder / "internvl_runtime")
    path = folder / ADAPTER / mutant["file"]
    text = path.read_text()
    assert text.count(mutant["old"]) == 1, "the mutant is not of this code"
    path.write_text(text.replace(mutant["old"], mutant["new"]))
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["rule"])
def test_a_mutant_is_of_this_code(mutant, tmp_path):
    environment = copy_with(mutant, tmp_path)
    found = [sys.executable, "-c", "import internvl_runtime as it; print(it.__file__)"]
    where = subprocess.run(found, env=environment, capture_output=True, text=True, check=True)
    assert str(tmp_path) in where.stdout


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["rule"])
def test_a_mutant_fails_a_test(mutant, tmp_path):
    tests = TESTS[mutant.get("tests", "engine")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        env=copy_with(mutant, tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    summary = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{mutant['rule']}: {summary}")
    assert done.returncode == FAILED, done.stdout[-2000:]
