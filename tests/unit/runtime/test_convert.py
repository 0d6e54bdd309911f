import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from internvl_runtime import errors
from internvl_runtime.artifacts import (
    convert,
    journal,
    layout,
    shapes,
    synthesize,
    tensor_stream,
)
from internvl_runtime.model import config, tensor_parallel

NO_FILE = Path("absent")
FAMILIES = list(config.Family)
SIZES = (1, 2, 4, 8)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    recipe = synthesize.Recipe(shapes.TINY, request.param, 1)
    synthesize.write_checkpoint(recipe, folder, tokenizer_model=NO_FILE, report=lambda *_: None)
    return folder


@pytest.fixture
def output(tmp_path):
    return new(tmp_path / "out")


def new(folder):
    folder.mkdir()
    return folder


def write(checkpoint, output, *, dtype="float32", ranks=1):
    convert.write_checkpoint(checkpoint, output, dtype=dtype, ranks=ranks, report=lambda *_: None)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(paths):
    return {k: v for path in paths for k, v in safetensors.torch.load_file(path).items()}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def published_qkv(theirs, language, layer):
    """Return q, k and v [heads, head size, hidden] by the published forward pass."""
    root = f"language_model.model.layers.{layer}"
    size, shared = language.head_size, language.num_key_value_heads
    if language.family is config.Family.QWEN2:
        parts = [theirs[f"{root}.self_attn.{x}_proj.weight"] for x in "qkv"]
        return [part.unflatten(0, (-1, size)) for part in parts]
    fused = theirs[f"{root}.attention.wqkv.weight"].unflatten(0, (shared, -1, size))
    return [fused[:, :-2].flatten(0, 1), fused[:, -2], fused[:, -1]]


@pytest.mark.parametrize("ranks", SIZES)
def test_ranks_hold_their_heads_and_their_part_of_the_mlp(checkpoint, output, ranks):
    write(checkpoint, output, ranks=ranks)

    theirs = {k: v.float() for k, v in load(checkpoint.glob("*.safetensors")).items()}
    language = config.read_model_config(checkpoint).language
    every = [load([output / f"rank{rank}.safetensors"]) for rank in range(ranks)]
    query, key, value = published_qkv(theirs, language, 1)
    heads, shared = language.num_attention_heads, language.num_key_value_heads
    for rank, ours in enumerate(every):
        own = range(rank * heads // ranks, (rank + 1) * heads // ranks)
        # A rank has the key/value heads that its query heads look at, in their order.
        seen = sorted({head * shared // heads for head in own})
        expected = torch.cat([query[list(own)], key[seen], value[seen]]).flatten(0, 1)
        assert torch.equal(ours["transformer.layers.1.attention.qkv.weight"], expected)
    is_qwen = language.family is config.Family.QWEN2
    names = ("gate_proj", "up_proj", "down_proj") if is_qwen else ("w1", "w3", "w2")
    mlp = "mlp" if is_qwen else "feed_forward"
    for ours, name, dim in zip(("fc", "gate", "proj"), names, (0, 0, 1), strict=True):
        joined = torch.cat([r[f"transformer.layers.1.mlp.{ours}.weight"] for r in every], dim)
        assert torch.equal(joined, theirs[f"language_model.model.layers.1.{mlp}.{name}.weight"])
    head = torch.cat([ours["lm_head.weight"] for ours in every])
    published = theirs[f"language_model.{'lm_head' if is_qwen else 'output'}.weight"]
    assert len(head) == -(-language.vocab_size // ranks) * ranks
    assert torch.equal(head[: language.vocab_size], published)
    assert not head[language.vocab_size :].any()


@pytest.mark.parametrize("ranks", SIZES)
def test_config_json_describes_the_ranks_and_the_whole_model(checkpoint, output, ranks):
    write(checkpoint, output, ranks=ranks)

    described = json.loads((output / "config.json").read_text())
    assert described["mapping"] == {"world_size": ranks, "tp_size": ranks, "pp_size": 1}
    assert described["num_key_value_heads"] == 2
    assert described["rotary_scaling"] is None
    files = {path.name for path in output.glob("*.safetensors")}
    assert files == {f"rank{rank}.safetensors" for rank in range(ranks)} | {"vision.safetensors"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_rounded_as_torch_does_and_twice_gives_equal_bytes(checkpoint, tmp_path, dtype):
    outputs = new(tmp_path / "one"), new(tmp_path / "two")
    for output in outputs:
        write(checkpoint, output, dtype=dtype, ranks=2)

    theirs = load(checkpoint.glob("*.safetensors"))
    ours = load([outputs[0] / "vision.safetensors"])
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(getattr(torch, dtype)))
    assert contents(outputs[0]) == contents(outputs[1])


def test_tensor_parallel_sizes_of_the_published_models():
    sizes = {
        name: tensor_parallel.legal_sizes(model.language)
        for name, model in shapes.PUBLISHED.items()
    }
    assert sizes.pop("InternVL2_5-1B") == [1, 2]
    assert {tuple(each) for each in sizes.values()} == {SIZES}


def test_a_size_that_does_not_fit_is_refused_with_those_that_do(checkpoint, output):
    with pytest.raises(errors.StageError, match="tensor parallel size 3") as caught:
        write(checkpoint, output, ranks=3)
    assert caught.value.remedy == "use one of 1, 2, 4, 8"


def test_a_value_that_float16_can_not_hold_is_named(checkpoint, tmp_path):
    theirs = load(checkpoint.glob("*.safetensors"))
    theirs["mlp1.1.weight"][3, 3] = 1e6
    broken = new(tmp_path / "broken")
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    safetensors.torch.save_file(theirs, broken / "model.safetensors")

    with pytest.raises(errors.StageError, match=r"mlp1\.1\.weight has values that float16"):
        write(broken, new(tmp_path / "out"), dtype="float16")


class KilledError(Exception):
    """Stands for the end of the process."""


def test_after_a_stop_anywhere_the_rest_is_done_and_nothing_twice(
    checkpoint, tmp_path, monkeypatch
):
    whole = new(tmp_path / "whole")
    write(checkpoint, whole, ranks=2)
    model = config.read_model_config(checkpoint)
    groups = [g.name for files in layout.layouts(model, 2) for g in files.groups]
    stopped, done = new(tmp_path / "stopped"), []
    rng = random.Random(3)
    add, original = journal.Journal.add, tensor_stream.Writer.write

    def recorded(self, *names):
        done.extend(names)
        add(self, *names)

    def deadly(self, name, parts):
        if rng.random() < 0.08:
            raise KilledError
        original(self, name, parts)

    monkeypatch.setattr(journal.Journal, "add", recorded)
    monkeypatch.setattr(tensor_stream.Writer, "write", deadly)
    tries = 1
    while True:
        try:
            digests = convert.write_checkpoint(
                checkpoint, stopped, dtype="float32", ranks=2, report=lambda *_: None
            )
            break
        except KilledError:
            tries += 1

    assert tries > 2
    assert digests == {path.name: sha256(path) for path in stopped.glob("*.safetensors")}
    assert done == groups
    assert contents(stopped) == contents(whole)


def test_a_torn_line_of_the_journal_does_not_count(tmp_path):
    path = tmp_path / "journal"
    path.write_text("layer 0\nlayer")
    opened = journal.Journal(path)
    assert opened.done == {"layer 0"}
    opened.add("layer 1", "layer 2")
    assert journal.Journal(path).done == {"layer 0", "layer 1", "layer 2"}


def test_a_shard_that_is_cut_short_is_named(checkpoint, tmp_path):
    broken = new(tmp_path / "broken")
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    shard = max(broken.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size - 100)

    with pytest.raises(errors.StageError, match="ends within it") as caught:
        write(broken, new(tmp_path / "out"))
    assert caught.value.reason is errors.Reason.DIGEST_MISMATCH


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_has_a_scale_for_each_row_of_each_rank(checkpoint, tmp_path, ranks):
    whole, packed = new(tmp_path / "whole"), new(tmp_path / "fp8")
    write(checkpoint, whole, dtype="bfloat16", ranks=ranks)
    convert.write_checkpoint(
        checkpoint, packed, dtype="bfloat16", quantization="FP8", ranks=ranks,
        report=lambda *_: None,
    )  # fmt: skip

    described = json.loads((packed / "config.json").read_text())
    assert described["quantization"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    for rank in range(ranks):
        ours, wide = (load([folder / f"rank{rank}.safetensors"]) for folder in (packed, whole))
        quantized = {name for name, tensor in ours.items() if tensor.dtype is torch.float8_e4m3fn}
        assert len(quantized) == 5 * config.read_model_config(checkpoint).language.num_hidden_layers
        for name in quantized:
            scales = ours[name.replace("weight", "per_channel_scale")]
            # The rule of TensorRT-LLM, by torch.
            rows = wide[name].float()
            expected = (rows.abs().amax(1) / 448).clamp(min=1 / (448 * 512))
            assert torch.equal(scales, expected)
            assert torch.equal(ours[name], (rows / expected[:, None]).to(torch.float8_e4m3fn))
        for name in wide.keys() - quantized:
            assert torch.equal(ours[name], wide[name])
