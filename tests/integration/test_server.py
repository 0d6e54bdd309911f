"""The server and its engine worker as real processes."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import httpx
import openai
import pictures
import pytest
import runtime_process

QUESTION = [pictures.image_part(pictures.draw(300, 300)), {"type": "text", "text": "What is it?"}]

TWO_PLACEHOLDERS = {"type": "text", "text": "<image><image>"}


def body(**more):
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "temperature": 0,
        **more,
    }


def ask(server, **more):
    return httpx.post(
        f"{server.url}/v1/chat/completions",
        content=json.dumps(body(**more)),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_openai_client_gets_an_answer_with_usage(client):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=8, temperature=0
    )
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 256
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_equals_the_whole_answer(client):
    options = {
        "model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8,
        "temperature": 0, "extra_body": {"return_token_ids": True},
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )

    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    ids = [i for choice in choices for i in getattr(choice, "token_ids", None) or []]
    assert text == whole.choices[0].message.content
    assert ids == whole.choices[0].token_ids
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    assert chunks[-1].usage == whole.usage


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_seed_repeats_a_sampled_answer(server):
    answers = [
        ask(server, temperature=1.0, seed=seed).json()["choices"][0]["message"]["content"]
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def image_message(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


REFUSED = [
    ({"model": "gpt"}, 404, "use one of tiny"),
    ({"messages": []}, 400, "messages"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**6}, 400, "ask for at most"),
    ({"temperature": 3}, 400, "temperature"),
    ({"n": 17}, 400, "n: "),
    ({"top_logprobs": 3}, 400, "top_logprobs: needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"logit_bias": {"405": 1}}, 400, "405 is no token id"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
    ({"top_k": -2}, 400, "top_k"),
    ({"min_p": 1.5}, 400, "min_p"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"response_format": {"type": "json_schema"}}, 400, "json_schema: {name, schema}"),
    ({"response_format": {"type": "xml"}}, 400, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}},
        400,
        "the schema can not be followed",
    ),
    (
        {"response_format": {"type": "json_schema",
                             "json_schema": {"schema": {"type": "string", "maxLength": 10**9}}}},
        400,
        "maxLength is 1000000000, at most 1024",
    ),
    ({"audio": {"voice": "x"}}, 400, "audio: is not offered"),
    ({"messages": [{"role": "user", "content": "Hi"}] * 1025}, 400, "1025 messages"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, 400, "role"),
    ({"seed": 2**64}, 400, "seed"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    ({"messages": [{"role": "user", "content": "x" * 5_000_000}]}, 400, "characters"),
    ({"tools": [{"type": "function"}]}, 400, "tools: is not offered"),
    ({"messages": image_message("data:image/png;base64,aGVsbG8=")}, 400, "can not be read"),
    ({"messages": image_message("http://127.0.0.1:1/a.png")}, 400, "not public"),
    ({"messages": image_message("http://169.254.169.254/")}, 400, "metadata"),
    ({"messages": image_message("file:///etc/passwd")}, 400, "files are not read"),
    ({"messages": [{"role": "user", "content": "see <image>"}]}, 400, "0 pictures"),
    ({"messages": image_message("data:image/png;base64,!")}, 400, "not valid base64"),
    ({"messages": [{"role": "user", "content": "x " * 40_000}]}, 400, "prompt has"),
    (
        {"messages": [{"role": "user", "content": [*QUESTION, TWO_PLACEHOLDERS]}]},
        400,
        "2 <image> placeholders",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "status", "words"), REFUSED, ids=[r[2] for r in REFUSED])
def test_a_bad_request_is_told_what_is_wrong(server, change, status, words):
    answer = ask(server, **change)

    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_body_above_the_limit_is_refused_with_the_limit(server):
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=iter([b"x" * 2**20] * 65), timeout=60
    )
    assert answer.status_code == 413
    assert str(64 * 2**20) in answer.json()["error"]["message"]


def test_broken_pictures_leave_no_tiles_behind(server):
    whole = pictures.data_url(pictures.draw(300, 300))
    content = [part for url in (whole, whole[:3000]) for part in image_message(url)[0]["content"]]
    for _ in range(3):
        assert ask(server, messages=[{"role": "user", "content": content}]).status_code == 400
    assert not list(Path("/dev/shm").glob("internvl-tiles-*"))


def test_a_body_that_is_no_json_is_refused(server):
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=b"{", timeout=60)
    assert answer.status_code == 400


def test_a_picture_that_is_cut_short_is_refused_before_a_stream_begins(server):
    url = pictures.data_url(pictures.draw(300, 300))
    answer = ask(server, messages=image_message(url[:3000]), stream=True)
    assert answer.status_code == 400


def test_an_unknown_path_is_an_openai_error(server):
    answer = httpx.get(f"{server.url}/v1/nothing")
    assert answer.status_code == 404
    assert "/v1/nothing" in answer.json()["error"]["message"]


def test_metrics_are_on_their_own_port(server):
    ask(server)
    text = httpx.get(f"{server.metrics_url}/metrics").text
    assert "internvl_generation_tokens_total" in text
    assert "internvl_engine_up 1.0" in text
    assert httpx.get(f"{server.url}/metrics").status_code == 404


def test_a_client_that_leaves_frees_the_engine(server):
    with (
        httpx.Client(timeout=60) as client,
        client.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json=body(stream=True, max_tokens=30_000, temperature=1.0, seed=3),
        ) as stream,
    ):
        next(stream.iter_lines())

    started = time.monotonic()
    assert ask(server).status_code == 200
    assert time.monotonic() - started < 30


def worker_of(server):
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    for child in map(int, children.split()):
        if b"engine.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise AssertionError("no worker")


def test_a_killed_worker_ends_its_stream_with_an_error_and_then_the_server(qwen_engine):
    endless = body(stream=True, max_tokens=30_000, temperature=1.0, seed=3)
    with (
        runtime_process.serve(qwen_engine) as server,
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=endless) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        os.kill(worker_of(server), signal.SIGKILL)

        *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert server.process.wait(timeout=30) == 80


def test_sigterm_ends_server_and_worker_cleanly(qwen_engine):
    with runtime_process.serve(qwen_engine) as server:
        worker = worker_of(server)
        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(timeout=30) == 0
        assert not Path(f"/proc/{worker}").exists()


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
def test_a_port_that_is_taken_is_told(qwen_engine, tmp_path, setting):
    told = tmp_path / "told"
    told.touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"termination_log": str(told), setting: port}
        with runtime_process.serve(qwen_engine, wait=False, **settings) as server:
            assert server.process.wait(timeout=30) == 80
    said = json.loads(told.read_text())["message"]
    assert said.startswith(f"INTERNVL_RUNTIME_{setting.upper()}={port} can not be listened on")
    assert "Address already in use" in said


def test_another_version_of_torch_is_refused_in_seconds(qwen_engine, tmp_path):
    other = tmp_path / "engines" / "copy"
    other.mkdir(parents=True)
    log = tmp_path / "termination"
    log.touch()
    manifest = json.loads((qwen_engine / "manifest.json").read_text())
    manifest["inputs"]["versions"]["torch"] = "1.0"
    published = republish(manifest, qwen_engine, tmp_path)

    done = runtime_process.run("serve", "--engine", published, cache=tmp_path, termination_log=log)

    assert done.returncode == 81
    told = json.loads(log.read_text())
    assert told["reason"] == "EngineIncompatible"
    assert "1.0" in told["message"]


def republish(manifest, engine, root):
    from internvl_runtime.store import cache, keys

    inputs = manifest["inputs"]
    store = cache.Cache(root)
    key = keys.key_of(keys.Kind.ENGINES, inputs)
    with store.workspace(keys.Kind.ENGINES, key) as workspace:
        (workspace / "verification.json").write_bytes((engine / "verification.json").read_bytes())
        return store.publish(workspace, kind=keys.Kind.ENGINES, inputs=inputs).path
