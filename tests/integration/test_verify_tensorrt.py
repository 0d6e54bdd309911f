"""`make verify-tensorrt` where the NVIDIA image and its GPU are fakes."""

import json
import os
import subprocess
import sys

import nvidia_image
import pytest

SOURCE = {"synthetic": {"shape": "tiny", "family": "internlm2", "seed": 3}}


@pytest.fixture(scope="module", autouse=True)
def image(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        nvidia_image.enter(patch, tmp_path_factory.mktemp("site"))
        yield


def verify(report, **more):
    command = [
        sys.executable, "hack/verify_tensorrt.py", "--source", json.dumps(SOURCE),
        "--report", str(report), "--dtype", "float32",
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **more}, check=False)
    described = json.loads((report / "report.json").read_text())
    return done.returncode, {each["name"]: each for each in described["checks"]}


def test_every_check_is_right_and_every_token_equal(tmp_path):
    code, checks = verify(tmp_path)
    assert {name: each["detail"] for name, each in checks.items() if not each["is_right"]} == {}
    assert code == 0
    compared = int(checks["build, serve, compare"]["detail"].split()[0])
    assert compared > 30
    assert "NVIDIA H200" in (tmp_path / "report.md").read_text()


def test_what_is_wrong_is_told_and_the_rest_goes_on(tmp_path):
    code, checks = verify(tmp_path, TRTLLM_BUILD_FAILS="gpu-memory")
    wrong = {name for name, each in checks.items() if not each["is_right"]}
    assert code == 1
    assert wrong == {"dry run of trtllm-build", "build, serve, compare"}
    assert "use a larger GPU" in checks["build, serve, compare"]["detail"]
