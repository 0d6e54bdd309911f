"""Every name of TensorRT-LLM that our code uses is in the published surface."""

import ast
import tomllib
from pathlib import Path

import pytest
import tensorrt_llm_surface as surface
from internvl_runtime.artifacts import convert, language_engine, shapes
from internvl_runtime.engine import interface

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "runtime" / "internvl_runtime"
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


def test_nothing_of_the_package_is_imported_that_the_surface_does_not_have():
    imported = set()
    for path in RUNTIME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert {name for name in imported if name.startswith("tensorrt_llm")} == set()
