"""What the files of a rank checkpoint hold, and which published tensors it is made from.

Names and cuts are those of TensorRT-LLM 1.2 (`tensorrt_llm/models/{qwen,llama}`);
tower and projector keep their published names in a file of their own.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from internvl_runtime.artifacts import safetensors_file, tensors
from internvl_runtime.model import config, tensor_parallel

FP8 = "F8_E4M3"
VISION_FILE = "vision.safetensors"
_VISION_PREFIXES = ("vision_model.", "mlp1.")

Array = npt.NDArray[Any]
Cut = Callable[[Sequence[Array]], Iterable[Array]]
"""Makes the parts of all ranks, in their order, from published tensors."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How values are stored."""

    dtype: str
    """Of safetensors: `F32`, `F16`, `BF16`."""
    fp8: bool = False
    """Whether the weights of the decoder's products are FP8 (E4M3), with a float32 scale a row."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of which each file of a layout has one part."""

    name: str
    shape: tuple[int, ...]
    """Of one part."""
    sources: tuple[str, ...]
    """Names of published tensors."""
    cut: Cut
    is_product: bool = False
    """Whether it is the weight (out, in) of one of the decoder's products."""

    def infos(self, encoding: Encoding) -> list[safetensors_file.TensorInfo]:
        """Return how one part is stored: itself, and its rows' scales where it is quantized."""
        if not (self.is_product and encoding.fp8):
            return [safetensors_file.TensorInfo(self.name, encoding.dtype, self.shape)]
        return [
            safetensors_file.TensorInfo(self.name, FP8, self.shape),
            safetensors_file.TensorInfo(scale_name(self.name), "F32", self.shape[:1]),
        ]


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors that are converted together: all of them are there after a kill, or none counts."""

    name: str
    tensors: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Files with equal headers, and what lies in them."""

    files: tuple[str, ...]
    groups: tuple[Group, ...]

    def infos(self, encoding: Encoding) -> list[safetensors_file.TensorInfo]:
        """Return what each file holds, in its order."""
        tensors = (tensor for group in self.groups for tensor in group.tensors)
        return [info for tensor in tensors for info in tensor.infos(encoding)]

    def size(self, encoding: Encoding) -> int:
        """Return the bytes of all tensors of all files."""
        return len(self.files) * sum(info.bytes for info in self.infos(encoding))


def scale_name(weight: str) -> str:
    """Return TensorRT-LLM's name of the scales of a quantized weight."""
    return weight.removesuffix("weight") + "per_channel_scale"


def layouts(model: config.ModelConfig, ranks: int) -> tuple[Layout, Layout]:
    """Return the layouts of the language model's rank files and of the vision file."""
    share = tensor_parallel.share(model.language, ranks)
    language = Layout(
        tuple(f"rank{rank}.safetensors" for rank in range(ranks)),
        tuple(_language_groups(model.language, share)),
    )
    return language, Layout((VISION_FILE,), tuple(_vision_groups(model)))


def _vision_groups(model: config.ModelConfig) -> Iterator[Group]:
    """Yield a group for each layer of the tower, and one for what lies before and behind them."""
    groups: dict[str, list[Tensor]] = {}
    for name, shape in tensors.list_tensors(model):
        if name.startswith(_VISION_PREFIXES):
            part, is_layer, rest = name.partition(".encoder.layers.")
            number = rest.partition(".")[0]
            group = f"vision layer {number}" if is_layer else part.partition(".")[0]
            groups.setdefault(group, []).append(Tensor(name, shape, (name,), _copies(1)))
    for group, own in groups.items():
        yield Group(group, tuple(own))


def _language_groups(
    language: config.LanguageConfig, share: tensor_parallel.Share
) -> Iterator[Group]:
    names = _QWEN_NAMES if language.family is config.Family.QWEN2 else _INTERNLM2_NAMES
    hidden, root = language.hidden_size, "language_model.model"
    copies = _copies(share.ranks)
    embedding = Tensor(
        "transformer.vocab_embedding.weight",
        (language.vocab_size, hidden),
        (f"{root}.{names['embedding']}",),
        copies,
    )
    yield Group("embedding", (embedding,))
    for layer in range(language.num_hidden_layers):
        yield Group(f"layer {layer}", tuple(_layer_tensors(language, share, layer)))
    norm = Tensor("transformer.ln_f.weight", (hidden,), (f"{root}.norm.weight",), copies)
    head = Tensor(
        "lm_head.weight",
        (share.vocabulary_rows, hidden),
        (f"language_model.{names['head']}",),
        _padded_rows(share.vocabulary_rows, share.ranks),
    )
    yield Group("head", (norm, head))


def _layer_tensors(
    language: config.LanguageConfig, share: tensor_parallel.Share, layer: int
) -> Iterator[Tensor]:
    is_qwen = language.family is config.Family.QWEN2
    names = _QWEN_NAMES if is_qwen else _INTERNLM2_NAMES
    ours, theirs = f"transformer.layers.{layer}", f"language_model.model.layers.{layer}"
    hidden, inner = language.hidden_size, share.intermediate_size
    mixed = share.heads * language.head_size
    rows = mixed + 2 * share.key_value_heads * language.head_size
    weight, bias = (
        tuple(f"{theirs}.self_attn.{x}_proj.{part}" for x in "qkv") for part in ("weight", "bias")
    )
    cut_qkv = _heads(language, share)
    if is_qwen:
        yield Tensor(
            f"{ours}.attention.qkv.weight", (rows, hidden), weight, cut_qkv, is_product=True
        )
        yield Tensor(f"{ours}.attention.qkv.bias", (rows,), bias, cut_qkv)
    else:
        fused = f"{theirs}.attention.wqkv.weight"
        cut_fused = _fused_heads(language, share)
        yield Tensor(
            f"{ours}.attention.qkv.weight", (rows, hidden), (fused,), cut_fused, is_product=True
        )
    for name, shape, cut in (
        ("attention.dense", (hidden, mixed), _columns(share.ranks)),
        ("mlp.fc", (inner, hidden), _rows(share.ranks)),
        ("mlp.gate", (inner, hidden), _rows(share.ranks)),
        ("mlp.proj", (hidden, inner), _columns(share.ranks)),
        ("input_layernorm", (hidden,), _copies(share.ranks)),
        ("post_layernorm", (hidden,), _copies(share.ranks)),
    ):
        published = f"{theirs}.{names[name]}.weight"
        yield Tensor(f"{ours}.{name}.weight", shape, (published,), cut, is_product=len(shape) > 1)


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


def _copies(ranks: int) -> Cut:
    return lambda sources: [*sources] * ranks


def _rows(ranks: int) -> Cut:
    return lambda sources: np.split(sources[0], ranks, axis=0)


def _columns(ranks: int) -> Cut:
    return lambda sources: np.split(sources[0], ranks, axis=1)


def _padded_rows(rows: int, ranks: int) -> Cut:
    """Cut [at most rows * ranks, columns], filling up the end with zeros."""

    def cut(sources: Sequence[Array]) -> Iterator[Array]:
        (whole,) = sources
        for rank in range(ranks):
            part = whole[rank * rows : (rank + 1) * rows]
            missing = rows - len(part)
            yield np.pad(part, ((0, missing), (0, 0))) if missing else part

    return cut


def _heads(language: config.LanguageConfig, share: tensor_parallel.Share) -> Cut:
    """Cut q, k and v ([heads * head size, ...] each) by heads, and join those of each rank."""
    copies = share.ranks * share.key_value_heads // language.num_key_value_heads

    def by_rank(rows: Array, copies: int) -> list[Array]:
        heads = rows.reshape(-1, language.head_size, *rows.shape[1:])
        return np.split(np.repeat(heads, copies, axis=0) if copies > 1 else heads, share.ranks)

    def cut(sources: Sequence[Array]) -> Iterator[Array]:
        query, key, value = sources
        parts = by_rank(query, 1), by_rank(key, copies), by_rank(value, copies)
        for own in zip(*parts, strict=True):
            joined = np.concatenate(own)
            yield joined.reshape(-1, *joined.shape[2:])

    return cut


def _fused_heads(language: config.LanguageConfig, share: tensor_parallel.Share) -> Cut:
    """Cut InternLM2's wqkv, whose rows come by key/value head: its queries, its key, its value."""
    cut = _heads(language, share)

    def cut_fused(sources: Sequence[Array]) -> Iterable[Array]:
        (fused,) = sources
        columns = fused.shape[1]
        heads = fused.reshape(language.num_key_value_heads, -1, language.head_size, columns)
        parts = heads[:, :-2], heads[:, -2], heads[:, -1]
        return cut([part.reshape(-1, columns) for part in parts])

    return cut_fused
