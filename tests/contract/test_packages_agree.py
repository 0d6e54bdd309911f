"""The two packages, the CRD, the chart and the lock files say the same."""

import re
from pathlib import Path

import pytest
import yaml
from internvl_operator import catalog, diagnose, settings
from internvl_operator import errors as operator_errors
from internvl_operator import keys as operator_keys
from internvl_operator import plan as plans
from internvl_operator.api import v1alpha1
from internvl_operator.resources import jobs, serving
from internvl_runtime import __main__ as runtime_main
from internvl_runtime import errors as runtime_errors
from internvl_runtime import settings as runtime_settings
from internvl_runtime.artifacts import shapes, source
from internvl_runtime.engine import folder
from internvl_runtime.store import keys as runtime_keys

ROOT = Path(__file__).parent.parent.parent
CRD = ROOT / "crds" / "internvldeployments.yaml"
FLAGS = {
    "maxBatchSize": 16, "maxSequenceTokens": 32768, "maxInputTokens": 32767,
    "maxBatchedTokens": 8192, "maxTilesPerImage": 12, "maxTilesPerRequest": 52,
}  # fmt: skip
CHECKPOINTS = [
    {"weights": "a" * 64, "dtype": "bfloat16", "quantization": "None", "tensor_parallel_size": 1},
    {"weights": "é", "dtype": "float32", "quantization": "FP8", "tensor_parallel_size": 8},
]
ENGINES = [
    {
        "checkpoint": "c" * 64, "backend": "PyTorch", "architecture": "cpu-x86_64",
        "versions": {"torch": "2.11.0"}, "build": FLAGS,
    },
    {
        "checkpoint": "d" * 64, "backend": "TensorRT", "architecture": "sm_90",
        "versions": {"tensorrt": "10.14.1.48", "tensorrt_llm": "1.2.1"}, "build": {"b": 1, "a": 2},
    },
]  # fmt: skip


@pytest.mark.parametrize("inputs", CHECKPOINTS)
def test_checkpoint_keys_are_equal(inputs):
    theirs = runtime_keys.key_of(
        runtime_keys.Kind.CHECKPOINTS, runtime_keys.checkpoint_inputs(**inputs)
    )
    release = catalog.RELEASES["PyTorch"]
    ours = operator_keys.checkpoint_key(**inputs, converter_format=release.converter_format)
    assert ours == theirs


@pytest.mark.parametrize("inputs", ENGINES)
def test_engine_keys_are_equal(inputs):
    theirs = runtime_keys.key_of(runtime_keys.Kind.ENGINES, runtime_keys.engine_inputs(**inputs))
    release = catalog.RELEASES["PyTorch"]
    assert operator_keys.engine_key(**inputs, engine_format=release.engine_format) == theirs


def test_every_reason_of_the_runtime_is_known_to_the_operator():
    theirs = {reason.value for reason in runtime_errors.Reason}
    assert theirs <= {reason.value for reason in operator_errors.Reason}


def test_exit_codes_are_equal():
    assert jobs._EXIT_FINAL == runtime_main.EXIT_FAILED
    assert diagnose._EXIT_ENGINE_INCOMPATIBLE == runtime_main.EXIT_ENGINE_INCOMPATIBLE


def test_ports_and_folders_are_equal():
    defaults = runtime_settings.Settings()
    assert (defaults.port, defaults.metrics_port) == (serving.HTTP_PORT, serving.METRICS_PORT)
    assert str(defaults.cache_root) == jobs.CACHE_FOLDER
    assert defaults.drain_seconds < serving._GRACE_SECONDS


def test_the_operator_sends_the_build_flags_that_the_runtime_reads():
    assert folder.flags_of(folder.limits_of(FLAGS)) == FLAGS
    resource = v1alpha1.Resource.model_validate(
        {
            "metadata": {"name": "x", "namespace": "y", "uid": "z"},
            "spec": {"model": {"source": {"synthetic": {"shape": "tiny", "family": "qwen2"}}}},
        }
    )
    defaults = settings.Settings(
        tools_image="t", builder_image="b", runtime_image="r", backend="PyTorch", device="CPU"
    )
    assert set(plans.make_plan(resource, defaults=defaults).build_flags) == set(FLAGS)


def test_the_catalog_has_the_runtimes_shapes_and_dimensions():
    assert set(catalog.SYNTHETIC_SHAPES) == {shapes.TINY, shapes.TINY_6B_VISION}


def test_the_bundled_models_are_those_that_the_runtime_ships():
    shipped = {path.parent.name for path in source.BUNDLED.glob("*/config.json")}
    assert set(catalog.BUNDLED_MODELS) == shipped
    for name, model in shapes.PUBLISHED.items():
        for variant in ("", "-MPO"):
            known = catalog.MODELS[name + variant]
            assert known.family == model.language.family.value
            assert known.hidden_size == model.language.hidden_size
            assert known.num_hidden_layers == model.language.num_hidden_layers


def test_the_operators_versions_are_those_of_the_lock_file():
    locked = (ROOT / "requirements" / "runtime-pytorch.txt").read_text()
    for package, version in catalog.RELEASES["PyTorch"].versions.items():
        assert re.search(rf"^{package}=={re.escape(version)}\b", locked, re.MULTILINE)


def test_the_nvidia_lock_file_leaves_the_bases_packages_alone():
    locked = (ROOT / "requirements" / "runtime-nvidia.txt").read_text()
    names = set(re.findall(r"^([a-z0-9-]+)==", locked, re.MULTILINE))
    assert not names & {"torch", "transformers", "tokenizers", "numpy", "huggingface-hub"}
    assert {"fastapi", "pillow", "sentencepiece"} <= names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda p: p.name
)
def test_lock_files_are_hashed_and_carry_no_address(path):
    text = path.read_text()
    assert "://" not in text
    pinned = [line for line in text.splitlines() if re.match(r"^[a-z0-9]", line)]
    assert all("==" in line and line.endswith("\\") for line in pinned)


def test_the_charts_crd_is_the_crd():
    copy = ROOT / "charts" / "internvl-operator" / "files" / CRD.name
    assert copy.read_text() == CRD.read_text()


def spec_schema():
    (version,) = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]["properties"]["spec"]


def assert_fields_are_equal(model, schema, path="spec"):
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    assert set(fields) == set(schema["properties"]), path
    for alias, field in fields.items():
        described = schema["properties"][alias]
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [k for k in kinds if isinstance(k, type) and issubclass(k, v1alpha1._Model)]
        if nested:
            assert_fields_are_equal(nested[0], described, f"{path}.{alias}")
        elif "default" in described:
            assert field.default == described["default"], f"{path}.{alias}"


def test_the_crds_fields_and_defaults_are_the_models():
    assert_fields_are_equal(v1alpha1.Spec, spec_schema())
