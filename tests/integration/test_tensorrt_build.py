"""The TensorRT build, with strict doubles of `tensorrt` and `trtllm-build`."""

import importlib
import json
import os

import nvidia_image
import pytest
import safetensors.torch
from internvl_doubles import trtllm_build
from internvl_runtime import errors
from internvl_runtime.artifacts import (
    convert,
    journal,
    progress,
    shapes,
    synthesize,
    tensorrt_build,
)
from internvl_runtime.engine import interface
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.model import config

LIMITS = interface.EngineLimits(
    max_sequence_tokens=32768, max_input_tokens=32767, max_batched_tokens=8192, max_batch_size=4,
    max_tiles_per_image=12, max_tiles_per_request=26,
)  # fmt: skip
RANKS = 2


@pytest.fixture(autouse=True)
def doubles(tmp_path, monkeypatch):
    nvidia_image.enter(monkeypatch, tmp_path / "site")
    return importlib.import_module("tensorrt")


@pytest.fixture(params=list(config.Family), ids=str)
def checkpoint(request, tmp_path):
    published = tmp_path / "published"
    recipe = synthesize.Recipe(shapes.TINY, request.param, 1)
    synthesize.write_checkpoint(
        recipe, published, tokenizer_model=published, report=lambda *_: None
    )
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    convert.write_checkpoint(
        published, folder, dtype="bfloat16", ranks=RANKS, report=lambda *_: None
    )
    return folder


def build(checkpoint, tmp_path, quantization="None"):
    workspace = tmp_path / "workspace"
    workspace.mkdir(exist_ok=True)
    told = tensorrt_build.build(
        checkpoint,
        config.read_model_config(checkpoint / "model"),
        workspace,
        LIMITS,
        dtype="bfloat16",
        quantization=quantization,
        ranks=RANKS,
        built=journal.Journal(workspace / "journal"),
        timings=tmp_path / "timings",
        stage=progress.Progress("build"),
    )
    return workspace, told


def test_the_folder_holds_every_ranks_engine_and_the_towers(checkpoint, tmp_path, capfd):
    workspace, told = build(checkpoint, tmp_path)

    names = {p.relative_to(workspace).as_posix() for p in workspace.rglob("*") if p.is_file()}
    assert names == {
        "vision.engine", "language/config.json", "language/rank0.engine", "language/rank1.engine",
        "journal",
    }  # fmt: skip
    for rank in range(RANKS):
        engine = (workspace / f"language/rank{rank}.engine").read_bytes()
        assert engine.startswith(trtllm_build.MAGIC)
        own = (checkpoint / f"rank{rank}.safetensors").read_bytes()
        assert engine.removeprefix(trtllm_build.MAGIC) == own
    written = json.loads((workspace / "language/config.json").read_text())
    assert written["build_config"]["max_prompt_embedding_table_size"] == 4 * 26 * 256
    assert told["visionProfile"] == [(1, 3, 448, 448), (13, 3, 448, 448), (26, 3, 448, 448)]
    out = capfd.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"schema"')]
    ranks_done = [line["done"] for line in lines if line["step"] == "language"]
    assert ranks_done[0] == 0
    assert ranks_done[-1] == RANKS
    assert "Engine serialized" in out


def test_what_was_built_is_not_built_again(checkpoint, tmp_path, doubles, monkeypatch):
    monkeypatch.setenv("TRTLLM_BUILD_FAILS", "gpu-memory")
    with pytest.raises(errors.StageError, match="OutOfMemory") as caught:
        build(checkpoint, tmp_path)
    assert caught.value.reason is errors.Reason.OUT_OF_GPU_MEMORY
    before = (tmp_path / "workspace" / builts.VISION_FILE).stat().st_mtime_ns
    monkeypatch.delenv("TRTLLM_BUILD_FAILS")
    doubles.calls.clear()

    workspace, _ = build(checkpoint, tmp_path)

    assert (workspace / builts.VISION_FILE).stat().st_mtime_ns == before
    assert not doubles.calls
    assert (workspace / "language/rank1.engine").exists()


def remove_a_tensor(folder):
    path = folder / "rank1.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["transformer.layers.0.mlp.fc.weight"]
    safetensors.torch.save_file(tensors, path)


def cut_short(folder):
    path = folder / "rank0.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def remove_a_rank(folder):
    (folder / "rank1.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words", "reason"),
    [
        (remove_a_tensor, "Required but not provided", errors.Reason.DIGEST_MISMATCH),
        (cut_short, "incomplete metadata", errors.Reason.DIGEST_MISMATCH),
        (remove_a_rank, "rank1.safetensors", errors.Reason.DIGEST_MISMATCH),
    ],
)
def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path, damage, words, reason):
    damage(checkpoint)
    with pytest.raises(errors.StageError, match=words) as caught:
        build(checkpoint, tmp_path)
    assert caught.value.reason is reason


def test_an_image_without_the_program_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(errors.StageError, match="no trtllm-build") as caught:
        build(checkpoint, tmp_path)
    assert caught.value.reason is errors.Reason.INCOMPATIBLE_VERSIONS


def test_fp8_is_built_for_the_family_that_is_known_to_load_and_refused_for_the_other(
    checkpoint, tmp_path
):
    model = config.read_model_config(checkpoint / "model")
    folder = tmp_path / "fp8"
    folder.mkdir()
    convert.write_checkpoint(
        tmp_path / "published", folder, dtype="bfloat16", quantization="FP8", ranks=RANKS,
        report=lambda *_: None,
    )  # fmt: skip

    if model.language.family is config.Family.INTERNLM2:
        workspace, _ = build(folder, tmp_path, quantization="FP8")
        assert (workspace / "language/rank1.engine").exists()
    else:
        with pytest.raises(errors.StageError, match="no published source") as caught:
            build(folder, tmp_path, quantization="FP8")
        assert caught.value.reason is errors.Reason.INVALID_SPEC
