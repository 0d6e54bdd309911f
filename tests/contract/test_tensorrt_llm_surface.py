"""Every name of TensorRT-LLM that our code uses is in the published surface."""

import ast
import json
import tomllib
from pathlib import Path

import pytest
import tensorrt_llm_surface as surface
from internvl_doubles import executor as executor_double
from internvl_runtime.artifacts import convert, language_engine, shapes
from internvl_runtime.engine import interface
from internvl_runtime.engine.tensorrt import requests

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "runtime" / "internvl_runtime"
EXECUTOR = json.loads((ROOT / "tests" / "contract" / "tensorrt_llm_surface.json").read_text())
OWNERS = {"told": "IterationStats", "cache": "KvCacheStats", "flight": "InflightBatchingStats",
          "response": "Response", "result": "Result",
          "metrics": "RequestPerfMetrics", "finished": "FinishReason"}  # fmt: skip
"""Variables of the engine, and what they are of."""
PREFIXES = {"BatchingType", "CapacitySchedulerPolicy", "FinishReason", "ModelType"}
LIMITS = interface.EngineLimits(
    max_sequence_tokens=32768, max_input_tokens=32767, max_batched_tokens=8192, max_batch_size=8,
    max_tiles_per_image=12, max_tiles_per_request=52,
)  # fmt: skip


def test_every_flag_is_published():
    command = language_engine.command(
        Path("c"), Path("o"), LIMITS, dtype="bfloat16", workers=1, timing_cache=Path("t")
    )
    used = {word for word in command if word.startswith("--")}
    assert used <= surface.FLAGS.keys()


@pytest.mark.parametrize("quantization", convert.QUANTIZATIONS)
@pytest.mark.parametrize("name", shapes.PUBLISHED)
def test_every_key_of_config_json_is_published(name, quantization):
    described = convert.describe_checkpoint(
        shapes.PUBLISHED[name].language, dtype="bfloat16", quantization=quantization, ranks=1
    )
    assert described.keys() <= surface.CONFIG_KEYS.keys()
    assert described["mapping"].keys() <= surface.MAPPING_KEYS.keys()
    assert described["quantization"].keys() <= surface.QUANTIZATION_KEYS.keys()
    assert described["quantization"]["quant_algo"] in surface.QUANTIZATION_VALUES


def test_the_pins_are_those_of_the_surface():
    project = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())
    pinned = dict(
        requirement.split("==")
        for requirement in project["project"]["optional-dependencies"]["tensorrt"]
        if requirement.startswith("tensorrt")
    )
    assert pinned == surface.DISTRIBUTIONS


MODULE = "tensorrt_llm.bindings.executor"


def nodes_of_the_engine():
    for path in (RUNTIME / "engine" / "tensorrt").glob("*.py"):
        yield from ast.walk(ast.parse(path.read_text()))


def test_one_module_of_the_package_is_imported():
    imported = set()
    for path in RUNTIME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert {name for name in imported if name.startswith("tensorrt_llm")} == {MODULE}


def test_every_name_of_the_executor_is_published():
    found = set()
    for node in nodes_of_the_engine():
        if not isinstance(node, ast.Attribute):
            continue
        whole = ast.unparse(node).removeprefix("self.")
        owner, _, name = whole.partition(".")
        if not name:
            continue
        if owner in {"module", "_module"} or (owner == "executor" and name[0].isupper()):
            found.add(name)
        elif owner == "_executor":
            found.add(f"Executor.{name}")
        elif owner in OWNERS:
            found.add(f"{OWNERS[owner]}.{name.partition('.')[0]}")
    # An enumeration is met on the way to its value.
    assert found - PREFIXES <= EXECUTOR["names"].keys()
    assert {"Executor", "Executor.enqueue_request", "FinishReason.STOP_WORDS"} <= found


def test_every_keyword_of_the_executor_is_published():
    calls = [
        (node.func.attr, keyword.arg)
        for node in nodes_of_the_engine()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        for keyword in node.keywords
        if node.func.attr in EXECUTOR["keywords"] and keyword.arg
    ]
    assert len(calls) > 25
    assert [call for call in calls if call[1] not in EXECUTOR["keywords"][call[0]]] == []


@pytest.mark.parametrize("way", [{}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.1, "seed": 1}])
def test_every_keyword_of_sampling_is_published(way):
    made = requests.sampling_of(
        interface.Sampling(
            max_tokens=1, **{"temperature": 0.0, **way}, repetition_penalty=1.1,
            presence_penalty=0.5, frequency_penalty=0.5,
        ),
        "r",
    )  # fmt: skip
    assert made.keys() <= EXECUTOR["keywords"]["SamplingConfig"].keys()


def test_the_double_takes_every_published_keyword_that_is_used():
    for owner, keywords in EXECUTOR["keywords"].items():
        with pytest.raises(executor_double.StrictError) as caught:
            getattr(executor_double, owner)(**dict.fromkeys([*keywords, "surprise"]))
        assert "surprise" in str(caught.value)


@pytest.mark.parametrize("source", sorted(set(EXECUTOR["names"].values())))
def test_every_row_has_a_path_and_a_commit(source):
    path, _, commit = source.partition("@")
    assert path.startswith("cpp/tensorrt_llm/nanobind/executor/")
    assert len(commit) == 40
