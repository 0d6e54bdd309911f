"""Names of what is durable in a folder, so that a later try goes on behind it."""

import os
from pathlib import Path


class Journal:
    """A file with a name a line; a torn last line does not count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        self.done = {line.rstrip("\n") for line in lines if line.endswith("\n")}

    def add(self, name: str) -> None:
        """Record a name durably."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add(name)
