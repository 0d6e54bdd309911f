"""Attention over a paged key/value cache: the seam between kernels, and torch's own.

A cache has one tensor a layer: [blocks, 2, BLOCK_TOKENS, key/value heads, head
size], keys first. That is FlashInfer's "NHD" page layout.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

from internvl_runtime.engine import transfer
from internvl_runtime.engine.pytorch import scheduler
from internvl_runtime.engine.pytorch.block_pool import BLOCK_TOKENS
from internvl_runtime.model import tensor_parallel

Cache = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence: `start` of them are in the cache already."""

    start: int
    length: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens of the sequence once these are computed."""
        return self.start + self.length


def spans_of(step: scheduler.Step) -> list[Span]:
    """Return where the tokens of a step lie."""
    return [Span(chunk.start, chunk.length, list(chunk.sequence.blocks)) for chunk in step.chunks]


class Attention(Protocol):
    """One way to compute attention; `begin` once a step, `attend` once a layer."""

    def begin(self, spans: Sequence[Span]) -> None:
        """Take in where the tokens of a step lie."""
        ...

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Write key and value [T, key/value heads, size]; return [T, heads, size] of query."""
        ...


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where keys and values of a step's tokens are written: [T] each."""

    blocks: torch.Tensor
    places: torch.Tensor

    def write(self, store: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write keys and values [T, heads, size] of one layer."""
        store[self.blocks, 0, self.places] = key
        store[self.blocks, 1, self.places] = value


def slots_of(spans: Sequence[Span], device: torch.device) -> Slots:
    """Return where the tokens of a step are written."""
    pairs = [
        (span.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
        for span in spans
        for position in range(span.start, span.end)
    ]
    blocks, places = transfer.upload(torch.tensor(pairs), device).unbind(1)
    return Slots(blocks, places)


_ROWS_AT_ONCE = 1024
"""Queries of one product: bounds the mask, which is as wide as the sequence is long."""


class TorchAttention:
    """scaled_dot_product_attention, one sequence after the other; runs everywhere."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._device = cache[0].device

    def begin(self, spans: Sequence[Span]) -> None:
        """Take in where the tokens of a step lie."""
        self._slots = slots_of(spans, self._device)
        self._parts = [part for span in spans for part in _split(span, _ROWS_AT_ONCE)]
        self._tables = [
            transfer.upload(torch.tensor(part.blocks), self._device) for part in self._parts
        ]
        self._masks = [
            causal_mask(past=part.start, new=part.length, device=self._device)
            for part in self._parts
        ]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Write key and value [T, key/value heads, size]; return [T, heads, size] of query."""
        store = self._cache[layer]
        self._slots.write(store, key, value)
        queries = query.split([part.length for part in self._parts])
        every = zip(queries, self._parts, self._tables, self._masks, strict=True)
        return torch.cat([_attend(store, *each) for each in every])


def _split(span: Span, length: int) -> Iterator[Span]:
    for start in range(span.start, span.end, length):
        yield Span(start, min(length, span.end - start), span.blocks)


def _attend(
    store: torch.Tensor,
    query: torch.Tensor,
    span: Span,
    table: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    keys, values = store[table].transpose(0, 1).flatten(1, 2)[:, : span.end]
    mixed = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1)


def causal_mask(*, past: int, new: int, device: torch.device | None = None) -> torch.Tensor | None:
    """Return which of past + new positions each new one sees: [new, past + new], None for all."""
    if new == 1:
        return None
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(diagonal=past)


def allocate_cache(
    share: tensor_parallel.Share, blocks: int, *, dtype: torch.dtype, device: torch.device
) -> Cache:
    """Return the cache's tensors of one rank."""
    shape = (blocks, 2, BLOCK_TOKENS, share.key_value_heads, share.head_size)
    # GPU kernels mask by multiplying with zero and must not meet a NaN; on the CPU memory that
    # nobody writes to is never touched.
    create = torch.zeros if device.type == "cuda" else torch.empty
    return [create(shape, dtype=dtype, device=device) for _ in range(share.layers)]


def bytes_per_block(share: tensor_parallel.Share, dtype: torch.dtype) -> int:
    """Return the bytes of one block in all layers of one rank."""
    numbers = 2 * BLOCK_TOKENS * share.key_value_heads * share.head_size
    return numbers * share.layers * dtype.itemsize
