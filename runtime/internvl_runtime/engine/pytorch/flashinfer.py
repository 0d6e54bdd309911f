"""Attention by FlashInfer's paged kernels, on NVIDIA GPUs.

Its kernels are compiled when they are first planned, with nvcc, unless the
package `flashinfer_jit_cache` brings them along.
"""

from collections.abc import Sequence
from typing import Any

import torch

from internvl_runtime.engine.pytorch import attention
from internvl_runtime.engine.pytorch.block_pool import BLOCK_TOKENS
from internvl_runtime.model import config

HEAD_SIZES = frozenset({64, 128, 256})
"""Head sizes that its kernels are made for."""
DTYPES = frozenset({torch.float16, torch.bfloat16})
_WORKSPACE_BYTES = 256 * 2**20
"""Split-KV partial results; FlashInfer's documentation recommends 128 MiB at least."""


class FlashInferAttention:
    """One wrapper for steps with pieces of prompts, one for steps of single tokens."""

    def __init__(self, cache: attention.Cache, language: config.LanguageConfig) -> None:
        import flashinfer

        self._cache = cache
        self._language = language
        self._device = cache[0].device
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        self._mixed: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._decode: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )

    def begin(self, spans: Sequence[attention.Span]) -> None:
        """Take in where the tokens of a step lie, and plan the kernels."""
        self._slots = attention.slots_of(spans, self._device)
        tables = [span.blocks[: -(-span.end // BLOCK_TOKENS)] for span in spans]
        pages = self._int32([block for table in tables for block in table])
        starts = self._starts([len(table) for table in tables])
        ends = self._int32([(span.end - 1) % BLOCK_TOKENS + 1 for span in spans])
        heads = (
            self._language.num_attention_heads,
            self._language.num_key_value_heads,
            self._language.head_size,
        )
        dtype = self._cache[0].dtype
        if all(span.length == 1 for span in spans):
            self._wrapper = self._decode
            self._decode.plan(
                starts, pages, ends, *heads, BLOCK_TOKENS, q_data_type=dtype, kv_data_type=dtype
            )
        else:
            self._wrapper = self._mixed
            self._mixed.plan(
                self._starts([span.length for span in spans]), starts, pages, ends, *heads,
                BLOCK_TOKENS, causal=True, q_data_type=dtype, kv_data_type=dtype,
            )  # fmt: skip

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Write key and value [T, key/value heads, size]; return [T, heads, size] of query."""
        store = self._cache[layer]
        self._slots.write(store, key, value)
        mixed: torch.Tensor = self._wrapper.run(query, store)
        return mixed

    def _int32(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32).to(self._device, non_blocking=True)

    def _starts(self, lengths: list[int]) -> torch.Tensor:
        counts = torch.tensor([0, *lengths], dtype=torch.int32)
        return counts.cumsum(0, dtype=torch.int32).to(self._device, non_blocking=True)


def fits(language: config.LanguageConfig, *, dtype: torch.dtype) -> bool:
    """Whether FlashInfer has kernels for a model."""
    return language.head_size in HEAD_SIZES and dtype in DTYPES
