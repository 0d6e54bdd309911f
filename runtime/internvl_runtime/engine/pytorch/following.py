"""What the ranks behind rank 0 do: its products, at the same time, over their own weights.

Rank 0 plans, encodes pictures and chooses tokens; before each forward pass it
tells the others where the tokens lie and shares their embeddings.
"""

import contextlib
import enum
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from internvl_runtime import errors
from internvl_runtime.engine.pytorch import attention, language, ranks

CreateAttention = Callable[[int], attention.Attention]
"""Makes a cache of so many blocks, and the attention over it."""


class _Order(enum.IntEnum):
    STOP = 0
    ALLOCATE = 1
    MEASURE = 2
    STEP = 3


class Leader:
    """Tells the other ranks what rank 0 is about to do."""

    def __init__(self, group: ranks.Distributed) -> None:
        self._group = group
        self._is_out_of_step = False

    def allocate(self, blocks: int) -> None:
        """Let every rank make a cache, in place of the one before."""
        self._group.tell([_Order.ALLOCATE, blocks])

    def measure(self, free_bytes: int) -> int:
        """Return the least bytes that are free on any rank's device."""
        self._group.tell([_Order.MEASURE])
        return self._group.least(free_bytes)

    @contextlib.contextmanager
    def step(
        self, spans: Sequence[attention.Span], hidden: torch.Tensor, last: Sequence[int]
    ) -> Iterator[None]:
        """Let every rank run embeddings [T, hidden] forward, rank 0 inside the block.

        `last` are the rows with logits. What fails inside leaves the ranks at different places:
        it becomes RankFailedError.
        """
        try:
            self._group.tell([_Order.STEP, len(spans), *_numbers_of(spans), *last])
            self._group.share(hidden)
            yield
        except errors.RankError:
            self._is_out_of_step = True
            raise
        except Exception as e:
            self._is_out_of_step = True
            raise errors.RankFailedError(f"rank 0 failed within a step of all ranks: {e}") from e

    def stop(self) -> None:
        """Let every rank end; those that are at another place are ended by mpirun."""
        if self._is_out_of_step:
            return
        self._group.tell([_Order.STOP])
        self._group.close()


def follow(
    group: ranks.Distributed,
    model: language.LanguageModel,
    create_attention: CreateAttention,
    measure: Callable[[int], int],
) -> None:
    """Do what rank 0 tells until it stops; `measure` tells what a cache of some blocks leaves."""
    attend: attention.Attention | None = None
    blocks = 0
    while True:
        order, *numbers = group.hear()
        match order:
            case _Order.STOP:
                group.close()
                return
            case _Order.ALLOCATE:
                attend = None
                (blocks,) = numbers
                attend = create_attention(blocks)
            case _Order.MEASURE:
                group.least(measure(blocks))
            case _Order.STEP if attend is not None:
                _run(group, model, attend, numbers)
            case _:
                raise errors.RankFailedError(f"rank 0 has ordered {order}, which is none")


@torch.inference_mode()
def _run(
    group: ranks.Distributed,
    model: language.LanguageModel,
    attend: attention.Attention,
    numbers: Sequence[int],
) -> None:
    rest = iter(numbers)
    spans = list(_spans_of(rest))
    # Steps within a prompt choose nothing.
    last = torch.tensor(list(rest), dtype=torch.long, device=model.device)
    tokens = sum(span.length for span in spans)
    hidden = group.share(
        torch.empty(tokens, model.language.hidden_size, dtype=model.dtype, device=model.device)
    )
    positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
    attend.begin(spans)
    model.forward(hidden, positions.to(model.device), last, attend)


def _numbers_of(spans: Sequence[attention.Span]) -> Iterator[int]:
    for span in spans:
        yield from (span.start, span.length, len(span.blocks), *span.blocks)


def _spans_of(numbers: Iterator[int]) -> Iterator[attention.Span]:
    """Read as many spans as the first number says."""
    for _ in range(next(numbers)):
        start, length, count = itertools.islice(numbers, 3)
        yield attention.Span(start, length, list(itertools.islice(numbers, count)))
