"""Loads both engines: TensorRT's of the tower, then TensorRT-LLM's executor, which takes the rest
of the GPU's memory for keys and values."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from internvl_runtime import errors
from internvl_runtime.engine import gallery, interface, mpi, pixels, stepping
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.engine.tensorrt import core, vision

logger = logging.getLogger(__name__)

_WAITING_TILES = 512
"""Tiles that may wait for the tower: 294 MiB."""
_FREE_MEMORY_SHARE = 0.9
"""Of the memory that is free once both engines and their buffers are there: the executor's own
default. Keys and values have it, and the rows of the pictures among their tokens."""
_SHORT_OF_MEMORY = ("out of memory", "attention window", "kv cache")
"""In what the executor raises."""
_OF_RANKS = "nccl"
"""Likewise: of a connection, or of another rank."""
_STATISTICS = 1000
"""Iterations whose statistics wait for us."""


def load_engine(
    folder: Path,
    limits: interface.EngineLimits,
    *,
    picture_cache_bytes: int,
    kv_cache_bytes: int = 0,
    load_picture: stepping.LoadPicture | None = None,
    tells_logits: bool = False,
) -> core.Engine:
    """Load the engines of a folder; `kv_cache_bytes` 0 takes what is free.

    Raises EngineIncompatibleError and StageError where they can not be loaded.
    """
    built = builts.read(folder / builts.LANGUAGE_FOLDER)
    tower = vision.Tower(
        folder / builts.VISION_FILE, dtype=built.dtype, hidden_size=built.hidden_size
    )
    # What a pass needs is taken before the executor takes what is free.
    tower.encode(np.zeros((tower.most_tiles, *pixels.TILE_SHAPE), np.uint8))
    module, executor = _create_executor(
        folder, limits, built, kv_cache_bytes=kv_cache_bytes, tells_logits=tells_logits
    )
    return core.Engine(
        module,
        executor,
        built,
        tower,
        gallery.Gallery(max_feature_bytes=picture_cache_bytes, max_waiting_tiles=_WAITING_TILES),
        load=load_picture or _load_nothing,
        tells_logits=tells_logits,
    )


def follow(
    folder: Path,
    limits: interface.EngineLimits,
    *,
    kv_cache_bytes: int,
    tells_logits: bool,
) -> None:
    """Be a rank behind rank 0, with the arguments that it loads with, until it shuts down.

    Raises EngineIncompatibleError and StageError where the rank's engine can not be loaded.
    """
    built = builts.read(folder / builts.LANGUAGE_FOLDER)
    _, executor = _create_executor(
        folder, limits, built, kv_cache_bytes=kv_cache_bytes, tells_logits=tells_logits
    )
    # Behind the leader this waits for it.
    executor.shutdown()


def _create_executor(
    folder: Path,
    limits: interface.EngineLimits,
    built: builts.Built,
    *,
    kv_cache_bytes: int,
    tells_logits: bool,
) -> tuple[Any, Any]:
    """Return `tensorrt_llm.bindings.executor`, and one of its Executors."""
    from tensorrt_llm.bindings import executor as module

    config = _executor_config(
        module,
        limits,
        built,
        cache_tokens=_cache_tokens(kv_cache_bytes, built) if kv_cache_bytes else None,
        tells_logits=tells_logits,
    )
    return module, _create(module, folder / builts.LANGUAGE_FOLDER, config)


def _cache_tokens(kv_cache_bytes: int, built: builts.Built) -> int:
    """Return the tokens that a cache of so many bytes holds on each rank."""
    tokens = kv_cache_bytes // built.bytes_per_token
    if tokens < built.max_sequence_tokens:
        raise errors.StageError(
            errors.Reason.OUT_OF_GPU_MEMORY,
            f"the key/value cache may have {kv_cache_bytes} bytes, one request of "
            f"{built.max_sequence_tokens} tokens needs "
            f"{built.max_sequence_tokens * built.bytes_per_token}",
            remedy="raise INTERNVL_RUNTIME_KV_CACHE_BYTES, leave it out for all that is free, or "
            "build the engine with a smaller maxSequenceTokens",
        )
    return tokens


def _executor_config(
    module: Any,
    limits: interface.EngineLimits,
    built: builts.Built,
    *,
    cache_tokens: int | None,
    tells_logits: bool,
) -> Any:
    # The executor copies the table of a request to every rank's GPU, where it stays beside the
    # request's keys and values.
    of_the_cache = built.bytes_per_token / (built.bytes_per_token + built.row_bytes)
    return module.ExecutorConfig(
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_batched_tokens,
        # Prompts longer than a step are computed in pieces, beside other answers' tokens.
        enable_chunked_context=True,
        # A log-probability is told of the whole vocabulary, not of the tokens that top_k leaves.
        normalize_log_probs=False,
        iter_stats_max_iterations=_STATISTICS,
        batching_type=module.BatchingType.INFLIGHT,
        scheduler_config=module.SchedulerConfig(
            capacity_scheduler_policy=module.CapacitySchedulerPolicy.MAX_UTILIZATION
        ),
        kv_cache_config=module.KvCacheConfig(
            enable_block_reuse=True,
            # What is told of reused tokens counts whole blocks.
            enable_partial_reuse=False,
            max_tokens=cache_tokens,
            free_gpu_memory_fraction=_FREE_MEMORY_SHARE * of_the_cache,
        ),
        # Else it would serve shorter sequences, with a warning.
        fail_fast_on_attention_window_too_large=True,
        gather_generation_logits=tells_logits,
    )


def _create(module: Any, folder: Path, config: Any) -> Any:
    try:
        return module.Executor(folder, module.ModelType.DECODER_ONLY, config)
    except Exception as e:
        words = str(e)
        logger.exception("the executor does not load the engine")
        if any(told in words.lower() for told in _SHORT_OF_MEMORY):
            raise errors.StageError(
                errors.Reason.OUT_OF_GPU_MEMORY,
                f"the engine does not fit into the GPU: {words[:500]}",
                remedy="build it with a smaller maxBatchSize or maxSequenceTokens, raise "
                "tensorParallelSize, or use a larger GPU",
            ) from e
        if _OF_RANKS in words.lower():
            raise mpi.failure(f"TensorRT-LLM's ranks do not meet: {words[:500]}") from e
        raise errors.EngineIncompatibleError(
            f"TensorRT-LLM does not load the engine: {words[:500]}",
            remedy="serve on the kind of GPU and with the image that the engine was built for",
        ) from e


def _load_nothing(request_id: str, index: int) -> None:
    raise ValueError(f"picture {index} of {request_id} is not at hand")
