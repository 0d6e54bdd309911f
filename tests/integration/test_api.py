"""The OpenAI API with the clients that people use, against a real server."""

import base64
import concurrent.futures
import contextlib
import functools
import http.server
import json
import re
import signal
import threading
import time

import httpx
import langchain_core.messages
import langchain_openai
import openai
import openai.types.chat
import pictures
import pytest
import runtime_process

pytestmark = pytest.mark.parametrize(
    "engine", [("PyTorch", 1), ("TensorRT", 1), ("TensorRT", 2)], ids=lambda it: f"{it[0]}-{it[1]}",
    indirect=True,
)  # fmt: skip
PICTURE = pictures.draw(300, 300)
WIDE = pictures.draw(640, 360)
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is in the picture?"}],
       "max_tokens": 12, "temperature": 0}  # fmt: skip
CHAT = openai.types.chat.ChatCompletion
CHUNK = openai.types.chat.ChatCompletionChunk
TEXT = openai.types.Completion


def post(server, path="/v1/chat/completions", headers=None, **body):
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)


def chat(server, **more):
    answer = post(server, **{**ASK, **more})
    assert answer.status_code == 200, answer.text
    return CHAT.model_validate(answer.json(), strict=True)


def stream(server, path="/v1/chat/completions", **body):
    """Return the events of a stream as JSON; the last one must be [DONE]."""
    with httpx.stream(
        "POST", f"{server.url}{path}", json={**body, "stream": True}, timeout=60
    ) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.fixture(scope="module")
def server(engine):
    with runtime_process.serve(engine) as running:
        yield running


@pytest.fixture(scope="module")
def refused(engine):
    """The fields that the engine's executor can not do, of docs/tensorrt.md."""
    manifest = json.loads((engine / "manifest.json").read_text())
    is_tensorrt = manifest["inputs"]["backend"] == "TensorRT"
    return {"top_logprobs", "logit_bias", "response_format"} if is_tensorrt else set()


def is_refused(server, refused, path="/v1/chat/completions", field=None, **body):
    """Whether a request has a refused field, which must be a 400 that names it."""
    fields = {field} & refused if field else body.keys() & refused
    if not fields:
        return False
    answer = post(server, path, **body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] in fields
    assert error["message"] == f"{error['param']} is not offered by this engine; leave it out"
    return True


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


WAYS = [
    {},
    {"n": 3, "temperature": 1.0, "seed": 4},
    {"logprobs": True, "top_logprobs": 4},
    {"logprobs": True, "n": 2, "temperature": 0.7, "seed": 1},
    {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 2, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"max_completion_tokens": 5, "ignore_eos": True},
    {"stop": ["e", "o"], "temperature": 1.0, "seed": 3, "max_tokens": 60},
    {"logit_bias": {"100": 100}},
    {"user": "someone", "metadata": {"a": "b"}, "store": False},
]


def without_cache(usage):
    """Token counts but for those that the request before has left in the cache."""
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


def assert_equal_but_for_rounding(told, expected):
    """Another batch sums in another order."""

    def split(value):
        numbers = []
        rest = json.loads(json.dumps(value), parse_float=lambda text: numbers.append(float(text)))
        return rest, numbers

    (rest, numbers), (expected_rest, expected_numbers) = split(told), split(expected)
    assert rest == expected_rest
    assert numbers == pytest.approx(expected_numbers, abs=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "plain")
def test_a_stream_equals_the_whole_answer_in_every_way(server, refused, way):
    options = {**ASK, **way, "return_token_ids": True}
    if is_refused(server, refused, **options):
        return
    whole = chat(server, **options)
    chunks = stream(server, **options, stream_options={"include_usage": True})
    for chunk in chunks:
        CHUNK.model_validate(chunk, strict=True)

    assert without_cache(chunks[-1]["usage"]) == without_cache(whole.usage.model_dump())
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice.index]
        assert "".join(p["delta"].get("content") or "" for p in parts) == choice.message.content
        assert [i for p in parts for i in p.get("token_ids", [])] == choice.token_ids
        assert parts[-1]["finish_reason"] == choice.finish_reason
        told = [entry for p in parts if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert_equal_but_for_rounding(
            told, choice.logprobs.model_dump()["content"] if choice.logprobs else []
        )


def test_answers_of_one_prompt_differ_and_can_be_repeated(server):
    options = {"n": 3, "temperature": 1.0, "seed": 9, "ignore_eos": True}
    first, second = (chat(server, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    assert first.usage.completion_tokens == 36
    assert first.usage.prompt_tokens == chat(server).usage.prompt_tokens


def test_a_stop_text_ends_the_answer_before_it(server):
    free = chat(server, max_tokens=40).choices[0].message.content
    stop = free[10:13]
    answer = chat(server, max_tokens=40, stop=stop).choices[0]
    assert answer.message.content == free[: free.find(stop)]
    assert answer.finish_reason == "stop"


def test_bias_decides_the_token(server, refused):
    options = {**ASK, "logit_bias": {"70": 100}, "max_tokens": 4, "return_token_ids": True}
    if is_refused(server, refused, **options):
        return
    answer = chat(server, **options)
    assert answer.choices[0].token_ids == [70] * 4


def test_log_probabilities_are_ordered_and_hold_the_chosen_token(server, refused):
    options = {**ASK, "logprobs": True, "top_logprobs": 3}
    if is_refused(server, refused, **options):
        return
    (choice,) = chat(server, **options).choices
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert [t.logprob for t in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 9,
                                                                  "minimum": 0}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}  # fmt: skip


def test_an_answer_follows_a_json_schema(server, refused):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    options = {**ASK, "response_format": form, "max_tokens": 200}
    if is_refused(server, refused, **options):
        return
    answer = chat(server, **{**options, "temperature": 1.0, "seed": 1, "n": 3})
    for choice in answer.choices:
        made = json.loads(choice.message.content)
        assert made["colour"] in {"red", "green"}
        assert 0 <= made["count"] <= 9
        assert choice.finish_reason == "stop"


def test_an_answer_is_a_json_object(server, refused):
    # Random weights rarely close a text: a bias towards quotes and braces does.
    bias = {str(byte): 30 for byte in tokens_of(server, '"}')}
    options = {**ASK, "response_format": {"type": "json_object"}, "logit_bias": bias}
    if is_refused(server, refused, **options):
        return
    answer = chat(server, **{**options, "temperature": 1.0, "seed": 1, "max_tokens": 300})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def tokens_of(server, text):
    return post(server, "/tokenize", prompt=text).json()["tokens"]


def test_completions_continue_texts_and_token_ids(server, refused):
    text = "the picture shows"
    body = {"model": "tiny", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    path = "/v1/completions"
    if is_refused(server, refused, path, field="top_logprobs", prompt=text, **body):
        body["logprobs"] = 0
    whole = post(server, "/v1/completions", prompt=text, **body)
    answer = TEXT.model_validate(whole.json(), strict=True)
    by_ids = post(server, "/v1/completions", prompt=tokens_of(server, text), **body)

    assert by_ids.json()["choices"] == whole.json()["choices"]
    assert answer.usage.prompt_tokens == len(tokens_of(server, text))
    assert len(answer.choices[0].logprobs.tokens) == 6
    assert "".join(answer.choices[0].logprobs.tokens) == answer.choices[0].text

    chunks = stream(server, "/v1/completions", prompt=text, **body)
    for chunk in chunks:
        # The client's type wants a reason in every chunk; OpenAI itself sends null before the last.
        (choice,) = chunk["choices"]
        known = {
            **chunk,
            "choices": [choice | {"finish_reason": choice["finish_reason"] or "stop"}],
        }
        TEXT.model_validate(known, strict=True)
    assert "".join(c["choices"][0]["text"] for c in chunks) == answer.choices[0].text
    offsets = [o for c in chunks for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == answer.choices[0].logprobs.text_offset


def test_completions_of_several_prompts_keep_their_order(server):
    body = {"model": "tiny", "temperature": 0}
    prompts = ["the red circle", "a blue"]
    both = post(server, "/v1/completions", prompt=prompts, n=2, **body).json()
    alone = [post(server, "/v1/completions", prompt=p, **body).json() for p in prompts]

    texts = [choice["text"] for choice in sorted(both["choices"], key=lambda c: c["index"])]
    assert texts == [alone[0]["choices"][0]["text"]] * 2 + [alone[1]["choices"][0]["text"]] * 2
    assert both["usage"]["prompt_tokens"] == sum(a["usage"]["prompt_tokens"] for a in alone)
    assert both["usage"]["completion_tokens"] == 4 * 16


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([[]], "empty"),
        ([10**6], "no token id"),
        (["a"] * 17, "at most 16"),
    ],
)  # fmt: skip
def test_bad_prompts_are_told(server, prompt, words):
    answer = post(server, "/v1/completions", model="tiny", prompt=prompt)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_tokenize_tells_what_a_request_would_use(server):
    told = post(server, "/tokenize", messages=ASK["messages"]).json()
    assert told["count"] == len(told["tokens"]) == chat(server).usage.prompt_tokens
    assert told["max_model_len"] == 32768
    assert post(server, "/tokenize", prompt="a", messages=ASK["messages"]).status_code == 400


def test_models_and_version(server, client):
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404
    assert re.fullmatch(r"\d+\.\d+\.\d+", httpx.get(f"{server.url}/version").json()["version"])


def test_a_request_id_comes_back_and_a_bad_one_is_replaced(server):
    given = httpx.get(f"{server.url}/version", headers={"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    bad = httpx.get(f"{server.url}/version", headers={"X-Request-ID": "a b\u00e9"[:3]})
    assert re.fullmatch("[0-9a-f]{32}", bad.headers["x-request-id"])


def test_unknown_fields_are_ignored_and_counted(server):
    def counted():
        text = httpx.get(f"{server.metrics_url}/metrics").text
        return float(re.search(r"^internvl_ignored_fields_total (\S+)", text, re.M)[1])

    before = counted()
    chat(server, fancy_new_field=1, another={"a": 1}, user="me")
    assert counted() == before + 2


def test_cors_is_off(server):
    answer = httpx.get(f"{server.url}/version", headers={"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in answer.headers


def prompt_tokens(server, parts):
    messages = [{"role": "user", "content": parts}]
    return post(server, "/tokenize", messages=messages).json()["count"]


def test_detail_and_patch_limits_decide_the_tiles(server):
    def part(inner=None, outer=None):
        made = pictures.image_part(WIDE)
        return {**made, "image_url": {**made["image_url"], **(inner or {})}, **(outer or {})}

    plain = prompt_tokens(server, [part()])
    low = prompt_tokens(server, [part({"detail": "low"})])
    assert plain - low == 2 * 256
    assert prompt_tokens(server, [part({"detail": "high"})]) == plain
    assert prompt_tokens(server, [part({"max_dynamic_patch": 1})]) == low
    assert prompt_tokens(server, [part(None, {"max_dynamic_patch": 1})]) == low
    refused = post(
        server,
        **{**ASK, "messages": [{"role": "user", "content": [part({"max_dynamic_patch": 13})]}]},
    )
    assert refused.status_code == 400
    assert "max_dynamic_patch is 13" in refused.json()["error"]["message"]


def test_too_many_urls_are_refused_before_any_is_fetched(server):
    urls = [f"http://127.0.0.1:1/{number}.png" for number in range(53)]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    answer = post(server, **{**ASK, "messages": [{"role": "user", "content": parts}]})
    assert "53 URLs" in answer.json()["error"]["message"]


def test_many_pictures_are_bounded_by_their_tiles(server):
    low = pictures.image_part(PICTURE)
    assert prompt_tokens(server, [low] * 52) > 52 * 256
    answer = post(server, **{**ASK, "messages": [{"role": "user", "content": [low] * 53}]})
    assert "53 tiles" in answer.json()["error"]["message"]


@contextlib.contextmanager
def files_at(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_pictures_come_from_data_web_and_files_alike(engine, tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    content = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    with (
        files_at(tmp_path) as site,
        runtime_process.serve(
            engine, media_folder=str(tmp_path), fetch_private_hosts=["127.0.0.1"]
        ) as server,
    ):
        urls = [f"data:image/png;base64,{content}", f"{site}/picture.png",
                f"file://{tmp_path}/picture.png"]  # fmt: skip
        messages = [
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
            for url in urls
        ]
        answers = [chat(server, messages=m).choices[0].message.content for m in messages]
        missing = post(server, **{**ASK, "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": f"{site}/nothing.png"}}]}]})  # fmt: skip
    assert answers[0] == answers[1] == answers[2]
    assert missing.status_code == 400
    assert "status 404" in missing.json()["error"]["message"]


def test_a_video_is_one_more_content_part(server):
    url = "data:video/mp4;base64," + base64.b64encode(pictures.film(12)).decode()
    part = {"type": "video_url", "video_url": {"url": url, "num_frames": 4}}
    text = {"type": "text", "text": "What happens?"}
    lines = "".join(f"Frame{n}: " + "\n" for n in range(1, 5))
    without = prompt_tokens(server, [{"type": "text", "text": lines + "What happens?"}])
    tokens = prompt_tokens(server, [part, text])
    # Each frame: 256 tokens between <img> and </img>, and a line that is cut in two.
    assert tokens - without >= 4 * 258
    assert chat(server, messages=[{"role": "user", "content": [part, text]}])
    many = post(server, **{**ASK, "messages": [{"role": "user", "content": [part] * 5}]})
    assert "more than 4 videos" in many.json()["error"]["message"]
    part["video_url"]["num_frames"] = 33
    answer = post(server, **{**ASK, "messages": [{"role": "user", "content": [part]}]})
    assert "num_frames is 33; at most 32" in answer.json()["error"]["message"]


def test_langchain_works_unmodified(server):
    model = langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", temperature=0, max_tokens=8
    )
    message = langchain_core.messages.HumanMessage(
        content=[{"type": "text", "text": "What is it?"}, pictures.image_part(PICTURE)]
    )
    whole = model.invoke([message])
    streamed = "".join(chunk.content for chunk in model.stream([message]))
    assert whole.content == streamed
    assert whole.usage_metadata["output_tokens"] == 8


def test_the_openai_client_streams_in_parallel(client):
    def read(_):
        chunks = client.chat.completions.create(**ASK, stream=True)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(read, range(16)))) == 1


def test_keys_are_needed_where_they_are_set_and_change_at_once(engine, tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    with runtime_process.serve(engine, api_keys_file=str(file)) as server:
        url = f"{server.url}/v1/models"
        refused = httpx.get(url)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        for key in ("one", "two"):
            assert httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/healthz", "/readyz"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        assert httpx.get(f"{server.metrics_url}/metrics").status_code == 200
        file.write_text("three\n")
        assert httpx.get(url, headers={"Authorization": "Bearer one"}).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer three"}).status_code == 200


def test_beyond_the_queue_is_a_429_with_retry_after(engine):
    endless = {**ASK, "max_tokens": 30_000, "ignore_eos": True, "stream": True}
    with runtime_process.serve(engine, max_queued_requests=1) as server:
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=endless, timeout=60) as running:
            lines = running.iter_lines()
            next(lines)
            answer = post(server, **ASK)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"


def test_after_sigterm_requests_are_served_until_propagation_is_over(engine):
    with runtime_process.serve(engine, propagation_seconds=2, drain_seconds=300) as server:
        url = f"{server.url}/v1/chat/completions"
        long = {**ASK, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url, json=long, timeout=60) as running:
            lines = running.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            _wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
            assert httpx.get(f"{server.url}/healthz").status_code == 200
            served = httpx.get(f"{server.url}/v1/models")
            assert served.status_code == 200
            assert served.headers["connection"] == "close"
            _wait_for(lambda: _closed(server))
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(timeout=60) == 0


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_stream_beyond_the_drain_is_told(engine, signals, capfd):
    seconds = 1 if signals == 1 else 300
    with runtime_process.serve(engine, drain_seconds=seconds) as server:
        endless = {**ASK, "max_tokens": 30_000, "ignore_eos": True, "stream": True}
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=endless, timeout=60) as running:
            lines = (line for line in running.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            if signals > 1:
                _wait_for(lambda: _closed(server))
                server.process.send_signal(signal.SIGTERM)
            *_, last = lines
        error = json.loads(last.removeprefix("data: "))["error"]
        assert ("longer than the 1 s" if signals == 1 else "told twice to end") in error["message"]
        assert server.process.wait(timeout=60) == 0
    assert "Traceback" not in capfd.readouterr().err


def _closed(server):
    answer = httpx.get(f"{server.url}/v1/models")
    if answer.status_code == 200:
        return False
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert answer.headers["connection"] == "close"
    return True


def _wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
