"""A real S3 server on loopback: moto's, in an environment of its own (`make setup`)."""

import contextlib
import subprocess
import time
from pathlib import Path

import httpx
import runtime_process

PYTHON = Path(__file__).parents[2] / ".venv-s3-server" / "bin" / "python"
_START_SECONDS = 60


@contextlib.contextmanager
def serve():
    """Run it empty; gives its URL."""
    port = runtime_process.free_port()
    process = subprocess.Popen(
        [PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(url, process):
    until = time.monotonic() + _START_SECONDS
    while True:
        try:
            httpx.get(f"{url}/moto-api/")
            return
        except httpx.TransportError:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
