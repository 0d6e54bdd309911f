"""What must hold of an engine of several ranks that is served, on CPUs and on GPUs."""

import concurrent.futures
import itertools
import json
import os
import random
import signal
import time

import httpx
import pictures
import rank_processes
import runtime_process
from internvl_runtime.artifacts import shapes
from internvl_runtime.model import config

AT_ONCE = 16
LONG = 3
END_SECONDS = 10.0
MODELS = ["tiny-shapes", *config.Family]
"""A trained model, and random weights of both families."""
PHASES = ["start", "idle", "prefill", "decode", "drain"]
PHASES_AND_RANKS = list(itertools.product(PHASES, [0, 1]))


def describe_source(model, folder):
    """Return the source of one of the models; a family's weights are written into a folder."""
    if model == "tiny-shapes":
        return {"bundled": {"name": model}}
    return {"folder": {"path": str(runtime_process.synthesize(folder, shapes.TINY, model))}}


def body_of(seed):
    """A request that is made again for every seed: greedy or sampled, with pictures or without."""
    rng = random.Random(seed)
    # The longest prompt takes two steps.
    times = 900 if seed == LONG else rng.randrange(1, 20)
    content = [{"type": "text", "text": f"What is number {seed}? " * times}]
    content += [
        pictures.image_part(pictures.draw(300 + 20 * (seed % 5), 200)) for _ in range(seed % 3)
    ]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": rng.randrange(4, 24),
        "temperature": seed % 2,
        "seed": seed,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }


def stream(url, body, *, most_events=None):
    """Return the token ids of a stream that was read to its end, or to so many events."""
    token_ids = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        for line in itertools.islice(lines, most_events):
            if line == "[DONE]":
                return token_ids
            (choice,) = json.loads(line)["choices"]
            token_ids += choice.get("token_ids") or []
    assert most_events, "the stream ended without [DONE]"
    return None


def answers_at_once(engine):
    """Token ids of many streams at once, between some that are left after a few tokens."""
    with (
        runtime_process.serve(engine) as server,
        concurrent.futures.ThreadPoolExecutor(2 * AT_ONCE) as threads,
    ):
        asked, leaving = [], []
        for seed in range(AT_ONCE):
            asked.append(threads.submit(stream, server.url, body_of(seed)))
            if seed % 3 == 0:
                left = {**body_of(100 + seed), "max_tokens": 500}
                events = 1 + seed % 4
                leaving.append(threads.submit(stream, server.url, left, most_events=events))
        assert [future.result() for future in leaving] == [None] * len(leaving)
        return [future.result() for future in asked]


def kill_at(phase, name, engine, *, told, seed=0):
    """Kill a rank; returns the exit code, the termination message and the seconds to the end."""
    rng = random.Random(seed)
    told.touch()
    settings = {"termination_log": str(told), "drain_seconds": 60}
    before = rank_processes.left_behind()
    with (
        runtime_process.serve(engine, wait=phase != "start", **settings) as server,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        killed = rank_processes.wait_for(engine, name)
        body = body_of(seed) | {"max_tokens": 2000, "temperature": 0}
        if phase == "prefill":
            body["messages"] = [{"role": "user", "content": "long " * 6000}]
        if phase in {"prefill", "decode", "drain"}:
            asked = [threads.submit(end_of_stream, server.url, body) for _ in range(4)]
            time.sleep(rng.uniform(0.3, 0.8))
        if phase == "drain":
            server.process.send_signal(signal.SIGTERM)
            time.sleep(rng.uniform(0.2, 0.6))
        if phase == "start":
            time.sleep(rng.uniform(0, 1.5))
        began = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        code = server.process.wait(timeout=60)
        took = time.monotonic() - began
        if phase in {"prefill", "decode", "drain"}:
            ends = [future.result() for future in asked]
            assert "whole" not in ends, "the answers were over before"
    check_nothing_left(engine, before)
    return code, json.loads(told.read_text()), took


def check_nothing_left(engine, before):
    """Nothing runs any more, and there are no files but those of before."""
    running, left = rank_processes.of(engine), rank_processes.left_behind() - before
    assert not running, running
    assert not left, left


def end_of_stream(url, body):
    """How a stream ended: whole, told, or cut off, which no client may take for an answer."""
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line]
    except httpx.TransportError as e:
        return type(e).__name__
    return "whole" if lines[-1] == "data: [DONE]" else "told"


def check_killed(phase, name, engine, told, seed=0):
    """A killed rank ends the container in time, with its name, and leaves nothing behind."""
    code, told, took = kill_at(phase, name, engine, told=told, seed=seed)
    print(f"{phase} {name}: code {code} after {took:.1f} s: {told['message']}")
    assert code == 1
    assert took < END_SECONDS
    assert told["reason"] == "RankFailed"
    who = "mpirun ended with code -9" if name == rank_processes.MPIRUN else f"rank {name} of 2"
    assert who in told["message"]


def check_sigterm(engine, seed=0, *, tokens=60):
    """Streams that run are whole, and nothing is left behind."""
    rng = random.Random(seed)
    bodies = [body_of(8 * seed + number) | {"max_tokens": tokens} for number in range(8)]
    before = rank_processes.left_behind()
    with (
        runtime_process.serve(engine, drain_seconds=120) as server,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        asked = [threads.submit(stream, server.url, body) for body in bodies]
        time.sleep(rng.uniform(0.3, 1.0))
        assert not all(future.done() for future in asked)
        server.process.send_signal(signal.SIGTERM)
        assert [len(future.result()) for future in asked] == [tokens] * 8
        assert server.process.wait(timeout=60) == 0
    check_nothing_left(engine, before)
