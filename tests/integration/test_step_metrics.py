"""What the server tells of its engine: metrics, the step log, usage."""

import json

import httpx
import pictures
import pytest
import runtime_process
from prometheus_client import parser

TURN = [{"type": "text", "text": "what is this?"}, pictures.image_part(pictures.draw(600, 300))]


@pytest.fixture(scope="module")
def logged(qwen_engine, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "steps.jsonl"
    with runtime_process.serve(qwen_engine, arguments=("--step-log", log)) as server:
        yield server, log


def ask(server, messages, **options):
    body = {"messages": messages, "max_tokens": 20, "ignore_eos": True, "temperature": 0, **options}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def metrics_of(server):
    text = httpx.get(f"{server.metrics_url}/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_second_turn_is_told_as_cached_and_runs_no_tower(logged):
    server, log = logged
    messages = [{"role": "user", "content": TURN}]
    first = ask(server, messages)
    before = metrics_of(server)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert before["internvl_vision_tiles_total",] == 3
    said = first["choices"][0]["message"]["content"]
    later = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "and?"}]
    second = ask(server, later)
    after = metrics_of(server)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] // 16 * 16
    for name in ("internvl_vision_tiles_total", "internvl_vision_passes_total"):
        assert after[name,] == before[name,]
    assert after["internvl_picture_cache_hits_total",] == 1
    assert after["internvl_picture_cache_queries_total",] == 2
    assert after["internvl_prefix_cache_hits_total",] == cached
    assert after["internvl_time_to_first_token_seconds_count",] == 2
    assert after["internvl_request_queue_time_seconds_count",] == 2
    assert after["internvl_inter_token_latency_seconds_count",] == 2 * 19
    assert after["internvl_generation_tokens_total",] == 40
    assert after["internvl_requests_admitted",] == 0
    assert after["internvl_step_seconds_count", "decode"] >= 38
    assert after["internvl_kv_cache_blocks",] > after["internvl_kv_cache_blocks_used",]

    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(step["decodes"] for step in steps) == 38
    assert sum(step["tiles"] for step in steps) == 3
    assert [step["began"] for step in steps] == sorted(step["began"] for step in steps)


def test_the_step_log_becomes_a_plot(logged, tmp_path):
    server, log = logged
    ask(server, [{"role": "user", "content": "once more"}])
    plot = tmp_path / "steps.svg"
    done = runtime_process.run("plot-steps", log, "--output", plot, cache="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert plot.read_text().lstrip().startswith("<?xml")


def test_a_request_with_priority_is_served_first(logged):
    server, _ = logged
    answer = ask(server, [{"role": "user", "content": "quick"}], priority=-5)
    assert answer["usage"]["completion_tokens"] == 20
    body = {"messages": [{"role": "user", "content": "x"}], "priority": 1000}
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
