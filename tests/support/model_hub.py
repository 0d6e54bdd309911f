"""A file server on loopback that speaks the routes of Hugging Face, ModelScope and plain folders.

Faults are queued: each of the next file requests meets one. A stand-in for the
hubs, which can not be reached from a test; what it answers follows their
published clients.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import threading
import time
import urllib.parse
from collections import deque
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"
_CDN = "/cdn/"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What a request for a file meets instead of the whole file."""

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    cut_after: int | None = None
    """Bytes of the answer, then the connection is gone."""
    short_by: int = 0
    """Bytes that a well-formed answer lacks."""
    flip_byte: int | None = None
    pause: float = 0.0
    """Seconds before the answer."""
    chunk_pause: float = 0.0
    """Seconds between pieces of 64 KiB."""
    ignore_range: bool = False


class Hub:
    """Serves the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: deque[Fault] = deque()
        self.token: str | None = None
        self.gated = False
        self.sums = False
        self.etags = True
        self.extra: dict[str, bytes] = {}
        """Files of the repository that are not in the folder."""
        self.requests: list[tuple[str, str | None]] = []
        """Path and Range of each request for a file."""
        self.headers: list[dict[str, str]] = []
        """Of each request for a file."""
        self.sent = 0
        """Bytes of files."""
        self.url = ""

    def files(self) -> dict[str, bytes]:
        found = {p.name: p.read_bytes() for p in sorted(self.folder.iterdir()) if p.is_file()}
        return found | self.extra


@contextlib.contextmanager
def serve(folder):
    """Run a hub; gives it."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._route(urllib.parse.urlsplit(self.path))

    def _route(self, url):
        path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        if found := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            return self._hugging_face_info(*found.groups())
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            if self._is_refused():
                return None
            # The hub sends large files through another host.
            host = self.hub.url.replace("127.0.0.1", "localhost")
            return self._answer(302, b"", [("Location", f"{host}{_CDN}{found[3]}")])
        if found := re.fullmatch(r"/api/v1/models/(.+?)/repo/files", path):
            return self._model_scope_files(found[1], query)
        if re.fullmatch(r"/api/v1/models/(.+?)/repo", path):
            return self._is_refused() or self._file(query["FilePath"])
        if path.startswith(_CDN):
            return self._file(path.removeprefix(_CDN))
        if path.startswith("/folder/"):
            return self._is_refused() or self._folder(path.removeprefix("/folder/"))
        return self._answer(404, b"no such route")

    def _hugging_face_info(self, repository, revision):
        if self._is_refused():
            return
        if repository != "org/model":
            self._answer(404, b"{}", [("X-Error-Code", "RepoNotFound")])
        elif revision not in {"main", COMMIT}:
            self._answer(404, b"{}", [("X-Error-Code", "RevisionNotFound")])
        else:
            siblings = [self._sibling(name, data) for name, data in self.hub.files().items()]
            self._json({"id": repository, "sha": COMMIT, "siblings": siblings})

    def _sibling(self, name, data):
        sibling = {"rfilename": name, "size": len(data), "blobId": git_id(data)}
        if name.endswith(".safetensors"):
            sibling["lfs"] = {
                "sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134,
            }  # fmt: skip
        return sibling

    def _model_scope_files(self, repository, query):
        if self._is_refused():
            return
        if repository != "org/model" or query["Revision"] != "master":
            self._json({"Code": 404, "Message": "record not found", "Success": False}, status=404)
            return
        files = [
            {
                "Name": name, "Path": name, "Type": "blob", "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(), "Revision": COMMIT,
            }
            for name, data in self.hub.files().items()
        ]  # fmt: skip
        self._json({"Code": 200, "Success": True, "Data": {"Files": files}})

    def _folder(self, name):
        if name == "SHA256SUMS" and self.hub.sums:
            lines = (
                f"{hashlib.sha256(data).hexdigest()}  {name}\n"
                for name, data in self.hub.files().items()
            )
            return self._answer(200, "".join(lines).encode())
        return self._file(name)

    def _is_refused(self):
        hub, given = self.hub, self.headers.get("Authorization")
        if hub.token and given != f"Bearer {hub.token}":
            words = [("X-Error-Message", "Invalid credentials in Authorization header")]
            self._answer(401, b"Invalid credentials", words if given else [])
            return True
        if hub.gated:
            self._answer(403, b"Access is restricted", [("X-Error-Code", "GatedRepo")])
            return True
        return False

    def _file(self, name):
        hub = self.hub
        hub.requests.append((name, self.headers.get("Range")))
        hub.headers.append(dict(self.headers))
        data = hub.files().get(name)
        if data is None:
            return self._answer(404, b"no such file")
        probes = self.headers.get("Range") == "bytes=0-0"
        fault = hub.faults.popleft() if hub.faults and not probes else Fault()
        time.sleep(fault.pause)
        if fault.status:
            return self._answer(fault.status, b"not now", fault.headers)
        etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        start, end, ranged = self._range(len(data), etag)
        if start > len(data):
            return self._answer(416, b"")
        if fault.ignore_range:
            start, end, ranged = 0, len(data), False
        if fault.flip_byte is not None:
            changed = bytearray(data)
            changed[fault.flip_byte] ^= 1
            data = bytes(changed)
        body = data[start : end - fault.short_by]
        headers = [("ETag", etag)] if hub.etags else []
        if ranged:
            headers.append(("Content-Range", f"bytes {start}-{end - 1}/{len(data)}"))
        self.send_response(206 if ranged else 200)
        for header in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(*header)
        self.end_headers()
        self._send(body if fault.cut_after is None else body[: fault.cut_after], fault)
        if fault.cut_after is not None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def _range(self, size, etag):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked or self.headers.get("If-Range", etag) != etag:
            return 0, size, False
        return int(asked[1]), int(asked[2]) + 1 if asked[2] else size, True

    def _send(self, body, fault):
        for start in range(0, len(body), 65536):
            piece = body[start : start + 65536]
            self.wfile.write(piece)
            self.hub.sent += len(piece)
            time.sleep(fault.chunk_pause)

    def _json(self, content, *, status=200):
        self._answer(status, json.dumps(content).encode(), [("Content-Type", "application/json")])

    def _answer(self, status, body, headers=()):
        self.send_response(status)
        for header in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)


def git_id(data):
    """Return the object id that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
