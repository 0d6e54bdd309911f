"""The worker is killed or stopped under load: every request ends, and the server with it."""

import concurrent.futures
import contextlib
import os
import random
import signal
import time
from pathlib import Path

import httpx
import pictures
import pytest
import runtime_process

SILENT_SECONDS = 2.0
DEADLINE_SECONDS = 20.0
ENDINGS = (signal.SIGKILL, signal.SIGSTOP)


def worker_of(server):
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    (worker,) = (child for child, command in commands.items() if b"engine.worker" in command)
    return int(worker)


def tiles_in_memory():
    """Descriptors of tiles, of whatever process."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found += ["internvl-tiles" in str(link.readlink())]
    return sum(found)


def ask(url, seed):
    """One request, streamed or not, with and without a picture; returns how it ended."""
    rng = random.Random(seed)
    content = [{"type": "text", "text": f"tell me {seed}"}]
    if rng.random() < 0.5:
        content.append(pictures.image_part(pictures.draw(300 + seed % 40, 200)))
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": rng.randrange(5, 200),
        "ignore_eos": True,
        "stream": rng.random() < 0.5,
    }
    try:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_SECONDS)
    except httpx.TransportError as e:
        # Behind the end of the server nobody listens any more.
        return type(e).__name__
    if body["stream"] and answer.status_code == 200:
        return "answered" if answer.text.endswith("data: [DONE]\n\n") else "told"
    return {200: "answered", 503: "told"}[answer.status_code]


def end_worker_under_load(engine, seed):
    """Returns how the requests ended, of which some were sent behind the worker's end."""
    rng = random.Random(seed)
    settings = {"worker_silent_seconds": SILENT_SECONDS}
    with (
        runtime_process.serve(engine, **settings) as server,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        worker = worker_of(server)
        asked = [threads.submit(ask, server.url, 1000 * seed + n) for n in range(24)]
        time.sleep(rng.uniform(0, 2))
        os.kill(worker, rng.choice(ENDINGS))
        began = time.monotonic()
        ended = [future.result(timeout=DEADLINE_SECONDS) for future in asked]
        code = server.process.wait(timeout=DEADLINE_SECONDS)
        took = time.monotonic() - began
    assert code not in {0, None}
    assert not Path(f"/proc/{worker}").exists()
    assert not tiles_in_memory()
    assert took < DEADLINE_SECONDS
    return ended


@pytest.mark.parametrize("seed", range(5))
def test_every_request_ends_when_the_worker_does(qwen_engine, seed):
    ended = end_worker_under_load(qwen_engine, seed)
    print(f"seed {seed}: { ({each: ended.count(each) for each in sorted(set(ended))}) }")
    assert set(ended) <= {"answered", "told", "ConnectError", "ReadError", "RemoteProtocolError"}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5, 105))
def test_every_request_ends_a_hundred_times(qwen_engine, seed):
    test_every_request_ends_when_the_worker_does(qwen_engine, seed)


def test_a_slow_reader_does_not_slow_others(server):
    """A stream that nobody reads, beside one that is read."""
    body = {
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": 3000,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{server.url}/v1/chat/completions"
    with httpx.Client() as client, client.stream("POST", url, json=body, timeout=60):
        answer = httpx.post(url, json={**body, "max_tokens": 20}, timeout=60)
        assert answer.text.endswith("data: [DONE]\n\n")
