"""What the executor is created with, and what is told where it can not be."""

import types
from pathlib import Path

import pytest
from internvl_doubles import executor
from internvl_runtime import errors
from internvl_runtime.engine import interface
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.engine.tensorrt import loading

LIMITS = interface.EngineLimits(
    max_sequence_tokens=4096, max_input_tokens=4095, max_batched_tokens=512, max_batch_size=4,
    max_tiles_per_image=6, max_tiles_per_request=8,
)  # fmt: skip
BUILT = builts.Built(
    dtype="bfloat16", vocab_size=512, hidden_size=4096, bytes_per_token=65536, max_batch_size=4,
    max_sequence_tokens=4096, rows_per_request=2048, tokens_per_block=32, ranks=2,
)  # fmt: skip
IMAGE = "serve on the kind of GPU and with the image that the engine was built for"


@pytest.mark.parametrize(("cache_tokens", "tells_logits"), [(None, False), (8192, True)])
def test_the_executor_is_told_the_engines_limits_and_ours(cache_tokens, tells_logits):
    made = loading._executor_config(
        executor, LIMITS, BUILT, cache_tokens=cache_tokens, tells_logits=tells_logits
    )
    assert (made.max_batch_size, made.max_num_tokens, made.max_beam_width) == (4, 512, 1)
    assert made.gather_generation_logits is tells_logits
    assert made.enable_chunked_context is True
    assert made.normalize_log_probs is False
    assert made.iter_stats_max_iterations == 1000
    assert made.batching_type is executor.BatchingType.INFLIGHT
    assert made.fail_fast_on_attention_window_too_large is True
    policy = made.scheduler_config.capacity_scheduler_policy
    assert policy is executor.CapacitySchedulerPolicy.MAX_UTILIZATION
    cache = made.kv_cache_config
    assert (cache.enable_block_reuse, cache.enable_partial_reuse) == (True, False)
    assert cache.max_tokens == cache_tokens
    # A picture's token has a row of 8 KiB beside its 64 KiB of keys and values.
    assert cache.free_gpu_memory_fraction == pytest.approx(0.9 * 64 / 72)


def test_a_cache_for_less_than_a_request_is_refused_by_its_setting():
    assert loading._cache_tokens(4096 * 65536, BUILT) == 4096
    with pytest.raises(errors.StageError) as caught:
        loading._cache_tokens(1000, BUILT)
    assert caught.value.reason is errors.Reason.OUT_OF_GPU_MEMORY
    assert caught.value.message == (
        "the key/value cache may have 1000 bytes, one request of 4096 tokens needs 268435456"
    )
    assert caught.value.remedy == (
        "raise INTERNVL_RUNTIME_KV_CACHE_BYTES, leave it out for all that is free, or build the "
        "engine with a smaller maxSequenceTokens"
    )


@pytest.mark.parametrize(
    ("words", "reason", "message", "remedy"),
    [
        (
            "CUDA out of memory",
            errors.Reason.OUT_OF_GPU_MEMORY,
            "the engine does not fit into the GPU: CUDA out of memory",
            "build it with a smaller maxBatchSize or maxSequenceTokens, raise tensorParallelSize, "
            "or use a larger GPU",
        ),
        (
            "NCCL error: unhandled system error",
            errors.Reason.RANK_FAILED,
            "TensorRT-LLM's ranks do not meet: NCCL error: unhandled system error",
            "read the container's log; out of memory is the usual cause; NCCL_DEBUG=INFO tells of "
            "GPUs' connections",
        ),
        (
            "magic tag does not match",
            errors.Reason.ENGINE_INCOMPATIBLE,
            "TensorRT-LLM does not load the engine: magic tag does not match",
            IMAGE,
        ),
        (
            600 * "x",
            errors.Reason.ENGINE_INCOMPATIBLE,
            "TensorRT-LLM does not load the engine: " + 500 * "x",
            IMAGE,
        ),
    ],
)
def test_why_an_executor_can_not_be_made_is_told(caplog, words, reason, message, remedy):
    def fail(*_):
        raise RuntimeError(words)

    module = types.SimpleNamespace(Executor=fail, ModelType=executor.ModelType)
    with pytest.raises(errors.StageError) as caught:
        loading._create(module, Path("language"), None)
    told = caught.value
    assert (told.reason, told.message, told.remedy) == (reason, message, remedy)
    assert caplog.messages == ["the executor does not load the engine"]
