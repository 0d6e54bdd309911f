"""An engine inside its worker: requests go in, steps come out, one thread calls everything."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from internvl_runtime import errors
from internvl_runtime.engine import gallery, grammar, interface
from internvl_runtime.model import prompt

LoadPicture = Callable[[str, int], None]
"""Asks for picture `index` of a request; `put_tiles` or `fail_picture` brings the answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submitted:
    """A request as an engine gets it: pictures by content hash."""

    request_id: str
    prompt: prompt.Prompt
    content_hashes: Sequence[str]
    """Of picture i of the request."""
    sampling: interface.Sampling
    stop_token_ids: frozenset[int]
    matcher: grammar.Matcher | None = None
    """Follows the answer through its grammar."""
    priority: int = 0


class Engine(Protocol):
    """Owns scheduling, memory and numerics."""

    pictures: gallery.Gallery

    @property
    def blocks(self) -> int:
        """Blocks of the key/value cache."""
        ...

    @property
    def silent_seconds(self) -> float:
        """For how long what runs beside the steps has told nothing; for any thread."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether another step would do something without anything new."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether a request is not answered yet."""
        ...

    def load(self) -> interface.EngineLoad:
        """Return what the engine holds; for any thread."""
        ...

    def take_reports(self) -> list[interface.StepReport]:
        """Return what steps did since the last call."""
        ...

    def submit(self, request: Submitted, tiles: Mapping[str, gallery.Tiles] | None = None) -> None:
        """Queue a request; one that can not be answered gets a step with an error.

        `tiles` are of pictures that are at hand already, by content hash.
        """
        ...

    def refuse(self, request_id: str, error: errors.RuntimeBaseError) -> None:
        """Answer a request that never began with an error."""
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request; one that has ended is none."""
        ...

    def put_tiles(self, content_hash: str, tiles: gallery.Tiles) -> None:
        """Take in a picture's tiles, uint8 [N, 448, 448, 3]."""
        ...

    def fail_picture(self, content_hash: str, error: errors.RuntimeBaseError) -> None:
        """Give up the requests that need a picture which can not be loaded."""
        ...

    def step(self) -> list[interface.Step]:
        """Return what came next; nothing where every request waits for its pictures."""
        ...

    def reset(self) -> None:
        """Forget what answered requests have left: blocks, features, counts."""
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...


def answer(
    engine: Engine, request: Submitted, tiles: Mapping[str, gallery.Tiles] | None = None
) -> Iterator[interface.Step]:
    """Yield the steps of one request, run alone. Raises its error."""
    engine.submit(request, tiles)
    while engine.has_work:
        for step in engine.step():
            if step.error:
                raise step.error
            yield step


def failure(request_id: str, error: errors.RuntimeBaseError) -> interface.Step:
    """Return the last step of a request that was given up."""
    return interface.Step(request_id=interface.RequestId(request_id), token_ids=(), error=error)
