"""Keys, draining, bounds: the parts around the routes."""

import asyncio

import pytest
import starlette.exceptions
from internvl_runtime import errors
from internvl_runtime.server import drain, keys, limits, streaming

FINE = [
    b"{}", b'{"a": [[1], {"b": []}]}', b'"[[[["' * 100, b'{"a": "\\"' + b"[" * 100 + b'"}',
    b"[" * 64 + b"]" * 64, b'"' + b"a" * 10_000_000 + b'"', b'"' + b"[" * 100,
    b'"' + b'\\"' * 1_000_000,
]  # fmt: skip
REFUSED = [(b"[" * 65, "deeper than 64"), (b"[[]," * 50_001, "deeper than 64"),
           (b"[" + b"[]," * 200_000, "more than 200000")]  # fmt: skip


@pytest.mark.parametrize("body", FINE, ids=lambda body: repr(body[:12]))
def test_brackets_in_texts_do_not_count_and_no_text_takes_long(body):
    limits.check_shape(body)


@pytest.mark.parametrize(("body", "words"), REFUSED, ids=lambda value: repr(value[:14]))
def test_depth_and_number_of_brackets_are_bounded(body, words):
    with pytest.raises(starlette.exceptions.HTTPException) as caught:
        limits.check_shape(body)
    assert words in caught.value.detail


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# first\nalpha\n\nbeta\n")
    return path


def test_any_of_the_keys_is_accepted(key_file):
    known = keys.ApiKeys(key_file)
    assert known.accepts("Bearer alpha")
    assert known.accepts("bearer beta")
    for wrong in ("", "alpha", "Bearer", "Bearer ", "Bearer alph", "Bearer # first", "Basic alpha"):
        assert not known.accepts(wrong)


def test_a_changed_file_counts_at_once(key_file):
    known = keys.ApiKeys(key_file)
    fresh = key_file.with_name("fresh")
    fresh.write_text("gamma\n")
    fresh.replace(key_file)
    assert known.accepts("Bearer gamma")
    assert not known.accepts("Bearer alpha")


def test_a_file_that_is_gone_leaves_the_last_keys_in_force(key_file):
    known = keys.ApiKeys(key_file)
    key_file.unlink()
    assert known.accepts("Bearer alpha")
    assert not known.accepts("Bearer other")


def test_a_file_that_is_no_text_leaves_the_last_keys_in_force(key_file):
    known = keys.ApiKeys(key_file)
    key_file.write_bytes(b"\xff\xfe")
    assert known.accepts("Bearer alpha")


@pytest.mark.parametrize("content", [None, "", "# nothing\n"])
def test_a_server_without_any_key_does_not_start(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(errors.StageError, match="API key"):
        keys.ApiKeys(path)


async def test_a_drain_waits_for_propagation_and_for_running_requests():
    draining = drain.Drain()
    draining.enter()
    leaving = asyncio.create_task(draining.leave(propagation_seconds=0.05, finish_seconds=5))
    await asyncio.sleep(0)
    assert draining.phase is drain.Phase.LEAVING
    draining.enter()
    await asyncio.sleep(0.1)
    assert draining.phase is drain.Phase.CLOSED
    draining.exit()
    await asyncio.sleep(0)
    assert not leaving.done()
    draining.exit()
    await asyncio.wait_for(leaving, 1)


async def test_a_drain_ends_when_its_time_is_up():
    draining = drain.Drain()
    draining.enter()
    await asyncio.wait_for(draining.leave(propagation_seconds=0, finish_seconds=0.05), 1)


async def test_a_client_that_does_not_read_its_stream_counts_as_gone():
    ended = []

    async def endless():
        try:
            while True:
                yield "data: {}\n\n"
        finally:
            ended.append("events")

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    events, deltas = endless(), endless()
    await anext(deltas)
    response = streaming.EventResponse(events, deltas, stalled_seconds=0.05)
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    await asyncio.wait_for(response(scope, asyncio.Event().wait, send), 5)
    assert ended == ["events"] * 2
