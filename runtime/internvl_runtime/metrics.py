"""The runtime's Prometheus metrics, after vLLM's: the same things under the same last words."""

import prometheus_client

from internvl_runtime.engine import interface

_LATENCIES = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300,
)  # fmt: skip
"""Bounds of histograms of seconds, from one decode step of a small model on."""

REQUESTS = prometheus_client.Counter(
    "internvl_requests_total", "Requests by how they ended.", ["finished_reason"]
)
IGNORED_FIELDS = prometheus_client.Counter(
    "internvl_ignored_fields_total", "Fields of request bodies that this server does not know."
)
PROMPT_TOKENS = prometheus_client.Counter(
    "internvl_prompt_tokens_total", "Prompt tokens of admitted requests, image tokens included."
)
GENERATION_TOKENS = prometheus_client.Counter(
    "internvl_generation_tokens_total", "Tokens generated."
)
REQUESTS_ADMITTED = prometheus_client.Gauge(
    "internvl_requests_admitted", "Requests admitted and not finished."
)
REQUESTS_RUNNING = prometheus_client.Gauge(
    "internvl_requests_running", "Requests in the engine's batch at its last step."
)
REQUESTS_WAITING = prometheus_client.Gauge(
    "internvl_requests_waiting", "Requests that waited for the batch at the engine's last step."
)


def _seconds(name: str, words: str, labels: tuple[str, ...] = ()) -> prometheus_client.Histogram:
    return prometheus_client.Histogram(
        f"internvl_{name}_seconds", words, labels, buckets=_LATENCIES
    )


TIME_TO_FIRST_TOKEN = _seconds("time_to_first_token", "From admission to the first token.")
INTER_TOKEN_LATENCY = _seconds("inter_token_latency", "From a token to the next one.")
QUEUE_TIME = _seconds("request_queue_time", "From arrival at the engine to the first step.")
REQUEST_TIME = _seconds("e2e_request_latency", "From admission to the end.")
STEP_TIME = _seconds("step", "Time of an engine step by what was in it.", ("phase",))
ITERATION_TOKENS = prometheus_client.Histogram(
    "internvl_iteration_tokens", "Tokens of an engine step.",
    buckets=(1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
)  # fmt: skip
CACHE_BLOCKS = prometheus_client.Gauge("internvl_kv_cache_blocks", "Blocks of the key/value cache.")
CACHE_BLOCKS_USED = prometheus_client.Gauge(
    "internvl_kv_cache_blocks_used", "Blocks that requests hold."
)
PREEMPTIONS = prometheus_client.Counter(
    "internvl_preemptions_total", "Requests taken back because blocks ran out."
)
PREFIX_CACHE_QUERIES = prometheus_client.Counter(
    "internvl_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
)
PREFIX_CACHE_HITS = prometheus_client.Counter(
    "internvl_prefix_cache_hits_total", "Prompt tokens found there."
)
PICTURE_CACHE_QUERIES = prometheus_client.Counter(
    "internvl_picture_cache_queries_total", "Pictures looked up in the cache of features."
)
PICTURE_CACHE_HITS = prometheus_client.Counter(
    "internvl_picture_cache_hits_total", "Pictures found there."
)
PICTURE_CACHE_BYTES = prometheus_client.Gauge(
    "internvl_picture_cache_bytes", "Bytes of picture features."
)
TILES = prometheus_client.Counter("internvl_vision_tiles_total", "Tiles encoded.")
TOWER_PASSES = prometheus_client.Counter(
    "internvl_vision_passes_total", "Passes of the vision tower."
)
ENGINE_UP = prometheus_client.Gauge("internvl_engine_up", "1 while the engine worker answers.")


_COUNTED = {
    PREEMPTIONS: "preemptions",
    PREFIX_CACHE_QUERIES: "prompt_tokens_looked_up",
    PREFIX_CACHE_HITS: "prompt_tokens_found",
    PICTURE_CACHE_QUERIES: "pictures_looked_up",
    PICTURE_CACHE_HITS: "pictures_found",
}
"""Counters of what reports count since the engine's start."""


class EngineObserver:
    """Brings an engine's reports into the metrics."""

    def __init__(self) -> None:
        self._counted = dict.fromkeys(_COUNTED, 0)

    def observe_step(self, report: interface.StepReport) -> None:
        """Take in one step."""
        phases = {"prefill": report.prefill_tokens, "decode": report.decodes}
        phase = "+".join(name for name, tokens in phases.items() if tokens)
        STEP_TIME.labels(phase).observe(report.seconds)
        ITERATION_TOKENS.observe(report.tokens)
        self.observe_load(report.load)
        TILES.inc(report.tiles)
        TOWER_PASSES.inc(report.tower_passes)
        for counter, field in _COUNTED.items():
            counter.inc(getattr(report, field) - self._counted[counter])
            self._counted[counter] = getattr(report, field)

    def observe_load(self, load: interface.EngineLoad) -> None:
        """Take in what the engine holds."""
        REQUESTS_RUNNING.set(load.running)
        REQUESTS_WAITING.set(load.waiting)
        CACHE_BLOCKS_USED.set(load.blocks_used)
        PICTURE_CACHE_BYTES.set(load.picture_cache_bytes)


def serve(host: str, port: int) -> None:
    """Serve `/metrics` on a port of its own, in a thread of its own."""
    prometheus_client.start_http_server(port, addr=host)
