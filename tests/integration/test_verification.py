"""An engine is published only if it computes what the published weights say."""

import itertools
from pathlib import Path

import hf_reference
import numpy as np
import nvidia_image
import pictures
import pytest
import safetensors.torch
import torch
from internvl_runtime import errors
from internvl_runtime.artifacts import (
    build,
    convert,
    progress,
    reference,
    safetensors_file,
    shapes,
    source,
    stages,
    synthesize,
)
from internvl_runtime.artifacts import checkpoint as checkpoints
from internvl_runtime.engine import device, interface
from internvl_runtime.model import config, conversation, prompt, tokenizer
from internvl_runtime.store import cache as caches
from internvl_runtime.vision import grid, tiles

LIMITS = interface.EngineLimits(
    max_sequence_tokens=2048, max_input_tokens=2047, max_batched_tokens=1024, max_batch_size=2,
    max_tiles_per_image=4, max_tiles_per_request=5,
)  # fmt: skip
TOKENS = 6


@pytest.mark.filterwarnings("default")
def test_the_streamed_forward_pass_is_that_of_transformers(checkpoint):
    model = config.read_model_config(checkpoint)
    tokens = tokenizer.load_tokenizer(checkpoint, model)
    cut = tiles.cut_tiles(pictures.draw(600, 300), grid.choose_grid(600, 300, max_tiles=4)).copy()
    loaded = hf_reference.load_reference(
        checkpoint, image_token_id=tokens.control_ids["<IMG_CONTEXT>"]
    )
    every, expected = [], []
    for parts, shown in (((conversation.Image(0), "\nWhat?"), cut), (("Hello",), None)):
        asked = [conversation.Turn(conversation.Role.USER, parts)]
        expanded = prompt.expand(conversation.render(asked), tiles=[len(cut)], tokens=tokens)
        ids = list(expanded.token_ids)
        answer, logits = hf_reference.generate_greedily(loaded, ids, shown, max_tokens=TOKENS)
        places = [p for e in expanded.placements for p in range(e.offset, e.offset + e.length)]
        none = np.empty((0, 448, 448, 3), np.uint8)
        every.append(
            reference.Asked([*ids, *answer[:-1]], places, none if shown is None else cut, TOKENS)
        )
        expected.append(logits)

    found = reference.compute(
        checkpoint,
        model,
        every,
        lanes=[reference.EXACT, reference.Lane(torch.bfloat16)],
        device=torch.device("cpu"),
        report=lambda *_: None,
    )

    for (exact, rounded), logits in zip(found, expected, strict=True):
        assert np.abs(exact.logits.numpy() - logits).max() < 1e-3
        assert 1e-3 < np.abs(rounded.logits.numpy() - logits).max() < 0.5


FAMILIES = list(config.Family)
CI = [
    (shapes.TINY, FAMILIES[0], "bfloat16", "PyTorch"),
    (shapes.TINY_6B_VISION, FAMILIES[1], "bfloat16", "PyTorch"),
    (shapes.TINY, FAMILIES[1], "bfloat16", "TensorRT"),
]
"""Towers, families, dtypes and backends of `make test`."""
FP8 = "fp8-"
ENCODINGS = [*checkpoints.DTYPES, f"{FP8}bfloat16"]
TOWERS = (shapes.TINY, shapes.TINY_6B_VISION)
EVERY = [
    case
    for case in itertools.product(TOWERS, FAMILIES, ENCODINGS, interface.OFFERED)
    # Not known to be loaded by TensorRT-LLM.
    if case[1:] != (config.Family.QWEN2, f"{FP8}bfloat16", "TensorRT")
]
LONG = [pytest.param(case, marks=pytest.mark.long) for case in EVERY if case not in CI]


@pytest.fixture(params=[*CI, *LONG], ids=lambda case: "-".join(map(str, case)))
def unbuilt(request, tmp_path, monkeypatch):
    """A cache with a checkpoint, and what to build of it."""
    shape, family, dtype, backend = request.param
    if backend == "TensorRT":
        nvidia_image.enter(monkeypatch, tmp_path / "site")
    folder = tmp_path / "published"
    synthesize.write_checkpoint(
        synthesize.Recipe(shape, family, 4), folder, tokenizer_model=Path(), report=lambda *_: None
    )
    cache = caches.Cache(tmp_path)
    stage, origin = progress.Progress("test"), source.FolderSource(folder)
    weights = stages.resolve(origin, cache=cache, stage=stage).weights
    stages.fetch(origin, weights=weights, cache=cache, stage=stage)
    converted = convert.convert(
        weights=weights,
        dtype=dtype.removeprefix(FP8),
        quantization="FP8" if dtype.startswith(FP8) else "None",
        tensor_parallel_size=1,
        cache=cache,
        stage=stage,
    )
    architecture = device.architecture()
    spec = build.EngineSpec(
        checkpoint=converted.path.name,
        backend=backend,
        architecture=architecture,
        versions=device.versions(backend, architecture),
        limits=LIMITS,
    )
    return cache, converted.path, spec


def exchange_layers(rank, _):
    first, second = (
        {n: t for n, t in rank.items() if n.startswith(f"transformer.layers.{layer}.")}
        for layer in (0, 1)
    )
    swapped = zip(first, second, strict=True)
    return {k: v for a, b in swapped for k, v in ((a, second[b]), (b, first[a]))}


def exchange_query_and_key(rank, model):
    name = "transformer.layers.0.attention.qkv.weight"
    size = model.language.head_size
    queries = model.language.num_attention_heads * size
    changed = rank[name].clone()
    changed[:size], changed[queries : queries + size] = (
        rank[name][queries : queries + size],
        rank[name][:size],
    )
    return {name: changed}


def exchange_fc_and_gate(rank, _):
    names = [f"transformer.layers.0.mlp.{part}.weight" for part in ("fc", "gate")]
    return {names[0]: rank[names[1]], names[1]: rank[names[0]]}


def zero_a_layer(vision, _):
    prefix = "vision_model.encoder.layers.1."
    return {n: torch.zeros_like(t) for n, t in vision.items() if n.startswith(prefix)}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rank0.safetensors", exchange_layers),
        ("rank0.safetensors", exchange_query_and_key),
        ("rank0.safetensors", exchange_fc_and_gate),
        ("vision.safetensors", zero_a_layer),
    ],
)
def test_a_wrong_conversion_is_not_published(unbuilt, file, damage):
    cache, checkpoint, spec = unbuilt
    held = safetensors.torch.load_file(checkpoint / file)
    model = config.read_model_config(checkpoint / "model")
    stored = safetensors_file.read_header(checkpoint / file)
    with (checkpoint / file).open("r+b") as changed:
        for name, tensor in damage(held, model).items():
            changed.seek(stored[name].offset)
            changed.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    with pytest.raises(errors.StageError, match="those of the published weights") as caught:
        build.build(spec, cache=cache, stage=progress.Progress("build"))

    assert caught.value.reason is errors.Reason.VERIFICATION_FAILED
    assert not list((cache.root / "engines").glob("*"))


def test_a_right_one_is_and_its_manifest_tells_the_differences(unbuilt):
    cache, _, spec = unbuilt

    built = build.build(spec, cache=cache, stage=progress.Progress("build"))

    told = built.manifest.provenance["verification"]
    assert [each["name"] for each in told["compared"]] == [
        "features of the image prompt",
        "log-probabilities of the image prompt",
        "log-probabilities of the text prompt",
    ]
    for each in told["compared"]:
        assert each["deviation"] < 4 * each["rounding"] + 2e-3
