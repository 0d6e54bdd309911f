"""Our calls into TensorRT bind to the published 10.14 binding's own signatures."""

import inspect

import pytest
from internvl_doubles import tensorrt as double
from internvl_runtime import errors
from internvl_runtime.artifacts import (
    convert,
    layout,
    safetensors_file,
    shapes,
    synthesize,
    vision_engine,
)
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.model import config

VERSION = "10.14.1.48.post1"
PROFILE = vision_engine.Profile(most=26, tuned=13)


@pytest.fixture(scope="session")
def binding(tmp_path_factory):
    return double.import_binding(tmp_path_factory.mktemp("stubs"))


@pytest.fixture
def tensorrt(binding, monkeypatch):
    module = double.Module(binding)
    monkeypatch.setitem(double.sys.modules, "tensorrt", module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    published = tmp_path_factory.mktemp("published")
    recipe = synthesize.Recipe(shapes.TINY, config.Family.QWEN2, 1)
    synthesize.write_checkpoint(
        recipe, published, tokenizer_model=published, report=lambda *_: None
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    convert.write_checkpoint(published, folder, dtype="bfloat16", ranks=1, report=lambda *_: None)
    return folder


def build(checkpoint, tmp_path, report=lambda *_: None):
    output = tmp_path / builts.VISION_FILE
    vision_engine.build(
        checkpoint,
        config.read_model_config(checkpoint / "model"),
        output,
        profile=PROFILE,
        timing_cache=tmp_path / "timings" / "sm_90",
        report=report,
    )
    return output


def test_the_binding_is_the_pinned_one(binding):
    assert binding.__version__ == VERSION


def test_every_call_of_the_vision_build_binds(tensorrt, checkpoint, tmp_path):
    told = []
    output = build(checkpoint, tmp_path, lambda done, total: told.append((done, total)))

    assert output.read_bytes().startswith(double.PLAN)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (tmp_path / "timings" / "sm_90").read_bytes() == b"timings"
    assert "IOptimizationProfile.set_shape" in tensorrt.calls
    assert len(tensorrt.parsed.graph.initializer) > 40
    stored = safetensors_file.read_header(checkpoint / layout.VISION_FILE)
    assert stored.keys() <= {tensor.name for tensor in tensorrt.parsed.graph.initializer}


def test_our_progress_monitor_overrides_the_real_methods(binding, tensorrt, checkpoint, tmp_path):
    monitor = vision_engine._monitor(tensorrt, lambda *_: None)
    for name in ("phase_start", "step_complete", "phase_finish"):
        ours = list(inspect.signature(getattr(monitor, name)).parameters)
        documented = getattr(binding.IProgressMonitor, name).__doc__.splitlines()[0]
        assert (
            ours
            == [*double._parse(documented.partition("(")[2].rpartition(") ->")[0]).parameters][1:]
        )


def test_a_build_that_gives_nothing_has_a_reason(tensorrt, checkpoint, tmp_path):
    tensorrt.is_building_possible = False
    with pytest.raises(errors.StageError, match="no engine of the vision tower") as caught:
        build(checkpoint, tmp_path)
    assert caught.value.reason is errors.Reason.BUILD_FAILED


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: t.Builder("no logger"), "not ILogger"),
        (lambda t: t.Builder(t.Logger(t.Logger.WARNING)).create_network("flags"), "not int"),
        (lambda t: t.Builder(t.Logger(t.Logger.WARNING)).create_networks(), "create_networks"),
        (lambda t: t.IBuilderConfig.__new__(t.IBuilderConfig).set_timing_cache(None), "missing"),
    ],
)  # fmt: skip
def test_the_stand_in_is_strict(tensorrt, call, words):
    with pytest.raises((TypeError, AttributeError), match=words):
        call(tensorrt)
