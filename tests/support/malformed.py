"""Malformed requests: a seeded fuzz run, recorded so that every run sends the same bytes.

    python tests/support/malformed.py

writes tests/data/malformed-requests.jsonl.gz. Each line is one request:
method, path, headers and the body in base64. Every
mutation is wrong by construction; pictures are broken until Pillow refuses them.
"""

import base64
import copy
import gzip
import io
import json
import random
from pathlib import Path

import numpy as np
import PIL.Image

SEED = 2025
COUNT = 1000
RECORDED = Path(__file__).resolve().parent.parent / "data" / "malformed-requests.jsonl.gz"
CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
_JSON = {"Content-Type": "application/json"}
_WRONG = [None, True, -1, 1.5, 10**30, "", "x", "\u0000", [], {}, [[]], {"a": 1}, "💥" * 20]
_RANGES = {
    "max_tokens": (0, -1, 10**9, 1.5, "many"),
    "temperature": (-0.1, 2.1, "hot", []),
    "top_p": (-1, 0, 1.1, "p"),
    "top_k": (-2, 1.5, 2**40),
    "min_p": (-0.1, 1.1),
    "n": (0, -1, 17, 1.5, "two"),
    "seed": (2**64, 1.5, "s"),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, -1, 11),
    "logit_bias": ({"a": 1}, {"1": 101}, {"-1": 1}, {"999999": 1}, [1], "b"),
    "stop": ("", [""], ["a"] * 17, 7, ["x" * 257]),
    "stream": ("maybe", 7, [1]),
    "stream_options": (7, [1]),
    "response_format": (7, {"type": "xml"}, {"type": "json_schema"}, {}),
    "tools": ([{"type": "function"}], 7),
    "audio": ({"voice": "x"},),
    "model": (7, "other", ["tiny"], {}),
}


def recorded():
    """Return the recorded requests."""
    return [json.loads(line) for line in gzip.decompress(RECORDED.read_bytes()).splitlines()]


def record():
    """Return the requests."""
    rng = random.Random(SEED)
    makers = [_wrong_field, _wrong_message, _wrong_part, _wrong_picture, _wrong_url, _broken_bytes,
              _wrong_place, _wrong_schema, _too_much]  # fmt: skip
    return [rng.choice(makers)(rng) for _ in range(COUNT)]


def _chat(**more):
    message = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    return {"model": "tiny", "messages": [message], "max_tokens": 2, **more}


def _request(body, path=CHAT, method="POST", headers=None):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {
        "method": method,
        "path": path,
        "headers": _JSON if headers is None else headers,
        "body": base64.b64encode(raw).decode(),
    }


def _wrong_field(rng):
    name = rng.choice(list(_RANGES))
    if rng.random() < 0.3 and name not in {"audio", "tools"}:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 2, name: rng.choice(_RANGES[name])}
        return _request(body, COMPLETIONS)
    return _request(_chat(**{name: rng.choice(_RANGES[name])}))


def _wrong_message(rng):
    body = _chat()
    wrong = rng.choice(
        [
            [], None, "Hi", [7], [None], [{}], [{"role": "user", "content": 7}],
            [{"role": "wizard", "content": "Hi"}], [{"content": "Hi"}],
            [{"role": "user", "content": ["Hi"]}], [{"role": 7, "content": "Hi"}],
            [{"role": "user", "content": "a" + "\ud800" * rng.randint(1, 3)}],
            [{"role": "user", "content": "<image>" * rng.randint(1, 5)}],
        ]
    )  # fmt: skip
    return _request({**body, "messages": wrong})


def _wrong_part(rng):
    part = rng.choice(
        [
            {"type": "text"}, {"type": "text", "text": rng.choice([None, 7, [], {}])},
            {"type": "image_url"},
            {"type": "image_url", "image_url": rng.choice([None, 7, [], {}])},
            {"type": "image_url", "image_url": {"url": rng.choice([None, 7, [], {}])}},
            {"type": "image_url", "image_url": {"url": _good_url(), "detail": "extreme"}},
            {"type": "image_url", "image_url": {"url": _good_url()},
             "max_dynamic_patch": rng.choice([0, -1, 13, 10**6])},
            {"type": "video_url", "video_url": {"url": _good_url()}},
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA",
                                                "num_frames": rng.choice([0, -1, 33, 10**6])}},
            {"type": rng.choice(["", "audio", "image", None, 7, "text\u0000"])}, {},
        ]
    )  # fmt: skip
    return _request(_chat(messages=[{"role": "user", "content": [part]}]))


def _wrong_picture(rng):
    content = bytearray(_picture_bytes(rng))
    while _is_readable(bytes(content)):
        if rng.random() < 0.5:
            del content[rng.randrange(len(content) // 2 + 1) :]
        else:
            for _ in range(1 + len(content) // 50):
                content[rng.randrange(len(content))] = rng.randrange(256)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return _request(_with_url(url, rng))


def _wrong_url(rng):
    url = rng.choice(
        [
            "", "x", "data:", "data:image/png", "data:image/png,abc", "data:image/png;base64,%%%",
            "data:image/png;base64,", "http://", "http://127.0.0.1/", "http://[::1]:80/",
            "http://169.254.169.254/latest/", "https://10.1.2.3/a.png", "file:///etc/passwd",
            "file://", "gopher://a/", "http://localhost:22/", "http://0/", "http://a:b@127.0.0.1/",
            "http://[::ffff:127.0.0.1]/", "http://\u0000/", "http://a b/", "HTTP://127.1/", "//a/b",
            "javascript:alert(1)", "data:image/png;base64," + "A" * rng.randint(1, 200),
        ]
    )  # fmt: skip
    return _request(_with_url(url, rng))


def _broken_bytes(rng):
    whole = bytearray(json.dumps(_chat()).encode())
    kind = rng.randrange(5)
    if kind == 0:
        del whole[rng.randrange(len(whole)) :]
    elif kind == 1:
        whole[rng.randrange(len(whole))] = rng.choice(b"\x00\x01\x80\xff")
    elif kind == 2:
        whole = bytearray(rng.choice([b"[", b"{"]) * rng.randint(65, 5000))
    elif kind == 3:
        whole = bytearray(rng.randbytes(rng.randint(1, 300)))
    else:
        number = rng.choice([b"NaN", b"Infinity", b"-Infinity", b"1" * 5000, b"1e999"])
        whole = bytearray(whole.replace(b'"max_tokens": 2', b'"max_tokens": ' + number))
    return _request(bytes(whole))


def _wrong_place(rng):
    path, method = rng.choice(
        [
            ("/v1/chat/completions", "GET"), ("/v1/chat/completions", "DELETE"),
            ("/v1/completions", "PUT"), ("/v1/embeddings", "POST"), ("/v1/models/none", "GET"),
            ("/v1//chat/completions", "POST"), ("/" + "a" * rng.randint(1, 2000), "GET"),
            ("/%00", "GET"), ("/..%2f..%2fetc/passwd", "GET"), ("/metrics", "GET"),
            ("/tokenize", "POST"), ("/v1/models", "POST"),
        ]
    )  # fmt: skip
    body = {"prompt": "a", "messages": []} if path == TOKENIZE else _chat()
    return _request(body, path, method)


def _wrong_schema(rng):
    schema = rng.choice(
        [
            {"type": "cat"}, {"$ref": "#/nothing"}, {"minLength": 10**9, "type": "string"}, 7, None,
            {"type": "array", "maxItems": 10**12}, {"type": "object", "properties": 7}, [],
            {"type": "string", "pattern": "("},
        ]
    )  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _request(_chat(response_format=form))


def _too_much(rng):
    kind = rng.randrange(4)
    if kind == 0:
        return _request(_chat(messages=[{"role": "user", "content": "a"}] * 1025))
    if kind == 1:
        part = {"type": "image_url", "image_url": {"url": _good_url()}}
        return _request(_chat(messages=[{"role": "user", "content": [part] * 60}]))
    if kind == 2:
        return _request({"model": "tiny", "prompt": ["a"] * 17, "max_tokens": 1}, COMPLETIONS)
    return _request({"model": "tiny", "prompt": [10**8], "max_tokens": 1}, COMPLETIONS)


def _with_url(url, rng):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    rng.shuffle(content)
    return _chat(messages=[{"role": "user", "content": copy.deepcopy(content)}])


def _good_url():
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture_bytes(rng):
    noise = np.random.default_rng(rng.randrange(2**32))
    pixels = noise.integers(0, 256, (rng.randint(1, 12), rng.randint(1, 12), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    PIL.Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def _is_readable(content):
    try:
        PIL.Image.open(io.BytesIO(content)).convert("RGB")
    except Exception:
        return False
    return True


if __name__ == "__main__":
    lines = "".join(json.dumps(made) + "\n" for made in record())
    RECORDED.write_bytes(gzip.compress(lines.encode(), mtime=0))
