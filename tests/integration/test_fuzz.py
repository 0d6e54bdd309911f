"""Nothing that a client sends makes the server fail, hang or grow."""

import base64
import json
from pathlib import Path

import httpx
import hypothesis
import hypothesis.strategies as st
import malformed
import schemathesis
import schemathesis.checks

GROWTH_MEBIBYTES = 48
"""Allocators keep some of what a burst has used; a leak of one body each would be far more."""


def resident_mebibytes(server):
    """Memory of the server and its worker."""
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for process in (pid, *children):
        status = Path(f"/proc/{process}/status").read_text()
        total += int(status.partition("VmRSS:")[2].split()[0]) / 1024
    return total


def test_1_000_recorded_malformed_requests_give_only_4xx_and_leave_memory_flat(server):
    requests = malformed.recorded()
    assert len(requests) == 1000
    statuses = {}
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def send(request):
            answer = client.request(
                request["method"],
                request["path"],
                headers=request["headers"],
                content=base64.b64decode(request["body"]),
            )
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert 400 <= answer.status_code < 500, (request, answer.text)
            assert answer.json()["error"]["message"]
            assert "Traceback" not in answer.text

        for request in requests[:200]:
            send(request)
        before = resident_mebibytes(server)
        for request in requests:
            send(request)
        grown = resident_mebibytes(server) - before
    print(f"statuses {statuses}, memory {before:.0f} MiB {grown:+.1f} MiB")
    assert grown < GROWTH_MEBIBYTES
    assert httpx.get(f"{server.url}/readyz").status_code == 200


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=12,
)  # fmt: skip
FIELDS = [
    "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed",
    "logit_bias", "logprobs", "top_logprobs", "response_format", "stream", "stream_options",
    "presence_penalty", "ignore_eos", "return_token_ids", "tools", "user", "x",
]  # fmt: skip
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi",
        "max_tokens": 2}  # fmt: skip


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    changes=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=3),
    path=st.sampled_from([malformed.CHAT, malformed.COMPLETIONS, malformed.TOKENIZE]),
)
def test_any_value_in_any_field_is_answered_or_refused(server, changes, path):
    body = json.dumps({**GOOD, **changes, "max_tokens": 2})
    answer = httpx.post(
        f"{server.url}{path}",
        content=body,
        timeout=60,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code < 500, answer.text


def test_the_openapi_document_describes_requests_that_never_fail(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:
        _try(operation)


def _try(operation):
    @hypothesis.settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def send(case):
        if isinstance(case.body, dict):
            case.body |= {"model": "tiny", "max_tokens": 2, "max_completion_tokens": 2}
        case.call_and_validate(checks=[schemathesis.checks.not_a_server_error], timeout=60)

    send()
