"""The requests of docs/api.md, run as they are written but for host and port."""

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import data
import pictures
import pytest
import runtime_process
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "api.md"
EXAMPLES = Path("/tmp/InternVL2_5-8B/examples")
WEB_HOST = "pic3.zhimg.com"
TILES = {"image1": 13, "image2": 10, "web": 9, "frame": 3}
EXPECTED_TILES = [13, 9, 23, 23, 18]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.S | re.M)


CURLS = [block.removeprefix("$ ") for block in blocks("console") if "curl" in block]


@contextlib.contextmanager
def examples():
    """The files that the requests name; an existing folder of this name is left alone."""
    if EXAMPLES.parent.exists():
        pytest.fail(f"{EXAMPLES.parent} exists: move it away, this test makes and removes it")
    (EXAMPLES / "frames").mkdir(parents=True)
    try:
        shutil.copy(data.require("images/image1.jpg"), EXAMPLES / "image1.jpg")
        pictures.draw(1000, 1000).save(EXAMPLES / "image2.jpg")
        for number in range(6):
            name = f"frame_{number}.jpg"
            shutil.copy(data.require(f"images/{name}"), EXAMPLES / "frames" / name)
        yield
    finally:
        shutil.rmtree(EXAMPLES.parent)


def issue_certificate(folder):
    """A certificate of the web host, which is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, WEB_HOST)])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(WEB_HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "ca.pem", folder / "key.pem"


@contextlib.contextmanager
def web_behind_a_proxy(folder, content):
    """A proxy that answers CONNECT, with the web host behind it; yields its URL and the CA."""
    ca, key = issue_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, key)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(content)

    def serve_one(connection):
        with connection:
            asked = connection.recv(4096)
            assert asked.startswith(f"CONNECT {WEB_HOST}:443 ".encode())
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with context.wrap_socket(connection, server_side=True) as secure:
                secure.recv(4096)
                secure.sendall(answer + content)

    def serve(listener):
        with contextlib.suppress(OSError):
            while True:
                serve_one(listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", ca
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture(scope="module")
def documented(qwen_engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    pictures.draw(1280, 720).save(folder / "web.jpg")
    with (
        examples(),
        web_behind_a_proxy(folder, (folder / "web.jpg").read_bytes()) as (proxy, ca),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SSL_CERT_FILE", str(ca))
        with runtime_process.serve(
            qwen_engine,
            media_folder=str(EXAMPLES),
            fetch_proxy=proxy,
            served_model_names=["InternVL2_5"],
        ) as server:
            yield server


def test_there_is_an_example_for_each_tile_count():
    assert len(CURLS) == len(EXPECTED_TILES)


@pytest.mark.parametrize("number", range(len(EXPECTED_TILES)))
def test_the_documented_requests_are_answered(documented, number):
    command = CURLS[number].replace("http://127.0.0.1:9997", documented.url)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["model"] == "InternVL2_5"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    image_tokens = EXPECTED_TILES[number] * 256
    assert image_tokens < answer["usage"]["prompt_tokens"] < image_tokens + 1000


def test_the_documented_python_is_run(documented):
    (code,) = blocks("python")
    code = code.replace("http://127.0.0.1:9997", documented.url)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert "prompt_tokens=3" in done.stdout
