"""Pictures on the engine's side: tiles that wait for the tower, and features that it made.

Both are known by content hash. Features stay within a budget of bytes, the
longest unused go first; those that a running sequence still needs stay in any
case. Tiles are asked for only as far ahead as there is room for them.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch

Tiles = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A picture that a sequence needs: its hash and its number of tiles."""

    content_hash: str
    tiles: int


class Gallery:
    """Keeps tiles and features."""

    def __init__(self, *, max_feature_bytes: int, max_waiting_tiles: int) -> None:
        self.hits = 0
        self.lookups = 0
        self._max_feature_bytes = max_feature_bytes
        self._max_waiting_tiles = max_waiting_tiles
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._feature_bytes = 0
        self._tiles: dict[str, Tiles] = {}
        self._asked: dict[str, int] = {}
        self._counted: set[str] = set()
        """Pictures whose pass through the tower was counted for a request."""

    @property
    def feature_bytes(self) -> int:
        """Bytes of all features."""
        return self._feature_bytes

    @property
    def waiting(self) -> Mapping[str, Tiles]:
        """Tiles at hand, in the order of their arrival."""
        return self._tiles

    def has(self, content_hash: str) -> bool:
        """Whether tiles or features of a picture are at hand."""
        return content_hash in self._features or content_hash in self._tiles

    def count(self, content_hash: str, *, is_needed: bool) -> None:
        """Count a picture of a request that starts, as found where no pass is for this request."""
        self.lookups += 1
        self.hits += not is_needed or content_hash in self._counted
        if is_needed:
            self._counted.add(content_hash)

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """Return those of which nothing is at hand."""
        return [each for each in wanted if not self.has(each.content_hash)]

    def ask(
        self, wanted: Collection[Wanted], load: Callable[[str], None], *, is_first: bool
    ) -> bool:
        """Ask for the tiles of pictures, all or none; returns whether they are on their way.

        Where there is no room only the first in rank may ask, so that no two
        sequences wait for each other's tiles to go.
        """
        new = {e.content_hash: e.tiles for e in wanted if e.content_hash not in self._asked}
        held = sum(self._asked.values()) + sum(len(tiles) for tiles in self._tiles.values())
        if held + sum(new.values()) > self._max_waiting_tiles and not is_first:
            return False
        self._asked |= new
        for content_hash in new:
            load(content_hash)
        return True

    def offer(self, content_hash: str, tiles: Tiles) -> None:
        """Take in tiles that nobody has asked for."""
        if not self.has(content_hash):
            self._tiles[content_hash] = tiles

    def put_tiles(self, content_hash: str, tiles: Tiles) -> None:
        """Take in tiles that were asked for; others are dropped."""
        if self._asked.pop(content_hash, 0):
            self._tiles[content_hash] = tiles

    def is_asked(self, content_hash: str) -> bool:
        """Whether tiles of a picture are on their way."""
        return content_hash in self._asked

    def ask_again(self, content_hash: str) -> None:
        """Forget that a picture was asked for: whoever needs it will ask in its own name."""
        self._asked.pop(content_hash, None)

    def forget(self, content_hash: str) -> None:
        """Give up a picture that nobody needs any more, or that can not be loaded."""
        self._asked.pop(content_hash, None)
        self._tiles.pop(content_hash, None)
        if content_hash not in self._features:
            self._counted.discard(content_hash)

    def features(self, content_hash: str) -> torch.Tensor:
        """Return [tokens, hidden] of a picture that was encoded."""
        self._features.move_to_end(content_hash)
        return self._features[content_hash]

    def is_encoded(self, content_hash: str) -> bool:
        """Whether the features of a picture are at hand."""
        return content_hash in self._features

    def put_features(
        self, content_hash: str, features: torch.Tensor, *, needed: Collection[str]
    ) -> None:
        """Keep features instead of tiles; drops old ones that are not `needed`."""
        self._tiles.pop(content_hash, None)
        self._asked.pop(content_hash, None)
        replaced = self._features.pop(content_hash, None)
        self._feature_bytes -= 0 if replaced is None else replaced.nbytes
        self._features[content_hash] = features
        self._feature_bytes += features.nbytes
        self.shrink(self._max_feature_bytes, needed={content_hash, *needed})

    def has_room_for(self, num_bytes: int, *, needed: Collection[str]) -> bool:
        """Whether features of that size could stay beside those that are needed."""
        kept = sum(self._features[each].nbytes for each in needed if each in self._features)
        return kept + num_bytes <= self._max_feature_bytes

    def shrink(self, max_bytes: int, *, needed: Collection[str]) -> None:
        """Drop the longest unused features until they fit."""
        for content_hash in list(self._features):
            if self._feature_bytes <= max_bytes:
                return
            if content_hash not in needed:
                self._feature_bytes -= self._features.pop(content_hash).nbytes
                self._counted.discard(content_hash)
