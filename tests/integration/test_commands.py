"""The build commands as processes: results, failures, termination messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runtime_process

ROOT = Path(__file__).parents[2]
FLAGS = json.dumps(runtime_process.FLAGS)
SOURCE = '{"synthetic": {"shape": "tiny", "family": "qwen2", "seed": 1}}'


def test_a_second_walk_builds_nothing_again(qwen_checkpoint, tmp_path):
    first = runtime_process.build_engine(qwen_checkpoint, cache=tmp_path)
    marker = first / "COMPLETE"
    written = marker.stat().st_mtime_ns

    second = runtime_process.build_engine(qwen_checkpoint, cache=tmp_path)

    assert second == first
    assert marker.stat().st_mtime_ns == written


def test_light_commands_start_without_torch(tmp_path):
    code = (
        "import sys; from internvl_runtime.__main__ import main; "
        f"code = main(['resolve', '--source', '''{SOURCE}''']); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    environment = {**os.environ, "INTERNVL_RUNTIME_CACHE_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0


def test_a_failure_ends_with_reason_message_and_remedy(tmp_path):
    log = tmp_path / "termination"
    log.touch()
    source = json.dumps({"folder": {"path": str(tmp_path / "nothing")}})

    done = runtime_process.run("resolve", "--source", source, cache=tmp_path, termination_log=log)

    assert done.returncode == 80
    told = json.loads(log.read_text())
    assert told["reason"] == "ModelNotFound"
    assert "no config.json" in told["message"]
    assert told["remedy"]
    assert "Traceback" not in done.stderr


def test_an_unreadable_folder_is_told(tmp_path, qwen_checkpoint):
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root can read everything")
    folder = tmp_path / "model"
    shutil.copytree(qwen_checkpoint, folder)
    (folder / "config.json").chmod(0)
    command = [sys.executable, "-m", "internvl_runtime", "resolve", "--source",
               json.dumps({"folder": {"path": str(folder)}}), "--cache", str(tmp_path)]  # fmt: skip
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    prefix = drop if os.geteuid() == 0 else []

    done = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)

    assert done.returncode == 80
    assert "Permission denied" in done.stderr
    assert "readable for everyone" in done.stderr


def test_other_versions_are_refused_by_the_builder(qwen_checkpoint, tmp_path):
    runtime_process.build_engine(qwen_checkpoint, cache=tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    done = runtime_process.run(
        "build", "--checkpoint", checkpoint.name, "--architecture", "cpu-x86_64",
        "--versions", '{"torch": "9"}', "--flags", json.dumps(runtime_process.FLAGS),
        cache=tmp_path,
    )  # fmt: skip
    assert done.returncode == 80
    assert "'torch': '9'" in done.stderr


def test_a_killed_conversion_is_repeated_to_the_same_result(qwen_checkpoint, tmp_path):
    source = json.dumps({"folder": {"path": str(qwen_checkpoint)}})
    resolved = runtime_process.result_of("resolve", "--source", source, cache=tmp_path)
    weights = resolved["weights"]
    fetch = ["fetch", "--source", source, "--weights", weights]
    runtime_process.result_of(*fetch, cache=tmp_path)
    command = [sys.executable, "-m", "internvl_runtime", "convert", "--cache", str(tmp_path),
               "--weights", weights]  # fmt: skip
    process = subprocess.Popen(command)
    while process.poll() is None and not any((tmp_path / "tmp").glob("checkpoints-*/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    convert = ["convert", "--weights", weights]
    checkpoint = runtime_process.result_of(*convert, cache=tmp_path)["checkpoint"]

    assert (tmp_path / "checkpoints" / checkpoint / "COMPLETE").exists()


def test_a_damaged_answer_fails_verification(qwen_engine, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(qwen_engine.parent.parent, cache)
    recorded = cache / "engines" / qwen_engine.name / "verification.json"
    other = [dict(entry) for entry in json.loads(recorded.read_text())]
    other[0]["token_ids"][0] += 1
    size = recorded.stat().st_size
    recorded.write_text(json.dumps(other).ljust(size))

    done = runtime_process.run("verify", "--engine", recorded.parent, cache=cache)

    assert done.returncode == 80
    assert "the build recorded" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "words"),
    [
        (["build", "--checkpoint", "k", "--architecture", "a", "--flags", "{}",
          "--versions", "{bad"], {}, 2, "--versions: no JSON"),
        (["inspect", ".", "--max-dynamic-patch", "0"], {}, 2, "0 is no number from 1"),
        (["bench", "--url", "http://127.0.0.1:1", "--picture", "99999x2"], {}, 80,
         "--picture 99999x2: a JPEG has from 1 to 65500"),
        (["inspect", ".", "--image", "nope.png"], {}, 80, "there is no file nope.png"),
        (["plot-steps", "/nope", "--output", "x.svg"], {}, 1, "No such file"),
        (["plot-steps", "/etc/hostname", "--output", "x.svg"], {}, 80, "can not be drawn"),
        (["synthesize", "--shape", "tiny", "--family", "qwen2", "--output", "/proc/x"], {}, 1,
         "/proc/x"),
        (["verify", "--engine", "."], {"INTERNVL_RUNTIME_PORT": "many"}, 80,
         "INTERNVL_RUNTIME_PORT='many': Input should be a valid integer"),
        (["build", "--checkpoint", "k", "--backend", "vllm", "--flags", FLAGS], {}, 80,
         "backend vllm is not one of"),
        (["build", "--checkpoint", "k", "--backend", "TensorRT", "--flags", FLAGS], {}, 80,
         "this machine has none"),
        (["build", "--checkpoint", "k", "--flags", FLAGS.replace("16", "0")], {}, 80,
         "maxBatchSize is 0"),
        (["build", "--checkpoint", "k", "--flags", FLAGS.replace("32767", "32768")], {}, 80,
         "maxInputTokens leaves no room"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_gets_a_line_and_no_stack_trace(arguments, environment, code, words, tmp_path):
    done = runtime_process.run(*arguments, cache=tmp_path, **environment)

    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_termination_message_fits_into_what_kubernetes_keeps(tmp_path):
    told = tmp_path / "termination"
    told.touch()
    source = json.dumps({"folder": {"path": f"/nowhere/{'x' * 9000}"}})

    done = runtime_process.run("resolve", "--source", source, cache=tmp_path, termination_log=told)

    assert done.returncode != 0
    message = told.read_bytes()
    assert len(message) <= 4096
    assert json.loads(message)["remedy"]


def test_the_commands_of_the_documentation_build_an_engine(tmp_path):
    text = (ROOT / "docs" / "building.md").read_text()
    (block,) = [part for part in text.split("\n\n") if part.startswith("    export INT")]
    *commands, serve = block.rstrip().splitlines()
    assert serve == '    internvl-runtime serve --engine cache/engines/"$engine"'
    script = "\n".join([*commands, 'cat cache/engines/"$engine"/COMPLETE'])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=False,
        env={**os.environ, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (engine,) = (tmp_path / "cache" / "engines").iterdir()
    assert done.stdout.endswith((engine / "COMPLETE").read_text())
