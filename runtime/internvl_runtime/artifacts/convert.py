"""A Hugging Face style checkpoint to the TensorRT-LLM checkpoint layout.

Output: `config.json` and `rank0.safetensors` as TensorRT-LLM reads them, the
tower and projector with their published names in `vision.safetensors`, and the
model's own config and tokenizer files in `model/`.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_runtime import errors
from internvl_runtime.artifacts import progress, safetensors_file, source, tensors
from internvl_runtime.model import config, tokenizer
from internvl_runtime.store import cache as caches
from internvl_runtime.store import keys

if TYPE_CHECKING:
    import torch

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_VISION_PREFIXES = ("vision_model.", "mlp1.")
_NOT_COPIED = {"model.safetensors.index.json"}

Load = Callable[[str], "torch.Tensor"]
"""Returns one tensor of the source checkpoint by its published name."""


def convert(
    *,
    weights: str,
    dtype: str,
    tensor_parallel_size: int,
    cache: caches.Cache,
    stage: progress.Progress,
) -> caches.Published:
    """Publish the checkpoint of some weights in a dtype.

    Raises StageError for a dtype or tensor parallel size that is not offered.
    """
    _check_arguments(dtype, tensor_parallel_size)
    inputs = keys.checkpoint_inputs(
        weights=weights,
        dtype=dtype,
        quantization="None",
        tensor_parallel_size=tensor_parallel_size,
    )
    key = keys.key_of(keys.Kind.CHECKPOINTS, inputs)
    with cache.workspace(keys.Kind.CHECKPOINTS, key) as workspace:
        published = cache.find(keys.Kind.CHECKPOINTS, key)
        if published:
            return published
        caches.clear(workspace)
        folder = source.weights_folder(cache.get(keys.Kind.WEIGHTS, weights))
        with caches.naming_a_full_disk(cache.root):
            write_checkpoint(
                folder, workspace, dtype=dtype, report=stage.step("convert", unit="bytes")
            )
            return cache.publish(
                workspace,
                kind=keys.Kind.CHECKPOINTS,
                inputs=inputs,
                references=[caches.Reference(keys.Kind.WEIGHTS.value, weights)],
            )


def write_checkpoint(folder: Path, output: Path, *, dtype: str, report: progress.Report) -> None:
    """Convert the checkpoint in `folder`, one tensor in memory at a time."""
    model = config.read_model_config(folder)
    tokenizer.load_tokenizer(folder, model)
    _copy_small_files(folder, output / "model")
    settings = describe_checkpoint(model.language, dtype=dtype)
    (output / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    language = dict(_language_tensors(model.language))
    vision = {
        name: (shape, _load_one(name))
        for name, shape in tensors.list_tensors(model)
        if name.startswith(_VISION_PREFIXES)
    }
    with _open_tensors(folder) as load:
        total = _bytes_of(language, dtype) + _bytes_of(vision, dtype)
        counted = _counting(report, total)
        _write(output / "rank0.safetensors", language, dtype=dtype, load=load, count=counted)
        _write(output / "vision.safetensors", vision, dtype=dtype, load=load, count=counted)


def describe_checkpoint(language: config.LanguageConfig, *, dtype: str) -> dict[str, Any]:
    """Return TensorRT-LLM's config.json for one rank.

    `rotary_scaling` is null: dynamic NTK is the identity up to the 32,768
    positions that are offered, and TensorRT-LLM 1.2.1 can not read it.
    """
    by_family: dict[str, Any] = (
        {
            "architecture": "Qwen2ForCausalLM",
            "qwen_type": "qwen2",
            "attn_bias": True,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        }
        if language.family is config.Family.QWEN2
        else {
            "architecture": "InternLM2ForCausalLM",
            "attn_bias": False,
            "has_partial_lora_mask": False,
        }
    )
    return {
        **by_family,
        "dtype": dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": language.num_hidden_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "head_size": language.head_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "norm_epsilon": language.rms_norm_eps,
        "vocab_size": language.vocab_size,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": language.rope_theta,
        "rotary_scaling": None,
        "max_position_embeddings": language.max_position_embeddings,
        "hidden_act": "silu",
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    }


_Planned = tuple[tuple[int, ...], Callable[[Load], "torch.Tensor"]]


def _language_tensors(language: config.LanguageConfig) -> Iterator[tuple[str, _Planned]]:
    """Yield TensorRT-LLM's tensors: name, shape, and how to make it from the published ones."""
    names = _QWEN_NAMES if language.family is config.Family.QWEN2 else _INTERNLM2_NAMES
    hidden, inner = language.hidden_size, language.intermediate_size
    rows = (language.num_attention_heads + 2 * language.num_key_value_heads) * language.head_size
    table = (language.vocab_size, hidden)
    root = "language_model.model"
    yield "transformer.vocab_embedding.weight", (table, _load_one(f"{root}.{names['embedding']}"))
    for layer in range(language.num_hidden_layers):
        ours, theirs = f"transformer.layers.{layer}", f"{root}.layers.{layer}"
        yield f"{ours}.attention.qkv.weight", ((rows, hidden), _load_qkv(theirs, language))
        if language.has_attention_bias:
            yield f"{ours}.attention.qkv.bias", ((rows,), _concatenate(theirs, "bias"))
        for name, shape in (
            ("attention.dense", (hidden, hidden)),
            ("mlp.fc", (inner, hidden)),
            ("mlp.gate", (inner, hidden)),
            ("mlp.proj", (hidden, inner)),
            ("input_layernorm", (hidden,)),
            ("post_layernorm", (hidden,)),
        ):
            yield f"{ours}.{name}.weight", (shape, _load_one(f"{theirs}.{names[name]}.weight"))
    yield "transformer.ln_f.weight", ((hidden,), _load_one(f"{root}.norm.weight"))
    yield "lm_head.weight", (table, _load_one(f"language_model.{names['head']}"))


_QWEN_NAMES = {
    "embedding": "embed_tokens.weight",
    "attention.dense": "self_attn.o_proj",
    "mlp.fc": "mlp.gate_proj",
    "mlp.gate": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
    "head": "lm_head.weight",
}
"""TensorRT-LLM calls the activated half of the MLP `fc` and the other half `gate`."""

_INTERNLM2_NAMES = {
    "embedding": "tok_embeddings.weight",
    "attention.dense": "attention.wo",
    "mlp.fc": "feed_forward.w1",
    "mlp.gate": "feed_forward.w3",
    "mlp.proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_layernorm": "ffn_norm",
    "head": "output.weight",
}


def _load_one(name: str) -> Callable[[Load], "torch.Tensor"]:
    return lambda load: load(name)


def _concatenate(layer: str, part: str) -> Callable[[Load], "torch.Tensor"]:
    def make(load: Load) -> "torch.Tensor":
        import torch

        return torch.cat([load(f"{layer}.self_attn.{x}_proj.{part}") for x in "qkv"])

    return make


def _load_qkv(layer: str, language: config.LanguageConfig) -> Callable[[Load], "torch.Tensor"]:
    if language.family is config.Family.QWEN2:
        return _concatenate(layer, "weight")
    return lambda load: split_wqkv(load(f"{layer}.attention.wqkv.weight"), language)


def split_wqkv(wqkv: "torch.Tensor", language: config.LanguageConfig) -> "torch.Tensor":
    """Reorder InternLM2's rows, grouped by key/value head, to all q, all k, all v."""
    import torch

    heads = language.num_key_value_heads
    grouped = wqkv.view(heads, -1, language.head_size, language.hidden_size)
    parts = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
    return torch.cat([part.reshape(-1, language.hidden_size) for part in parts])


def _write(
    path: Path,
    planned: Mapping[str, _Planned],
    *,
    dtype: str,
    load: Load,
    count: Callable[[int], None],
) -> None:
    import torch

    def produce(info: safetensors_file.TensorInfo) -> bytes:
        _, make = planned[info.name]
        tensor = make(load).to(getattr(torch, dtype)).contiguous()
        count(info.bytes)
        return tensor.view(torch.uint8).numpy().tobytes()

    infos = [
        safetensors_file.TensorInfo(name, _SAFETENSORS_DTYPES[dtype], shape)
        for name, (shape, _) in planned.items()
    ]
    safetensors_file.write(path, infos, produce)


def _bytes_of(planned: Mapping[str, _Planned], dtype: str) -> int:
    code = _SAFETENSORS_DTYPES[dtype]
    return sum(
        safetensors_file.TensorInfo(name, code, shape).bytes for name, (shape, _) in planned.items()
    )


def _counting(report: progress.Report, total: int) -> Callable[[int], None]:
    done = 0

    def count(bytes_: int) -> None:
        nonlocal done
        done += bytes_
        report(done, total)

    return count


@contextlib.contextmanager
def _open_tensors(folder: Path) -> Iterator[Load]:
    """Open every shard of a checkpoint; gives a function that loads a tensor by its name."""
    import safetensors

    with contextlib.ExitStack() as stack:
        owners: dict[str, Any] = {}
        for path in folder.glob("*.safetensors"):
            file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            owners |= dict.fromkeys(file.keys(), file)
        yield lambda name: owners[name].get_tensor(name)


def _copy_small_files(folder: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        is_small = path.suffix in {".json", ".txt", ".model"}
        if is_small and path.name not in _NOT_COPIED:
            shutil.copyfile(path, output / path.name)


def _check_arguments(dtype: str, tensor_parallel_size: int) -> None:
    if dtype not in _SAFETENSORS_DTYPES:
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"dtype {dtype} is not one of {', '.join(_SAFETENSORS_DTYPES)}",
            remedy="change spec.engine.dtype",
        )
    if tensor_parallel_size != 1:
        raise errors.StageError(
            errors.Reason.INVALID_SPEC,
            f"tensor parallel size {tensor_parallel_size} is not offered by this version, only 1",
            remedy="convert with --tensor-parallel-size 1",
        )
