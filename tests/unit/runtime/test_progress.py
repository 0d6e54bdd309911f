import io
import json

import pytest
from internvl_runtime.artifacts import progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


@pytest.fixture
def output():
    return io.StringIO()


def lines(output):
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_lines_are_at_least_half_a_second_apart_but_for_the_last(clock, output):
    report = progress.Progress("convert", output).step("convert", unit="bytes")
    for done in range(0, 101, 10):
        report(done, 100)
        clock.now += 0.2
    assert [line["done"] for line in lines(output)] == [0, 30, 60, 90, 100]


def test_percent_is_over_the_steps_that_the_stage_has_and_never_falls(clock, output):
    stage = progress.Progress("build", output)
    for step, unit in (("kernels", "objects"), ("answer", "prompts"), ("compare", "layers")):
        report = stage.step(step, unit=unit)
        for done in (0, 1, 2):
            clock.now += 1
            report(done, 2)
    percents = [line["percent"] for line in lines(output)]
    assert percents == sorted(percents)
    assert percents[2] == 70.0
    assert percents[-1] == 100.0


def test_a_stage_that_skips_steps_ends_at_a_hundred_too(clock, output):
    stage = progress.Progress("build", output)
    stage.step("answer", unit="prompts")(1, 1)
    assert lines(output)[-1]["percent"] == pytest.approx(33.3)
    stage.step("compare", unit="layers")(5, 5)
    assert lines(output)[-1]["percent"] == 100.0


def test_rate_and_remaining_time_are_told_once_they_are_known(clock, output):
    report = progress.Progress("fetch", output).step("download", unit="bytes")
    report(1000, 5000)
    clock.now += 1
    report(1500, 5000)
    clock.now += 1
    report(2000, 5000)
    first, early, late = lines(output)
    assert "rate" not in first
    assert "rate" not in early
    # What an earlier try had fetched is no speed of this one.
    assert (late["rate"], late["remainingSeconds"]) == (500, 6)


def test_units_that_are_not_alike_have_no_rate(clock, output):
    report = progress.Progress("build", output).step("kernels", unit="objects")
    report(0, 10)
    clock.now += 60
    report(5, 10)
    assert "remainingSeconds" not in lines(output)[-1]


def test_nothing_to_do_is_done(clock, output):
    progress.Progress("build", output).step("kernels", unit="objects")(0, 0)
    assert lines(output)[-1]["percent"] == 70.0
