"""The load tool against a real server, and against one whose delays are known; guidellm beside it.

guidellm has an environment of its own, which `make test-long` makes.
"""

import asyncio
import json
import os
import socket
import subprocess
import threading
from pathlib import Path

import fastapi
import pytest
import runtime_process
import uvicorn
from internvl_runtime.bench import scenarios

FIRST_SECONDS, NEXT_SECONDS, TOKENS = 0.3, 0.03, 40
GUIDELLM = Path(".venv-guidellm/bin/guidellm")
REQUESTS = 24


def bench(url, *arguments):
    return runtime_process.run("bench", "--url", url, *arguments, cache="/nonexistent")


def report_of(folder):
    assert (folder / "report.md").read_text().startswith("# Load report")
    assert (folder / "run.svg").stat().st_size > 1000
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("scenario", list(scenarios.Scenario))
def test_a_server_is_measured(server, tmp_path, scenario):
    done = bench(
        server.url, "--scenario", scenario, "--requests", 6, "--warmup", 1, "--concurrency", 3,
        "--max-tokens", 9, "--picture", "500x300", "--words", 12, "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    turns = 2 if scenario is scenarios.Scenario.TURNS else 1
    summary = report["summary"]
    assert (summary["requests"], summary["failed"]) == (6 * turns, 0)
    assert summary["completion_tokens"] == 6 * turns * 9
    assert len(report["turns"]) == turns
    if turns == 2:
        assert report["turns"][1]["cached_tokens"] > report["turns"][0]["prompt_tokens"] * 0.9
    elif scenario is scenarios.Scenario.PICTURE:
        assert summary["cached_tokens"] < summary["prompt_tokens"] / 4, "pictures are unique"


def test_failures_are_told_and_fail_the_run(server):
    done = bench(
        server.url, "--requests", 2, "--warmup", 0, "--model", "other", "--scenario", "text"
    )
    assert done.returncode == 80
    assert "2 requests failed" in done.stderr
    assert "404" in done.stderr
    assert "Traceback" not in done.stderr


def test_conversations_are_reproducible_and_unique():
    shape = scenarios.Shape(width=64, height=48, words=5)

    def write(seed, number):
        return scenarios.write_conversation("picture", shape, seed=seed, number=number)

    assert write(1, 2) == write(1, 2)
    assert len({str(write(seed, number)) for seed in range(3) for number in range(3)}) == 9


@pytest.fixture
def scripted():
    """A server that sends a first token after 300 ms and one every 30 ms then."""
    app = fastapi.FastAPI()

    @app.get("/health")
    async def tell_health():
        return {}

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [{"id": "scripted", "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def answer():
        return fastapi.responses.StreamingResponse(events(), media_type="text/event-stream")

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


async def events():
    loop = asyncio.get_running_loop()
    began = loop.time()
    yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    for number in range(TOKENS):
        await asyncio.sleep(began + FIRST_SECONDS + NEXT_SECONDS * number - loop.time())
        yield event(choices=[{"index": 0, "delta": {"content": "x"}}])
    yield event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": TOKENS})
    yield "data: [DONE]\n\n"


def event(**body):
    return f"data: {json.dumps(body)}\n\n"


@pytest.mark.long
@pytest.mark.parametrize("arguments", [("--concurrency", 8), ("--rate", 12)])
def test_known_delays_are_measured_within_three_percent(scripted, tmp_path, arguments):
    done = bench(scripted, "--scenario", "text", "--requests", 64, "--output", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    summary = report_of(tmp_path)["summary"]
    print(summary)
    assert summary["completion_tokens"] == 64 * TOKENS
    assert summary["time_to_first_token"]["p50"] == pytest.approx(FIRST_SECONDS, rel=0.03)
    assert summary["inter_token_latency"]["p50"] == pytest.approx(NEXT_SECONDS, rel=0.03)
    assert summary["time_per_output_token"]["p50"] == pytest.approx(NEXT_SECONDS, rel=0.03)


def drive_with_guidellm(url, tokenizer, folder, *, data):
    """Sends REQUESTS requests, four at a time; returns those that were answered."""
    if not GUIDELLM.exists():
        pytest.skip("there is no .venv-guidellm: run make test-long")
    output = folder / "guidellm.json"
    subprocess.run(
        [
            GUIDELLM.absolute(), "run", "--disable-progress",
            "--backend", f"kind=openai_http,target={url},request_format=/v1/chat/completions",
            "--profile", "kind=concurrent,streams=[4]",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
            "--data", data, "--output", f"kind=json,path={output}",
        ],
        check=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    (benchmark,) = json.loads(output.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0)
    return benchmark["requests"]["successful"]


@pytest.mark.long
@pytest.mark.parametrize(
    "data",
    [
        "kind=synthetic_text,prompt_tokens=50,output_tokens=16",
        "kind=synthetic_image,width=600,height=400,output_tokens=16",
    ],
)
def test_an_outside_client_drives_the_server(server, qwen_engine, tmp_path, data):
    answered = drive_with_guidellm(server.url, qwen_engine / "model", tmp_path, data=data)
    assert [each["output_tokens"] for each in answered] == [16] * REQUESTS


@pytest.mark.long
def test_an_outside_client_counts_the_same_tokens(scripted, qwen_engine, tmp_path):
    answered = drive_with_guidellm(
        scripted, qwen_engine / "model", tmp_path,
        data="kind=synthetic_text,prompt_tokens=50,output_tokens=16",
    )  # fmt: skip
    done = bench(scripted, "--scenario", "text", "--requests", REQUESTS, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    summary = report_of(tmp_path)["summary"]
    for count in ("prompt_tokens", "output_tokens"):
        ours = summary[count.replace("output", "completion")]
        assert ours == sum(each[count] for each in answered)
