"""The runtime's Prometheus metrics."""

import prometheus_client

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
REQUESTS_WAITING = prometheus_client.Gauge(
    "internvl_requests_waiting", "Requests admitted and not finished."
)
TIME_TO_FIRST_TOKEN = prometheus_client.Histogram(
    "internvl_time_to_first_token_seconds", "From admission to the first token."
)
ENGINE_UP = prometheus_client.Gauge("internvl_engine_up", "1 while the engine worker answers.")


def serve(port: int) -> None:
    """Serve `/metrics` on a port of its own, in a thread of its own."""
    prometheus_client.start_http_server(port)
