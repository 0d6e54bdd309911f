"""Which tokens of which sequences the next step computes; pure, without torch.

Every step takes the next token of all running answers and fills the rest of
its token budget with pieces of prompts (chunked prefill). Sequences go in the
order of their rank: the number of their arrival, moved by their priority, so
that nobody waits for more than a bounded number of later ones. Where blocks
run out, the last in rank is taken back and computed again later.

A step is planned before the tokens of the step in front of it are known: a
sequence counts its tokens `in_flight`, and `complete` brings them later.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from internvl_runtime.engine.pytorch import block_pool
from internvl_runtime.engine.pytorch.block_pool import BLOCK_TOKENS
from internvl_runtime.model import prompt

PRIORITY_ARRIVALS = 64
"""A priority higher by one lets a sequence overtake as many that came before it."""
_SHORT_SHARE = 4
"""One part of so many of a step's prompt tokens goes to prompts that end within it, where a
longer prompt would take everything."""
_LOOKAHEAD = 64
"""Waiting sequences that one plan looks at."""

Pictures = Sequence[tuple[prompt.ImagePlacement, str]]


@dataclasses.dataclass(eq=False, kw_only=True)
class Sequence_:  # noqa: N801 - `Sequence` is the type of collections
    """One answer on its way; owned and changed by the scheduler."""

    request_id: str
    rank: int
    token_ids: list[int]
    """Prompt, and what is known of the answer."""
    prompt_tokens: int
    max_tokens: int
    """Of the answer."""
    pictures: Pictures = ()
    """Placements with the pictures' content hashes."""
    waits_for_tokens: bool = False
    """Whether a token must be known before the next one can be chosen."""
    blocks: list[int] = dataclasses.field(default_factory=list)
    hashes: list[block_pool.BlockHash] = dataclasses.field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are computed once all planned steps are over."""
    completed: int = 0
    """Of these, the tokens of completed steps."""
    in_flight: int = 0
    """Tokens that planned steps choose, and that are not known yet."""
    published: int = 0
    """Blocks whose content others can find."""
    cached_tokens: int = 0
    """Prompt tokens that were found when the sequence first ran."""
    has_run: bool = False
    preemptions: int = 0

    @property
    def total(self) -> int:
        """Tokens known or in flight."""
        return len(self.token_ids) + self.in_flight

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen; 0 at the end."""
        at_end = self.total - self.prompt_tokens >= self.max_tokens
        return 0 if at_end else self.total - self.computed

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the newest token is to be computed."""
        return self.computed < self.total - 1 or self.computed < self.prompt_tokens

    @property
    def can_go_on(self) -> bool:
        """Whether something of it can be planned."""
        return self.pending > 0 and not (self.waits_for_tokens and self.in_flight)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of a sequence, computed in one step."""

    sequence: Sequence_
    start: int
    end: int
    chooses: bool
    """Whether the step chooses the sequence's next token."""
    position: int
    """The number of the token that is chosen, from 0 at the answer's beginning."""
    run: int
    """How often the sequence had been taken back before."""

    @property
    def is_valid(self) -> bool:
        """Whether the sequence still has the blocks that this chunk was planned for."""
        return bool(self.sequence.blocks) and self.sequence.preemptions == self.run

    @property
    def length(self) -> int:
        """Tokens of the chunk."""
        return self.end - self.start

    @property
    def is_decode(self) -> bool:
        """Whether the chunk is the newest token of an answer alone."""
        return self.length == 1 and self.start >= self.sequence.prompt_tokens


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step computes."""

    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def decodes(self) -> int:
        """Answers that go on."""
        return sum(chunk.is_decode for chunk in self.chunks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a step may hold."""

    max_batch_size: int
    """Sequences that run at once."""
    max_batched_tokens: int

    def __post_init__(self) -> None:
        if self.max_batched_tokens < self.max_batch_size:
            raise ValueError("a step must have room for a token of every sequence")


CanStart = Callable[[Sequence_, int], bool]
"""Whether a sequence can start behind so many cached tokens: its pictures are at hand."""


class Scheduler:
    """Plans steps for the sequences it was given."""

    def __init__(
        self,
        limits: Limits,
        pool: block_pool.BlockPool,
        *,
        can_start: CanStart,
    ) -> None:
        self.limits = limits
        self.budget = limits.max_batched_tokens
        """Tokens of the next steps: fewer than the limit while memory is short."""
        self.pool = pool
        self.waiting: list[Sequence_] = []
        self.running: list[Sequence_] = []
        self.preemptions = 0
        self.prompt_tokens_looked_up = 0
        self.prompt_tokens_found = 0
        self._can_start = can_start
        self._arrivals = itertools.count()
        self._every: dict[str, Sequence_] = {}

    def add(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        pictures: Pictures = (),
        priority: int = 0,
        waits_for_tokens: bool = False,
    ) -> Sequence_:
        """Queue a sequence. A lower `priority` is served earlier."""
        sequence = Sequence_(
            request_id=request_id,
            rank=next(self._arrivals) + PRIORITY_ARRIVALS * priority,
            token_ids=list(token_ids),
            prompt_tokens=len(token_ids),
            max_tokens=max_tokens,
            pictures=pictures,
            waits_for_tokens=waits_for_tokens,
        )
        sequence.hashes = block_pool.chain_hashes(token_ids, pictures)
        self._every[request_id] = sequence
        _insert(self.waiting, sequence)
        return sequence

    def remove(self, request_id: str) -> None:
        """Forget a sequence, finished or not; its blocks are free at once.

        A step that is under way may still write to them: whoever gets them
        next is computed behind it.
        """
        sequence = self._every.pop(request_id)
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> Step | None:
        """Return the next step, or None where nothing can be computed."""
        chunks = [*self._plan_decodes()]
        left = self.budget - len(chunks)
        chunks += self._plan_prefills(left)
        return Step(tuple(chunks)) if chunks else None

    def complete(self, step: Step, tokens: Mapping[str, int]) -> None:
        """Take in what a step has chosen; `tokens` has one for each chunk that chooses."""
        for chunk in step.chunks:
            sequence = chunk.sequence
            if self._every.get(sequence.request_id) is not sequence:
                continue
            if chunk.chooses:
                sequence.in_flight -= 1
                sequence.token_ids.append(tokens[sequence.request_id])
            if chunk.is_valid:
                sequence.completed = chunk.end
                self._publish(sequence)

    def undo(self, step: Step) -> None:
        """Take back a planned step that was not computed; the newest one first."""
        for chunk in step.chunks:
            chunk.sequence.in_flight -= chunk.chooses
            if chunk.is_valid:
                chunk.sequence.computed = chunk.start

    def preempt(self, sequence: Sequence_) -> None:
        """Take a running sequence back; it is computed again when its rank comes."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = sequence.completed = sequence.published = 0
        sequence.preemptions += 1
        self.preemptions += 1
        _insert(self.waiting, sequence)

    def reset(self) -> None:
        """Forget what answered requests have left: cached blocks, counts."""
        self.pool.clear()
        self.preemptions = self.prompt_tokens_looked_up = self.prompt_tokens_found = 0

    def _plan_decodes(self) -> Iterator[Chunk]:
        for sequence in list(self.running)[: self.budget]:
            is_running = sequence.blocks and not sequence.is_prefilling and sequence.can_go_on
            if is_running and self._make_room(sequence):
                yield self._take(sequence, 1)

    def _plan_prefills(self, left: int) -> Iterator[Chunk]:
        """Yield pieces of prompts in the order of rank.

        The first prompt that does not fit gets what is left, but for a share
        that goes to short prompts behind it.
        """
        long: Sequence_ | None = None
        room = left
        for sequence, found in self._prefilling():
            if not room:
                break
            tokens = sequence.pending - len(found or ()) * BLOCK_TOKENS
            if tokens > room and long is not None:
                continue
            if found is not None:
                self._start(sequence, found)
            if tokens > room:
                long, room = sequence, room // _SHORT_SHARE
                continue
            yield self._take(sequence, tokens)
            left -= tokens
            room -= tokens
        if long is not None:
            yield self._take(long, left)

    def _prefilling(self) -> Iterator[tuple[Sequence_, list[int] | None]]:
        """Yield running sequences with prompt tokens to compute, then waiting ones that fit.

        Those come with their cached blocks, to be started before the next one is asked for.
        """
        for sequence in list(self.running):
            if sequence.is_prefilling and sequence.can_go_on:
                yield sequence, None
        for sequence in self.waiting[:_LOOKAHEAD]:
            if len(self.running) >= self.limits.max_batch_size:
                return
            if sequence.in_flight:
                continue
            found = self._find(sequence)
            if self._is_computed_by_another(sequence, len(found)):
                continue
            if not self._can_start(sequence, len(found) * BLOCK_TOKENS):
                continue
            if not self._has_room(sequence, found):
                return
            yield sequence, found

    def _find(self, sequence: Sequence_) -> list[int]:
        return self.pool.find(_reusable(sequence))

    def _is_computed_by_another(self, sequence: Sequence_, found: int) -> bool:
        missing = _reusable(sequence)[found:]
        return bool(missing) and self.pool.is_announced(missing[0])

    def _has_room(self, sequence: Sequence_, found: Sequence[int]) -> bool:
        """Whether all its tokens fit, and a block more for each that runs already."""
        wanted = block_pool.blocks_for(len(sequence.token_ids) + 1) - len(found)
        wanted += self.pool.count_free_among(found)
        return wanted + len(self.running) <= self.pool.free

    def _start(self, sequence: Sequence_, found: list[int]) -> None:
        self.pool.hold(found)
        own = self.pool.allocate(block_pool.blocks_for(len(sequence.token_ids)) - len(found))
        sequence.blocks = [*found, *own]
        sequence.published = len(found)
        sequence.computed = sequence.completed = len(found) * BLOCK_TOKENS
        for block, block_hash in self._announceable(sequence):
            self.pool.announce(block, block_hash)
        if not sequence.has_run:
            sequence.has_run, sequence.cached_tokens = True, sequence.computed
            self.prompt_tokens_looked_up += sequence.prompt_tokens
            self.prompt_tokens_found += sequence.computed
        self.waiting.remove(sequence)
        _insert(self.running, sequence)

    def _take(self, sequence: Sequence_, tokens: int) -> Chunk:
        start = sequence.computed
        sequence.computed += tokens
        chooses = sequence.computed == sequence.total
        position = sequence.total - sequence.prompt_tokens
        sequence.in_flight += chooses
        return Chunk(sequence, start, sequence.computed, chooses, position, sequence.preemptions)

    def _make_room(self, sequence: Sequence_) -> bool:
        """Give a sequence the block of its next token; False when it was taken back itself."""
        while len(sequence.blocks) < block_pool.blocks_for(sequence.computed + 1):
            if self.pool.free:
                sequence.blocks += self.pool.allocate(1)
                continue
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        return True

    def _publish(self, sequence: Sequence_) -> None:
        known = min(sequence.completed, len(sequence.token_ids)) // BLOCK_TOKENS
        if known > len(sequence.hashes):
            sequence.hashes = block_pool.chain_hashes(
                sequence.token_ids, sequence.pictures, known=sequence.hashes
            )
        for number in range(sequence.published, known):
            self.pool.publish(sequence.blocks[number], sequence.hashes[number])
        sequence.published = max(sequence.published, known)

    def _release(self, sequence: Sequence_) -> None:
        for block, block_hash in self._announceable(sequence):
            self.pool.withdraw(block, block_hash)
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _announceable(self, sequence: Sequence_) -> Iterator[tuple[int, block_pool.BlockHash]]:
        start = sequence.published
        return zip(sequence.blocks[start:], sequence.hashes[start:], strict=False)


def _insert(sequences: list[Sequence_], sequence: Sequence_) -> None:
    bisect.insort(sequences, sequence, key=lambda each: each.rank)


def _reusable(sequence: Sequence_) -> list[block_pool.BlockHash]:
    """Return the hashes of the blocks that may be found: one token is left to compute."""
    return sequence.hashes[: (len(sequence.token_ids) - 1) // BLOCK_TOKENS]
