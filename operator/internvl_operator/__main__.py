"""The command `internvl-operator`."""

import asyncio
import logging
import sys

import kopf
import pydantic

from internvl_operator import handlers, metrics, settings


def main() -> int:
    """Run the operator until SIGTERM."""
    try:
        config = settings.Settings()
    except pydantic.ValidationError as e:
        print(f"the settings are wrong: {e}", file=sys.stderr)
        return 2
    kopf.configure(log_format=kopf.LogFormat.JSON)
    for noisy in ("aiohttp.access", "kopf.objects", "kopf.activities"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if config.metrics_port:
        metrics.serve(config.metrics_port)
    registry = kopf.OperatorRegistry()
    handlers.register(registry)
    asyncio.run(_run(registry, config))
    return 0


async def _run(registry: kopf.OperatorRegistry, config: settings.Settings) -> None:
    await kopf.operator(
        registry=registry,
        memo=kopf.Memo(controller=handlers.Controller(config)),
        namespaces=list(config.namespaces),
        clusterwide=not config.namespaces,
        liveness_endpoint=f"http://0.0.0.0:{config.liveness_port}/healthz",
        standalone=True,
    )


if __name__ == "__main__":
    sys.exit(main())
