"""The executor's statistics as reports of steps."""

from typing import Any

from internvl_runtime.engine import gallery, interface


class Counts:
    """What has been counted since the engine's start."""

    def __init__(self, started: float) -> None:
        self._started = started
        self.blocks = 0
        self.blocks_used = 0
        self._preemptions = 0
        self._passes: list[int] = []
        """Tiles of the tower's passes since the last report."""

    def take_pass(self, tiles: int) -> None:
        """Count a pass of the tower."""
        self._passes.append(tiles)

    def take(self, told: Any) -> None:
        """Take in an iteration's statistics."""
        self.blocks = told.kv_cache_stats.max_num_blocks
        self.blocks_used = told.kv_cache_stats.used_num_blocks
        self._preemptions += told.inflight_batching_stats.num_paused_requests

    def report(
        self, told: Any, load: interface.EngineLoad, pictures: gallery.Gallery, *, now: float
    ) -> interface.StepReport:
        """Return what an iteration did, with the tower's passes beside it."""
        cache, flight = told.kv_cache_stats, told.inflight_batching_stats
        passes, self._passes = self._passes, []
        seconds = told.iter_latency_ms / 1000
        found = cache.reused_blocks * cache.tokens_per_block
        return interface.StepReport(
            began=now - seconds - self._started,
            seconds=seconds,
            decodes=flight.num_gen_requests,
            prefill_tokens=flight.num_ctx_tokens,
            tiles=sum(passes),
            tower_passes=len(passes),
            load=load,
            preemptions=self._preemptions,
            prompt_tokens_looked_up=found + cache.missed_blocks * cache.tokens_per_block,
            prompt_tokens_found=found,
            pictures_looked_up=pictures.lookups,
            pictures_found=pictures.hits,
        )
