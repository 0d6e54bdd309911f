"""Pictures of runs and of step logs, as SVG or PNG by the file's ending."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

_MILLISECONDS = 1000


def plot_run(described: dict[str, Any], path: Path) -> None:
    """Draw times to the first token over the run, and how token latencies are spread."""
    good = [each for each in described["requests"] if not each["error"] and each["tokens"]]
    figure, (over_time, spread) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for turn in sorted({each["turn"] for each in good}):
        own = [each for each in good if each["turn"] == turn]
        over_time.scatter(
            [each["began"] for each in own],
            [_MILLISECONDS * (each["first_token"] - each["began"]) for each in own],
            s=12,
            label=f"turn {turn + 1}",
        )
    over_time.set(xlabel="request sent, s", ylabel="time to first token, ms", ylim=(0, None))
    over_time.legend()
    gaps = [
        _MILLISECONDS * (after - before)
        for each in good
        for before, after in zip(each["tokens"], each["tokens"][1:], strict=False)
    ]
    if gaps:
        spread.ecdf(gaps)
        spread.set(xlabel="inter-token latency, ms", ylabel="share", xscale="log")
    figure.savefig(path)
    plt.close(figure)


def plot_steps(steps: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what an engine's steps held: tokens, requests, blocks, time."""
    times = [step["began"] for step in steps]
    figure, axes = plt.subplots(4, 1, figsize=(11, 9), sharex=True, layout="constrained")
    axes[0].bar(times, [s["prefill_tokens"] for s in steps], width=0.01, label="prefill")
    axes[0].plot(times, [s["decodes"] for s in steps], ".", ms=3, color="C1", label="decodes")
    axes[0].set(ylabel="tokens of a step", yscale="symlog")
    loads = [step["load"] for step in steps]
    for name in ("running", "waiting"):
        axes[1].step(times, [load[name] for load in loads], where="post", label=name)
    axes[1].set(ylabel="requests")
    axes[2].step(times, [load["blocks_used"] for load in loads], where="post", label="blocks")
    axes[2].plot(times, [step["preemptions"] for step in steps], label="preemptions")
    axes[2].set(ylabel="cache")
    axes[3].plot(
        times, [_MILLISECONDS * step["seconds"] for step in steps], ".", ms=3, label="step"
    )
    axes[3].set(ylabel="ms", yscale="log", xlabel="seconds since the engine's start")
    for axis in axes:
        axis.legend(loc="upper right")
    figure.savefig(path)
    plt.close(figure)
