"""The operator's Prometheus metrics."""

import prometheus_client

RECONCILES = prometheus_client.Counter(
    "internvl_operator_reconcile_total", "Reconciliations by result.", ["result"]
)
RECONCILE_SECONDS = prometheus_client.Histogram(
    "internvl_operator_reconcile_duration_seconds", "Duration of one reconciliation."
)
QUEUE_DEPTH = prometheus_client.Gauge(
    "internvl_operator_workqueue_depth", "Resources that wait for a reconciliation."
)
WRITES = prometheus_client.Counter(
    "internvl_operator_api_writes_total", "Writes to the API server.", ["verb", "kind"]
)


def serve(port: int) -> None:
    """Serve `/metrics` in a thread of its own."""
    prometheus_client.start_http_server(port)
