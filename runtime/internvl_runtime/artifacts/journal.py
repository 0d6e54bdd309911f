"""Names of what is durable in a folder, so that a later try goes on behind it."""

import os
from pathlib import Path


class Journal:
    """A file with a name a line; a torn last line does not count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        self.done = set(whole.decode().splitlines())

    def add(self, *names: str) -> None:
        """Record names durably."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in names)
            file.flush()
            os.fsync(file.fileno())
        self.done.update(names)
