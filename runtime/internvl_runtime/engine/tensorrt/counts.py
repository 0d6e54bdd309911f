"""The executor's statistics as reports of steps."""

import dataclasses
from typing import Any

from internvl_runtime.engine import gallery, interface


class Counts:
    """What has been counted since the engine's start."""

    def __init__(self, started: float) -> None:
        self._started = started
        self.blocks = 0
        self.blocks_used = 0
        self._preemptions = 0
        self._blocks_looked_up = self._before = (0, 0)
        """Reused and missed, by the executor's count and at the last reset."""
        self._passes: list[int] = []
        """Tiles of the tower's passes since the last report."""

    def take_pass(self, tiles: int) -> None:
        """Count a pass of the tower."""
        self._passes.append(tiles)

    def reset(self) -> None:
        """Begin anew with what was looked up and found."""
        self._before = self._blocks_looked_up

    def take(
        self, told: Any, load: interface.EngineLoad, pictures: gallery.Gallery, *, now: float
    ) -> interface.StepReport:
        """Return what an iteration did, with the tower's passes beside it."""
        cache, flight = told.kv_cache_stats, told.inflight_batching_stats
        self.blocks, self.blocks_used = cache.max_num_blocks, cache.used_num_blocks
        self._preemptions += flight.num_paused_requests
        self._blocks_looked_up = cache.reused_blocks, cache.missed_blocks
        passes: list[int] = []
        if flight.num_gen_requests + flight.num_ctx_tokens:
            passes, self._passes = self._passes, passes
        seconds = told.iter_latency_ms / 1000
        found, missed = (
            (blocks - before) * cache.tokens_per_block
            for blocks, before in zip(self._blocks_looked_up, self._before, strict=True)
        )
        return interface.StepReport(
            began=now - seconds - self._started,
            seconds=seconds,
            decodes=flight.num_gen_requests,
            prefill_tokens=flight.num_ctx_tokens,
            tiles=sum(passes),
            tower_passes=len(passes),
            load=dataclasses.replace(load, blocks_used=self.blocks_used),
            preemptions=self._preemptions,
            prompt_tokens_looked_up=found + missed,
            prompt_tokens_found=found,
            pictures_looked_up=pictures.lookups,
            pictures_found=pictures.hits,
        )
