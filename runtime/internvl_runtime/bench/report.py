"""Figures of a run: summary, JSON, Markdown."""

import dataclasses
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import internvl_runtime
from internvl_runtime.bench import load

MOST_CLIENT_CORES = 0.7
"""Of one core; a busier client measures itself."""
_PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and percentiles of some values, None where there are none."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of the requests of a run, or of one turn of it; seconds where not said otherwise."""

    requests: int
    failed: int
    requests_per_second: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    output_tokens_per_second: float
    time_to_first_token: Spread
    inter_token_latency: Spread
    """Between the pieces of answers."""
    time_per_output_token: Spread
    """Of a request: from its first token to its end, by the tokens behind the first."""
    latency: Spread


def summarize(requests: Sequence[load.Measured], seconds: float) -> Summary:
    """Return the figures of requests that were sent within so many seconds."""
    good = [each for each in requests if not each.error]
    completion_tokens = sum(each.completion_tokens for each in good)
    return Summary(
        requests=len(requests),
        failed=len(requests) - len(good),
        requests_per_second=len(good) / seconds,
        prompt_tokens=sum(each.prompt_tokens for each in good),
        cached_tokens=sum(each.cached_tokens for each in good),
        completion_tokens=completion_tokens,
        output_tokens_per_second=completion_tokens / seconds,
        time_to_first_token=spread(e.first_token - e.began for e in good if e.first_token),
        inter_token_latency=spread(gap for each in good for gap in np.diff(each.tokens)),
        time_per_output_token=spread(
            (each.tokens[-1] - each.tokens[0]) / (each.completion_tokens - 1)
            for each in good
            if each.completion_tokens > 1
        ),
        latency=spread(each.ended - each.began for each in good),
    )


def spread(values: Iterable[float]) -> Spread:
    """Return mean and percentiles."""
    known = [float(value) for value in values]
    if not known:
        return Spread(None, None, None, None)
    return Spread(float(np.mean(known)), *(float(np.percentile(known, p)) for p in _PERCENTILES))


def describe(run: load.Run, plan: load.Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON report of a run."""
    turns = sorted({each.turn for each in run.requests})
    return {
        "settings": settings
        | {"url": plan.url, "concurrency": plan.concurrency, "rate": plan.rate}
        | {"max_tokens": plan.max_tokens, "seed": plan.seed},
        "client": {
            "version": internvl_runtime.__version__,
            "python": platform.python_version(),
            "cores": run.client_cores,
            "is_valid": run.client_cores <= MOST_CLIENT_CORES,
        },
        "seconds": run.seconds,
        "summary": dataclasses.asdict(summarize(run.requests, run.seconds)),
        "turns": [
            dataclasses.asdict(summarize([e for e in run.requests if e.turn == turn], run.seconds))
            for turn in turns
        ],
        "errors": sorted({each.error for each in run.requests if each.error})[:10],
        "requests": [dataclasses.asdict(each) for each in run.requests],
    }


def write_markdown(described: dict[str, Any]) -> str:
    """Return the report for people."""
    settings = ", ".join(f"{name} {value}" for name, value in described["settings"].items())
    client = described["client"]
    lines = [
        "# Load report",
        "",
        f"{settings}. {described['seconds']:.1f} s; the client used {client['cores']:.2f} cores"
        + ("." if client["is_valid"] else ": **too many, this run measures the client.**"),
        "",
        "| requests | failed | req/s | prompt tokens | cached | output tok/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = [described["summary"], *(described["turns"] if len(described["turns"]) > 1 else [])]
    lines += [
        f"| {row['requests']} | {row['failed']} | {row['requests_per_second']:.2f} | "
        f"{row['prompt_tokens']} | {row['cached_tokens']} | {row['output_tokens_per_second']:.1f} |"
        for row in rows
    ]
    lines += ["", "| ms | mean | p50 | p90 | p99 |", "| --- | --- | --- | --- | --- |"]
    for name in ("time_to_first_token", "inter_token_latency", "time_per_output_token", "latency"):
        for number, row in enumerate(rows):
            turn = f", turn {number}" if number else ""
            values = " | ".join(_milliseconds(value) for value in row[name].values())
            lines.append(f"| {name.replace('_', ' ')}{turn} | {values} |")
    return "\n".join(lines) + "\n"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def write(described: dict[str, Any], folder: Path) -> None:
    """Write report.json and report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(write_markdown(described), encoding="utf-8")
