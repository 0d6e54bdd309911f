"""The commands `bench` and `plot-steps`."""

import argparse
import asyncio
import functools
import json
import os
import secrets
from typing import Any

import rich.console
import rich.markdown
import rich.progress

from internvl_runtime import errors
from internvl_runtime.bench import load, plots, report, scenarios

_MOST_SIDE = 65_500
"""Pixels, of libjpeg."""


def run(arguments: argparse.Namespace) -> None:
    """Load a server and report. Raises StageError when the figures are worth nothing."""
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    plan = load.Plan(
        url=arguments.url.rstrip("/"),
        model=arguments.model,
        api_key=os.environ.get("OPENAI_API_KEY"),
        max_tokens=arguments.max_tokens,
        concurrency=arguments.concurrency or (None if arguments.rate else 16),
        rate=arguments.rate,
        seed=seed,
    )
    write = functools.partial(
        scenarios.write_conversation,
        scenarios.Scenario(arguments.scenario),
        _shape(arguments.picture, arguments.words),
        seed=seed,
    )
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console) as progress:
        drawing = progress.add_task("drawing", total=arguments.requests + arguments.warmup)
        conversations = []
        for number in range(arguments.requests + arguments.warmup):
            conversations.append(write(number=number))
            progress.advance(drawing)
        warming, measured = (
            conversations[: arguments.warmup],
            conversations[arguments.warmup :],
        )
        asyncio.run(load.run(warming, plan, report=lambda: None))
        asking = progress.add_task("asking", total=arguments.requests)
        made = asyncio.run(load.run(measured, plan, report=lambda: progress.advance(asking)))
    described = report.describe(
        made, plan, {"scenario": str(arguments.scenario), "picture": arguments.picture}
    )
    if arguments.output:
        report.write(described, arguments.output)
        plots.plot_run(described, arguments.output / "run.svg")
    rich.console.Console().print(rich.markdown.Markdown(report.write_markdown(described)))
    _check(described)


def plot_steps(arguments: argparse.Namespace) -> None:
    """Draw a step log; raises MeasurementError where the file is none."""
    try:
        with arguments.log.open(encoding="utf-8") as lines:
            plots.plot_steps([json.loads(line) for line in lines], arguments.output)
    except (ValueError, KeyError, TypeError) as e:
        raise errors.MeasurementError(
            f"{arguments.log} can not be drawn into {arguments.output}: {e}"
        ) from e


def _shape(picture: str, words: int) -> scenarios.Shape:
    try:
        width, height = map(int, picture.split("x"))
    except ValueError as e:
        raise errors.MeasurementError(f"--picture {picture} is no size; write 1280x720") from e
    if not (1 <= width <= _MOST_SIDE and 1 <= height <= _MOST_SIDE):
        raise errors.MeasurementError(
            f"--picture {picture}: a JPEG has from 1 to {_MOST_SIDE} pixels a side"
        )
    return scenarios.Shape(width=width, height=height, words=words)


def _check(described: dict[str, Any]) -> None:
    if described["errors"]:
        raise errors.MeasurementError(
            f"{described['summary']['failed']} requests failed: {described['errors']}; "
            "the server's log says why"
        )
    if not described["client"]["is_valid"]:
        raise errors.MeasurementError(
            f"the client used {described['client']['cores']:.2f} cores, at most "
            f"{report.MOST_CLIENT_CORES} count: lower --concurrency, or run several clients"
        )
