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
               "tests/unit/runtime/test_tensorrt_counts.py",
               "tests/unit/runtime/test_tensorrt_core.py",
               "tests/unit/runtime/test_tensorrt_loading.py",
               "tests/integration/test_tensorrt_engine.py"],
    "ranks": ["tests/integration/test_ranks.py", "-k", "sigterm and executor"],
}  # fmt: skip
MUTANTS = tomllib.loads((ROOT / "tests/data/executor-mutants.toml").read_text())["mutant"]
FAILED = 1
"""pytest's exit code where tests have run and failed."""


def copy_into(folder):
    """Copy the runtime; returns what finds the copy before the original."""
    shutil.copytree(ROOT / "runtime" / "internvl_runtime", folder / "internvl_runtime")
    return {**os.environ, "PYTHONPATH": str(folder)}


def copy_with(mutant, folder):
    """Copy the runtime with the mistake in it, likewise."""
    environment = copy_into(folder)
    path = folder / ADAPTER / mutant["file"]
    path.write_text(path.read_text().replace(mutant["old"], mutant["new"]))
    return environment


def run_tests(kind, environment):
    """Run the tests that hold the adapter; returns pytest's exit code and what has failed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS[kind]],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    failed = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED tests/", "ERROR tests/"))
    ]
    return done.returncode, failed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["rule"])
def test_a_mutant_is_of_this_code(mutant):
    text = (ROOT / "runtime" / ADAPTER / mutant["file"]).read_text()
    assert text.count(mutant["old"]) == 1


def test_a_copy_is_found_before_the_original(tmp_path):
    environment = copy_into(tmp_path)
    found = [sys.executable, "-c", "import internvl_runtime as it; print(it.__file__)"]
    where = subprocess.run(found, env=environment, capture_output=True, text=True, check=True)
    assert str(tmp_path) in where.stdout


@pytest.mark.long
@pytest.mark.parametrize("kind", TESTS)
def test_the_same_copy_without_a_mutant_fails_none(kind, tmp_path):
    assert run_tests(kind, copy_into(tmp_path)) == (0, [])


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["rule"])
def test_a_mutant_fails_a_test(mutant, tmp_path):
    code, failed = run_tests(mutant.get("tests", "engine"), copy_with(mutant, tmp_path))
    print(f"{mutant['rule']}: {failed}")
    assert code == FAILED
    assert failed
