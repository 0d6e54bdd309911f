"""Hugging Face style InternVL2.5 checkpoints with seeded random weights.

Every tensor is a function of its name and the seed alone, so the bytes do not
depend on sharding or order; scales keep activations near one, so that greedy
tokens are decided by clear margins.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvl_runtime import errors
from internvl_runtime.artifacts import progress, safetensors_file, shapes, tensors, tokenizer_files
from internvl_runtime.model import config

FORMAT = 1
"""Raised when the bytes for equal arguments change."""
_SHARD_BYTES = 5 * 10**9
_MINIMUM_SHARDS = 2
_DTYPE = "BF16"
_MOST_THREADS = 8
"""About as many tensors are in memory at once."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What identifies a synthetic checkpoint."""

    shape: str
    family: config.Family | None
    """Needed for the tiny shapes; the published ones have theirs."""
    seed: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    name: str
    tensors: tuple[safetensors_file.TensorInfo, ...]


def write_checkpoint(
    recipe: Recipe, output: Path, *, tokenizer_model: Path, report: progress.Report
) -> None:
    """Write config.json, tokenizer files and sharded safetensors into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    model = write_small_files(recipe, output, tokenizer_model=tokenizer_model)
    shards = plan_shards(model)
    total = sum(tensor.bytes for shard in shards for tensor in shard.tensors)
    done = 0

    drawn = _draw_ahead([t for shard in shards for t in shard.tensors], seed=recipe.seed)

    def produce(tensor: safetensors_file.TensorInfo) -> bytes:
        nonlocal done
        data = next(drawn)
        done += tensor.bytes
        report(done, total)
        return data

    for shard in shards:
        safetensors_file.write(output / shard.name, shard.tensors, produce)


def write_small_files(recipe: Recipe, output: Path, *, tokenizer_model: Path) -> config.ModelConfig:
    """Write everything but the safetensors; returns the model's configuration."""
    model = _write_tokenizer(recipe, output, tokenizer_model=tokenizer_model)
    shards = plan_shards(model)
    index = {
        "metadata": {"total_size": sum(t.bytes for shard in shards for t in shard.tensors)},
        "weight_map": {t.name: shard.name for shard in shards for t in shard.tensors},
    }
    _write_json(output / "config.json", describe_config(model))
    _write_json(output / "generation_config.json", {"_from_model_config": True})
    _write_json(output / "model.safetensors.index.json", index)
    return model


def plan_shards(model: config.ModelConfig) -> list[Shard]:
    """Cut the model's tensors into files of at most 5 GB, but at least two."""
    every = [
        safetensors_file.TensorInfo(name, _DTYPE, shape)
        for name, shape in tensors.list_tensors(model)
    ]
    limit = min(_SHARD_BYTES, sum(t.bytes for t in every) // _MINIMUM_SHARDS + 1)
    groups: list[list[safetensors_file.TensorInfo]] = [[]]
    filled = 0
    for tensor in every:
        if groups[-1] and filled + tensor.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    return [
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def _draw_ahead(wanted: Sequence[safetensors_file.TensorInfo], *, seed: int) -> Iterator[bytes]:
    """Yield each tensor's bytes in order, while the next ones are drawn."""
    count = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    ahead: deque[concurrent.futures.Future[bytes]] = deque()
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        for tensor in wanted:
            ahead.append(threads.submit(_random_bf16, tensor, seed))
            if len(ahead) > count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _random_bf16(tensor: safetensors_file.TensorInfo, seed: int) -> bytes:
    digest = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))
    values = generator.standard_normal(tensor.shape, dtype=np.float32)
    mean, deviation = _distribution(tensor)
    values *= np.float32(deviation)
    values += np.float32(mean)
    return _round_to_bf16(values).tobytes()


def _distribution(tensor: safetensors_file.TensorInfo) -> tuple[float, float]:
    """Return mean and standard deviation for a tensor, by the part it plays."""
    if tensor.name.endswith((".ls1", ".ls2")):
        return 0.5, 0.1
    if tensor.name.endswith("bias"):
        return 0.0, 0.1
    if "embed" in tensor.name and "patch" not in tensor.name:
        return 0.0, 1.0
    if len(tensor.shape) == 1:
        return 1.0, 0.1
    return 0.0, float(np.prod(tensor.shape[1:])) ** -0.5


def _round_to_bf16(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, Any]:
    """Round float32 to the upper 16 bits, to nearest even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")


def _write_tokenizer(recipe: Recipe, output: Path, *, tokenizer_model: Path) -> config.ModelConfig:
    if recipe.shape in shapes.PUBLISHED:
        model = shapes.PUBLISHED[recipe.shape]
        if model.language.family is config.Family.QWEN2:
            tokenizer_files.write_real_qwen(output)
        else:
            tokenizer_files.write_real_internlm2(output, tokenizer_model)
        return model
    if recipe.shape not in {shapes.TINY, shapes.TINY_6B_VISION} or recipe.family is None:
        known: Sequence[str] = (shapes.TINY, shapes.TINY_6B_VISION, *shapes.PUBLISHED)
        raise errors.StageError(
            errors.Reason.MODEL_NOT_FOUND,
            f"there is no shape {recipe.shape!r} of family {recipe.family}",
            remedy=f"choose one of {', '.join(known)}; the tiny ones need a family",
        )
    if recipe.family is config.Family.QWEN2:
        vocab_size = tokenizer_files.write_small_qwen(output)
    else:
        vocab_size = tokenizer_files.write_small_internlm2(output)
    return shapes.tiny_model(recipe.shape, recipe.family, vocab_size=vocab_size)


def describe_config(model: config.ModelConfig) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internvl2_5",
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "force_image_size": config.TILE_SIZE,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": "bfloat16",
        "llm_config": _describe_language(model.language),
        "vision_config": _describe_vision(model.vision),
    }


def _describe_language(language: config.LanguageConfig) -> dict[str, Any]:
    is_qwen = language.family is config.Family.QWEN2
    by_family: dict[str, Any] = (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_scaling": None}
        if is_qwen
        else {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "bias": False,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        }
    )
    dimensions = dataclasses.asdict(language)
    del dimensions["family"]
    return {
        **by_family,
        **dimensions,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _describe_vision(vision: config.VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **dataclasses.asdict(vision),
        "image_size": config.TILE_SIZE,
        "patch_size": config.PATCH_SIZE,
        "hidden_act": "gelu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
