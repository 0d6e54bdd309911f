"""The executor's statistics become reports, number by number."""

import dataclasses

from internvl_doubles import executor
from internvl_runtime.engine import gallery, interface
from internvl_runtime.engine.tensorrt import counts

BEFORE = interface.EngineLoad(running=2, waiting=1, blocks_used=3, picture_cache_bytes=64)


def iteration(*, decodes=0, prompt_tokens=0, paused=0, reused=0, missed=0):
    return executor.IterationStats(
        iter_latency_ms=250.0,
        kv_cache_stats=executor.KvCacheStats(
            max_num_blocks=90, used_num_blocks=7, tokens_per_block=32, reused_blocks=reused,
            missed_blocks=missed,
        ),
        inflight_batching_stats=executor.InflightBatchingStats(
            num_gen_requests=decodes, num_paused_requests=paused, num_ctx_tokens=prompt_tokens
        ),
    )  # fmt: skip


def pictures():
    kept = gallery.Gallery(max_feature_bytes=1, max_waiting_tiles=1)
    kept.lookups, kept.hits = 5, 4
    return kept


def test_an_iteration_is_told_number_by_number():
    counted = counts.Counts(started=100.0)
    counted.take_pass(3)
    counted.take_pass(4)
    load = dataclasses.replace(BEFORE, blocks_used=7)
    told = iteration(decodes=2, prompt_tokens=9, paused=1, reused=6, missed=5)
    assert counted.take(told, BEFORE, pictures(), now=103.0) == interface.StepReport(
        began=2.75, seconds=0.25, decodes=2, prefill_tokens=9, tiles=7, tower_passes=2, load=load,
        preemptions=1, prompt_tokens_looked_up=352, prompt_tokens_found=192, pictures_looked_up=5,
        pictures_found=4,
    )  # fmt: skip
    assert (counted.blocks, counted.blocks_used) == (90, 7)


def test_passes_go_into_the_next_iteration_with_tokens_and_pauses_add_up():
    counted = counts.Counts(started=0.0)
    counted.take_pass(3)
    made = [
        counted.take(told, BEFORE, pictures(), now=1.0)
        for told in (iteration(paused=1), iteration(decodes=4, prompt_tokens=4, paused=2),
                     iteration(decodes=1))
    ]  # fmt: skip
    assert [report.tiles for report in made] == [0, 3, 0]
    assert [report.preemptions for report in made] == [1, 3, 3]


def test_a_reset_counts_blocks_from_there():
    counted = counts.Counts(started=0.0)
    assert (counted.blocks, counted.blocks_used) == (0, 0)
    counted.take(iteration(reused=6, missed=5), BEFORE, pictures(), now=1.0)
    counted.reset()
    report = counted.take(iteration(reused=7, missed=7), BEFORE, pictures(), now=1.0)
    assert (report.prompt_tokens_looked_up, report.prompt_tokens_found) == (96, 32)
