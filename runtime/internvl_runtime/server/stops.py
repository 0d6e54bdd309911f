"""Texts that end an answer, found across the borders of tokens."""

from collections.abc import Sequence


class StopFinder:
    """Lets text through until a stop text appears; that and what follows is held back.

    Text that may become a stop text is kept until it is clear; the work is
    linear in the length of the answer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._kept = ""
        self.is_found = False

    def push(self, text: str, *, final: bool = False) -> str:
        """Return what may be shown by now; `final` gives out what was kept."""
        if self.is_found:
            return ""
        self._kept += text
        found = [position for stop in self._stops if (position := self._kept.find(stop)) >= 0]
        if found:
            self.is_found = True
            return self._give(min(found))
        return self._give(len(self._kept) if final else len(self._kept) - self._undecided())

    def _give(self, count: int) -> str:
        shown, self._kept = self._kept[:count], self._kept[count:]
        return shown

    def _undecided(self) -> int:
        """Return how many characters at the end begin a stop text."""
        return max((_overlap(self._kept, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a true beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
