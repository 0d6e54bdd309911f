"""Loads a rank checkpoint into an engine, and gives the cache the memory that is left."""

import dataclasses
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from internvl_runtime import errors
from internvl_runtime.engine import gallery, interface, pixels, stepping
from internvl_runtime.engine.pytorch import (
    attention,
    block_pool,
    core,
    flashinfer,
    following,
    language,
    ranks,
    runner,
    sampler,
    scheduler,
    vision,
    weights,
)
from internvl_runtime.model import config, tensor_parallel

logger = logging.getLogger(__name__)

_TILES_PER_PASS = {"cpu": 8, "cuda": 64}
"""Tiles in one pass of the tower: enough to fill the device, few enough to hold."""
_WAITING_TILES = 512
"""Tiles that may wait for the tower: 294 MiB."""
_CPU_CACHE_BYTES = 4 * 2**30
_GPU_MEMORY_SHARE = 0.92
"""Of the GPU's memory that may be in use; the rest is for the allocator's fragments."""
_MORE_MEMORY = (
    "raise INTERNVL_RUNTIME_KV_CACHE_BYTES or the pod's memory, or build the engine with a smaller "
    "maxSequenceTokens"
)
_MORE_GPU_MEMORY = (
    "raise INTERNVL_RUNTIME_KV_CACHE_BYTES if it is set, build the engine with a smaller "
    "maxSequenceTokens or maxBatchedTokens, raise tensorParallelSize, or use a larger GPU"
)
_SAMPLED = sampler.Row(
    sampling=interface.Sampling(max_tokens=1, top_p=0.9, log_probabilities=20),
    origin="dry run",
    position=0,
)
"""A row of logits that takes much memory to choose from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the settings say about an engine in a process."""

    kv_cache_bytes: int = 0
    """Most bytes of the key/value cache; 0: 4 GiB on a CPU, what is free on a GPU."""
    lag: int | None = None
    """Steps that are given to the device before the tokens of an earlier one are fetched; None: one
    on a GPU, none on a CPU."""
    picture_cache_bytes: int = 512 * 2**20
    """Bytes of picture features that stay for the next request."""


def load_engine(
    checkpoint: Path,
    model: config.ModelConfig,
    limits: interface.EngineLimits,
    *,
    options: Options,
    device: str = "cpu",
    kernels: Path | None = None,
    load_picture: stepping.LoadPicture | None = None,
    group: ranks.Distributed | None = None,
) -> core.Engine:
    """Load a checkpoint, with the compiled modules in the folder `kernels`.

    As rank 0 of a `group`, where there is one, whose other ranks `follow`. Raises StageError when
    the memory is too small for one request.
    """
    place = _place(device)
    tower = vision.VisionTower(
        model.vision, weights.load_weights(checkpoint / "vision.safetensors", place)
    )
    decoder = _load_decoder(checkpoint, model, limits, place, kernels=kernels, group=group)
    leader = following.Leader(group) if group else None
    step_limits = scheduler.Limits(
        max_batch_size=limits.max_batch_size,
        max_batched_tokens=max(limits.max_batched_tokens, limits.max_batch_size),
    )
    tiles_per_pass = _TILES_PER_PASS[place.type]

    def create_runner(blocks: int) -> runner.Runner:
        if leader:
            leader.allocate(blocks)
        return runner.Runner(
            tower,
            decoder,
            _create_attention(decoder, blocks),
            tiles_per_pass=tiles_per_pass,
            leader=leader,
        )

    blocks = _count_blocks(limits, decoder, options, step_limits, create_runner, leader)
    logger.info(
        "the key/value cache has %d blocks: %d tokens", blocks, blocks * block_pool.BLOCK_TOKENS
    )
    return core.Engine(
        create_runner(blocks),
        step_limits,
        block_pool.BlockPool(blocks),
        gallery.Gallery(
            max_feature_bytes=options.picture_cache_bytes, max_waiting_tiles=_WAITING_TILES
        ),
        load=load_picture or _load_nothing,
        lag=int(place.type == "cuda") if options.lag is None else options.lag,
        max_sequence_tokens=limits.max_sequence_tokens,
        close=leader.stop if leader else None,
    )


def follow(
    checkpoint: Path,
    model: config.ModelConfig,
    limits: interface.EngineLimits,
    *,
    device: str = "cpu",
    kernels: Path | None = None,
    group: ranks.Distributed,
) -> None:
    """Load a rank's share, and do what rank 0 tells until it stops."""
    place = _place(device)
    decoder = _load_decoder(checkpoint, model, limits, place, kernels=kernels, group=group)
    following.follow(
        group,
        decoder,
        lambda blocks: _create_attention(decoder, blocks),
        lambda blocks: _free_bytes(decoder, blocks),
    )


def _place(device: str) -> torch.device:
    """Return the device with its number: safetensors takes `cuda` for the first GPU."""
    if device == "cuda":
        return torch.device(device, torch.cuda.current_device())
    return torch.device(device)


def _load_decoder(
    checkpoint: Path,
    model: config.ModelConfig,
    limits: interface.EngineLimits,
    place: torch.device,
    *,
    kernels: Path | None,
    group: ranks.Distributed | None,
) -> language.LanguageModel:
    if kernels:
        flashinfer.use_packed(kernels)
    rank = group.rank if group else 0
    return language.LanguageModel(
        model.language,
        weights.load_weights(checkpoint / f"rank{rank}.safetensors", place),
        max_tokens=max(limits.max_sequence_tokens, limits.max_batched_tokens),
        group=group or ranks.ALONE,
    )


def _create_attention(decoder: language.LanguageModel, blocks: int) -> attention.Attention:
    if decoder.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cache = attention.allocate_cache(
        decoder.share, blocks, dtype=decoder.dtype, device=decoder.device
    )
    return _choose_attention(cache, decoder.share)


def _load_nothing(request_id: str, index: int) -> None:
    raise ValueError(f"picture {index} of {request_id} is not at hand")


def _choose_attention(cache: attention.Cache, share: tensor_parallel.Share) -> attention.Attention:
    is_cuda = cache[0].device.type == "cuda"
    has_kernels = is_cuda and importlib.util.find_spec("flashinfer") is not None
    if has_kernels and flashinfer.fits(share, dtype=cache[0].dtype):
        return flashinfer.FlashInferAttention(cache, share)
    return attention.TorchAttention(cache)


def _count_blocks(
    limits: interface.EngineLimits,
    decoder: language.LanguageModel,
    options: Options,
    step_limits: scheduler.Limits,
    create_runner: Callable[[int], runner.Runner],
    leader: following.Leader | None,
) -> int:
    """Return how many blocks the cache has: as many as are of use, as far as memory goes."""
    per_block = attention.bytes_per_block(decoder.share, decoder.dtype)
    per_request = block_pool.blocks_for(limits.max_sequence_tokens)
    useful = per_request * limits.max_batch_size
    free = options.kv_cache_bytes or _CPU_CACHE_BYTES
    if decoder.device.type == "cuda":
        left = _free_after_largest_step(step_limits, create_runner, leader)
        measured = left - options.picture_cache_bytes
        free = min(options.kv_cache_bytes or measured, measured)
        # On a GPU what is not needed at once serves later turns.
        useful = free // per_block
    if free // per_block < per_request:
        is_cuda = decoder.device.type == "cuda"
        raise errors.StageError(
            errors.Reason.OUT_OF_GPU_MEMORY if is_cuda else errors.Reason.OUT_OF_MEMORY,
            f"the key/value cache may have {max(free, 0)} bytes, one request of "
            f"{limits.max_sequence_tokens} tokens needs {per_block * per_request}",
            remedy=_MORE_GPU_MEMORY if is_cuda else _MORE_MEMORY,
        )
    return int(min(useful, free // per_block))


def _free_after_largest_step(
    limits: scheduler.Limits,
    create_runner: Callable[[int], runner.Runner],
    leader: following.Leader | None,
) -> int:
    """Run the largest step, pass of the tower and choice; return what they leave free."""
    blocks = block_pool.blocks_for(limits.max_batched_tokens + 1)
    dry = create_runner(blocks)
    tiles = np.zeros((dry.tiles_per_pass, *pixels.TILE_SHAPE), dtype=np.uint8)
    for _ in dry.encode({"dry run": tiles}):
        pass
    planner = scheduler.Scheduler(limits, block_pool.BlockPool(blocks), can_start=lambda *_: True)
    planner.add("dry run", [0] * limits.max_batched_tokens, max_tokens=2)
    step = planner.plan()
    if step is None:
        raise ValueError("an empty pool can not run a step")
    dry.launch(step, [], gallery.Gallery(max_feature_bytes=0, max_waiting_tiles=0))
    rows = [_SAMPLED] * limits.max_batch_size
    sampler.choose(torch.zeros(len(rows), dry.model.language.vocab_size, device="cuda"), rows)
    left = _free_bytes(dry.model, blocks)
    return leader.measure(left) if leader else left


def _free_bytes(decoder: language.LanguageModel, blocks: int) -> int:
    """Return what the largest step left free since the cache of `blocks` was made, and the cache's.

    Never asked on a CPU.
    """
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    free += torch.cuda.memory_reserved() - allocated
    free += blocks * attention.bytes_per_block(decoder.share, decoder.dtype)
    peak = torch.cuda.max_memory_allocated() - allocated
    return int(free - (1 - _GPU_MEMORY_SHARE) * total) - peak
