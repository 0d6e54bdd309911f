"""Attention by FlashInfer's paged kernels, on NVIDIA GPUs.

A build compiles its kernels (`list_modules`), serving loads them (`use_packed`).
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from internvl_runtime.engine.pytorch import attention
from internvl_runtime.engine.pytorch.block_pool import BLOCK_TOKENS
from internvl_runtime.model import tensor_parallel

HEAD_SIZES = frozenset({64, 128, 256})
"""Head sizes that its kernels are made for."""
DTYPES = frozenset({torch.float16, torch.bfloat16})
_WORKSPACE_BYTES = 256 * 2**20
"""Split-KV partial results; FlashInfer's documentation recommends 128 MiB at least."""


class _Wrappers:
    """One for steps with pieces of prompts, one for steps of single tokens."""

    def __init__(self, workspace: torch.Tensor) -> None:
        import flashinfer

        self.mixed: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self.decode: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )


class FlashInferAttention:
    """Plans each step's kernels on the host, and runs them on the device."""

    def __init__(self, cache: attention.Cache, share: tensor_parallel.Share) -> None:
        self._cache = cache
        self._share = share
        self._device = cache[0].device
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        # A plan is copied from the wrapper's memory behind the step in front, which may still
        # run: it must not be written over by the next one.
        self._turns = itertools.cycle([_Wrappers(workspace), _Wrappers(workspace)])

    def begin(self, spans: Sequence[attention.Span]) -> None:
        """Take in where the tokens of a step lie, and plan the kernels."""
        self._slots = attention.slots_of(spans, self._device)
        wrappers = next(self._turns)
        tables = [span.blocks[: -(-span.end // BLOCK_TOKENS)] for span in spans]
        pages = (
            _starts([len(table) for table in tables]),
            _int32([block for table in tables for block in table]),
            _int32([(span.end - 1) % BLOCK_TOKENS + 1 for span in spans]),
        )
        heads = self._share.heads, self._share.key_value_heads, self._share.head_size
        dtype = self._cache[0].dtype
        dtypes = {"q_data_type": dtype, "kv_data_type": dtype}
        if all(span.length == 1 for span in spans):
            self._wrapper = wrappers.decode
            self._wrapper.plan(*pages, *heads, BLOCK_TOKENS, **dtypes)
        else:
            self._wrapper = wrappers.mixed
            lengths = _starts([span.length for span in spans])
            self._wrapper.plan(lengths, *pages, *heads, BLOCK_TOKENS, causal=True, **dtypes)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Write key and value [T, key/value heads, size]; return [T, heads, size] of query."""
        store = self._cache[layer]
        self._slots.write(store, key, value)
        mixed: torch.Tensor = self._wrapper.run(query, store)
        return mixed


def _int32(numbers: Sequence[int]) -> torch.Tensor:
    """Return a tensor of the host, where plans are made, that copies without a wait."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=True)


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    return _int32(list(itertools.accumulate(lengths, initial=0)))


def list_modules(share: tensor_parallel.Share, *, dtype: torch.dtype) -> list[Any]:
    """Return FlashInfer's description of each module that `FlashInferAttention` loads."""
    if not fits(share, dtype=dtype):
        return []
    from flashinfer import utils
    from flashinfer.jit import attention as modules

    positions = utils.PosEncodingMode["NONE"].value
    mixed = utils.determine_attention_backend(
        torch.device("cuda"), positions, False, False, dtype, dtype
    )
    # Products of one token a sequence are those of FA2 on every GPU.
    return [
        modules.gen_batch_prefill_module(
            backend, dtype, dtype, dtype, torch.int32, share.head_size, share.head_size, positions,
            False, False, False,
        )
        for backend in dict.fromkeys([mixed, "fa2"])
    ]  # fmt: skip


def use_packed(folder: Path) -> None:
    """Load compiled modules, `<name>/<name>.so`, from a folder from now on, and compile none."""
    from flashinfer.jit import env

    os.environ["FLASHINFER_DISABLE_JIT"] = "1"
    env.FLASHINFER_AOT_DIR = folder


def fits(share: tensor_parallel.Share, *, dtype: torch.dtype) -> bool:
    """Whether FlashInfer has kernels for a model."""
    return share.head_size in HEAD_SIZES and dtype in DTYPES
