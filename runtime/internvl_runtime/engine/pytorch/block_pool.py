"""Blocks of the key/value cache: who holds them, and what is in them.

A block has room for `BLOCK_TOKENS` tokens. A full one is known by a hash that
chains everything in front of it, so that equal beginnings share blocks: later
turns of a conversation, answers to the same prompt. A block that nobody holds
keeps its content until it is needed for something else, oldest first.
"""

import array
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from internvl_runtime.model import prompt

BLOCK_TOKENS = 16
"""Tokens of a block: a page size of every attention kernel in use."""
_DIGEST_BYTES = 16

BlockHash = bytes


class OutOfBlocksError(Exception):
    """Raised when fewer blocks are free than are asked for."""


class BlockPool:
    """Counts the holders of every block, and finds blocks by hash."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._holders = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        """Blocks without a holder, the one to take next first."""
        self._hashes: dict[int, BlockHash] = {}
        self._blocks: dict[BlockHash, int] = {}
        self._announced: dict[BlockHash, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be allocated, those with reusable content included."""
        return len(self._free)

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Return the blocks of the longest beginning that is in the cache."""
        found = []
        for each in hashes:
            block = self._blocks.get(each)
            if block is None:
                break
            found.append(block)
        return found

    def is_announced(self, block_hash: BlockHash) -> bool:
        """Whether somebody computes a block with this hash right now."""
        return block_hash in self._announced

    def count_free_among(self, blocks: Sequence[int]) -> int:
        """Return how many of some blocks have no holder: holding them takes from `free`."""
        return sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that `find` returned."""
        for block in blocks:
            self._holders[block] += 1
            self._free.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Take blocks, whatever was in them. Raises OutOfBlocksError and takes none."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks are wanted, {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            self._forget(block)
        return blocks

    def announce(self, block: int, block_hash: BlockHash) -> None:
        """Say that a held block will soon have this content."""
        self._announced.setdefault(block_hash, block)

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Say that a held block has this content now; the first one with it is found."""
        self.withdraw(block, block_hash)
        if block not in self._hashes and block_hash not in self._blocks:
            self._hashes[block] = block_hash
            self._blocks[block_hash] = block

    def withdraw(self, block: int, block_hash: BlockHash) -> None:
        """Take back what was announced for a block."""
        if self._announced.get(block_hash) == block:
            del self._announced[block_hash]

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a holder.

        The end of a sequence is taken before its beginning, which others may
        share, and blocks without known content before all others.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if block not in self._hashes:
                    self._free.move_to_end(block, last=False)

    def clear(self) -> None:
        """Forget all content: blocks that are held stay held."""
        self._hashes.clear()
        self._blocks.clear()

    def _forget(self, block: int) -> None:
        known = self._hashes.pop(block, None)
        if known is not None:
            del self._blocks[known]


def chain_hashes(
    token_ids: Sequence[int],
    pictures: Sequence[tuple[prompt.ImagePlacement, str]],
    *,
    known: Sequence[BlockHash] = (),
) -> list[BlockHash]:
    """Return the hashes of all full blocks; `known` are those of the first ones.

    A picture's tokens all have one id: its content hash, and where in it the
    block lies, stand for them.
    """
    hashes = list(known)
    for number in range(len(known), len(token_ids) // BLOCK_TOKENS):
        start, end = number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS
        digest = hashlib.blake2b(hashes[-1] if hashes else b"", digest_size=_DIGEST_BYTES)
        digest.update(array.array("i", token_ids[start:end]).tobytes())
        for placement, content_hash in pictures:
            if placement.offset < end and start < placement.offset + placement.length:
                digest.update(f"{content_hash}@{start - placement.offset}".encode())
        hashes.append(digest.digest())
    return hashes


def blocks_for(tokens: int) -> int:
    """Return how many blocks hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)
