"""The engine: requests go in, steps come out.

One thread calls everything here. A step plans, encodes pictures, computes and
chooses; with `lag` 1 its tokens are fetched only when the next step has been
given to the device, so that a GPU never waits for Python.
"""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch

from internvl_runtime import errors
from internvl_runtime.engine import gallery, interface, sampling, stepping
from internvl_runtime.engine.pytorch import block_pool, runner, sampler, scheduler
from internvl_runtime.model import config

logger = logging.getLogger(__name__)

_RECOVERY_STEPS = 64
"""Steps without a failure after which a reduced token budget doubles."""
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""In errors of torch on the CPU, of CUDA, and of cuBLAS and cuDNN."""


@dataclasses.dataclass(eq=False)
class _Answer:
    """What the engine keeps of a request besides its sequence."""

    request: stepping.Submitted
    sequence: scheduler.Sequence_
    arrived: float
    seen: sampler.Seen | None = None
    started: float | None = None
    is_first: bool = True


@dataclasses.dataclass(frozen=True)
class _UnderWay:
    step: scheduler.Step
    launched: runner.Launched
    began: float
    tiles: int
    passes: int


class _RowError(Exception):
    """Raised when a request's next token can not be chosen."""

    def __init__(self, request_id: str, error: errors.RuntimeBaseError) -> None:
        super().__init__(str(error))
        self.request_id = request_id
        self.error = error


class Engine:
    """Answers requests in batches."""

    def __init__(
        self,
        model: runner.Runner,
        planner_limits: scheduler.Limits,
        pool: block_pool.BlockPool,
        pictures: gallery.Gallery,
        *,
        load: stepping.LoadPicture,
        lag: int,
        max_sequence_tokens: int,
        close: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler.Scheduler(planner_limits, pool, can_start=self._can_start)
        self.runner = model
        self.pictures = pictures
        self._reports: list[interface.StepReport] = []
        self._load = load
        self._lag = lag
        self._max_sequence_tokens = max_sequence_tokens
        self._close = close
        self._clock = clock
        self._started = clock()
        self._collected = self._started
        self._answers: dict[str, _Answer] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._failed: list[interface.Step] = []
        self._good_steps = 0
        self._may_ask = True

    @property
    def blocks(self) -> int:
        """Blocks of the key/value cache."""
        return self.scheduler.pool.count

    @property
    def silent_seconds(self) -> float:
        """For how long what runs beside the steps has told nothing: nothing does."""
        return 0.0

    @property
    def is_busy(self) -> bool:
        """Whether another step would do something without anything new."""
        return bool(self._under_way or self._failed or self.scheduler.running)

    @property
    def has_work(self) -> bool:
        """Whether a request is not answered yet."""
        return bool(self._answers or self._under_way or self._failed)

    def load(self) -> interface.EngineLoad:
        """Return what the engine holds; for any thread."""
        pool = self.scheduler.pool
        return interface.EngineLoad(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_used=pool.count - pool.free,
            picture_cache_bytes=self.pictures.feature_bytes,
        )

    def take_reports(self) -> list[interface.StepReport]:
        """Return what steps did since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def submit(
        self, request: stepping.Submitted, tiles: Mapping[str, gallery.Tiles] | None = None
    ) -> None:
        """Queue a request; one that can not be answered gets a step with an error.

        `tiles` are of pictures that are at hand already, by content hash.
        """
        for content_hash, own in (tiles or {}).items():
            self.pictures.offer(content_hash, own)
        try:
            self._submit(request)
        except errors.RuntimeBaseError as e:
            self._failed.append(stepping.failure(request.request_id, e))

    def _submit(self, request: stepping.Submitted) -> None:
        token_ids = request.prompt.token_ids
        room = self._max_sequence_tokens - len(token_ids)
        if room < 1:
            raise errors.RequestError(
                f"{len(token_ids)} prompt tokens and an answer, the engine was built for "
                f"{self._max_sequence_tokens}: shorten the prompt",
                parameter="messages",
                code="context_length_exceeded",
            )
        max_tokens = min(request.sampling.max_tokens, room)
        capacity = self.scheduler.pool.count
        if block_pool.blocks_for(len(token_ids) + max_tokens) > capacity:
            most = capacity * block_pool.BLOCK_TOKENS
            raise errors.RequestError(
                f"{len(token_ids)} prompt tokens and {max_tokens} of an answer do not fit into the "
                f"key/value cache of {most} tokens: shorten the prompt or ask for fewer tokens",
                parameter="max_tokens",
                code="context_length_exceeded",
            )
        sequence = self.scheduler.add(
            request.request_id,
            token_ids,
            max_tokens=max_tokens,
            pictures=tuple(
                (placement, request.content_hashes[placement.index])
                for placement in request.prompt.placements
            ),
            priority=request.priority,
            waits_for_tokens=request.matcher is not None,
        )
        self._answers[request.request_id] = _Answer(request, sequence, self._clock())

    def refuse(self, request_id: str, error: errors.RuntimeBaseError) -> None:
        """Answer a request that never began with an error."""
        self._failed.append(stepping.failure(request_id, error))

    def cancel(self, request_id: str) -> None:
        """Forget a request; one that has ended is none."""
        if request_id in self._answers:
            self._end(request_id)

    def put_tiles(self, content_hash: str, tiles: gallery.Tiles) -> None:
        """Take in a picture's tiles, uint8 [N, 448, 448, 3]."""
        self.pictures.put_tiles(content_hash, tiles)

    def fail_picture(self, content_hash: str, error: errors.RuntimeBaseError) -> None:
        """Give up the requests that need a picture which can not be loaded."""
        if not self.pictures.is_asked(content_hash):
            return
        self.pictures.forget(content_hash)
        for request_id, answer in list(self._answers.items()):
            behind = _pictures_behind(answer.sequence, answer.sequence.computed)
            if content_hash in {each.content_hash for each in behind}:
                self._fail(request_id, error)

    def step(self) -> list[interface.Step]:
        """Compute one step; returns what the step `lag` before it has chosen, and failures.

        Returns nothing where every request waits for its pictures.
        """
        began = self._clock()
        self._may_ask = True
        planned = self.scheduler.plan()
        launched = planned is not None and self._launch(planned, began)
        made = []
        if self._under_way and (not launched or len(self._under_way) > self._lag):
            made = list(self._collect(self._under_way.popleft()))
        made += self._failed
        self._failed = []
        return made

    def reset(self) -> None:
        """Forget what answered requests have left: blocks, features, counts."""
        self.scheduler.reset()
        self.pictures.shrink(0, needed=())
        self.pictures.hits = self.pictures.lookups = 0
        self.take_reports()

    def close(self) -> None:
        """Let the other ranks end, where there are any."""
        if self._close:
            self._close()

    def _can_start(self, sequence: scheduler.Sequence_, cached_tokens: int) -> bool:
        """Whether the pictures behind the cached tokens are at hand; asks for them."""
        wanted = _pictures_behind(sequence, cached_tokens)
        missing = self.pictures.missing(wanted)
        if missing:
            indexes = {
                content_hash: index
                for index, content_hash in enumerate(
                    self._answers[sequence.request_id].request.content_hashes
                )
            }
            # Behind one that finds no room nobody may ask: small requests would starve it.
            self._may_ask = self._may_ask and self.pictures.ask(
                missing,
                lambda content: self._load(sequence.request_id, indexes[content]),
                is_first=sequence is self._first_waiting(),
            )
        return not missing

    def _first_waiting(self) -> scheduler.Sequence_ | None:
        return next(iter(self.scheduler.waiting), None)

    def _launch(self, step: scheduler.Step, began: float) -> bool:
        """Give a step to the device; False when it had to be taken back."""
        passes, tiles = self.runner.tower_passes, self.runner.tiles_encoded
        launched = None
        try:
            rows = self._rows(step)
            self._encode(step)
            launched = self.runner.launch(step, rows, self.pictures)
        except _RowError as e:
            self.scheduler.undo(step)
            self._fail(e.request_id, e.error)
            return False
        except errors.RankError:
            raise
        except Exception as e:
            self.scheduler.undo(step)
            if not _is_out_of_memory(e):
                logger.exception("a step failed")
                self._give_up(step)
                return False
        if launched is None:
            # Behind the handler, whose traceback holds the tensors of the step.
            self._survive(step)
            return False
        for chunk in step.chunks:
            answer = self._answers[chunk.sequence.request_id]
            if answer.started is None:
                answer.started = began
                self._count_pictures(chunk)
        tiles, passes = self.runner.tiles_encoded - tiles, self.runner.tower_passes - passes
        self._under_way.append(_UnderWay(step, launched, began, tiles, passes))
        self._recover()
        return True

    def _count_pictures(self, first: scheduler.Chunk) -> None:
        needed = {each.content_hash for each in _pictures_behind(first.sequence, first.start)}
        for _, content_hash in first.sequence.pictures:
            self.pictures.count(content_hash, is_needed=content_hash in needed)

    def _encode(self, step: scheduler.Step) -> None:
        """Encode the pictures of a step, and waiting ones with them while passes have room."""
        wanted = {
            each.content_hash: self.pictures.waiting[each.content_hash]
            for chunk in step.chunks
            for each in _pictures_behind(chunk.sequence, chunk.start, before=chunk.end)
            if not self.pictures.is_encoded(each.content_hash)
        }
        if not wanted:
            return
        needed = self._needed()
        self._fill_pass(wanted, needed)
        for content_hash, features in self.runner.encode(wanted):
            self.pictures.put_features(content_hash, features, needed=needed)

    def _needed(self) -> set[str]:
        """Return the pictures that running sequences still need features of."""
        return {
            each.content_hash
            for sequence in self.scheduler.running
            for each in _pictures_behind(sequence, sequence.completed)
        }

    def _fill_pass(self, wanted: dict[str, gallery.Tiles], needed: set[str]) -> None:
        """Add waiting pictures while the tower's last pass has room for them."""
        size = self.runner.tiles_per_pass
        room = -sum(map(len, wanted.values())) % size
        bytes_per_tile = self.runner.feature_bytes_per_tile
        for content_hash, tiles in self.pictures.waiting.items():
            fits = self.pictures.has_room_for(
                bytes_per_tile * (len(tiles) + sum(map(len, wanted.values()))), needed=needed
            )
            if content_hash not in wanted and len(tiles) <= room and fits:
                wanted[content_hash] = tiles
                room -= len(tiles)

    def _rows(self, step: scheduler.Step) -> list[sampler.Row]:
        rows = []
        for chunk in step.chunks:
            answer = self._answers[chunk.sequence.request_id]
            try:
                if chunk.chooses:
                    rows.append(self._row(answer, chunk.position))
            except errors.RequestError as e:
                raise _RowError(chunk.sequence.request_id, e) from e
            except Exception as e:
                if _is_out_of_memory(e):
                    raise
                logger.exception("request %s failed", chunk.sequence.request_id)
                raise _RowError(chunk.sequence.request_id, _unexpected()) from e
        return rows

    def _row(self, answer: _Answer, position: int) -> sampler.Row:
        request = answer.request
        if answer.seen is None and sampling.counts_tokens(request.sampling):
            answer.seen = sampler.watch(
                request.prompt.token_ids, vocab_size=self.runner.model.language.vocab_size,
                device=self.runner.model.device,
            )  # fmt: skip
        return sampler.Row(
            sampling=request.sampling,
            origin=sampling.origin_of(request.sampling, request.request_id),
            position=position,
            seen=answer.seen,
            allowed=request.matcher.allowed() if request.matcher else None,
        )

    def _collect(self, under_way: _UnderWay) -> Iterator[interface.Step]:
        launched = under_way.launched
        launched.wait()
        chosen = launched.chosen.token_ids.tolist()
        told = sampler.tell(launched.chosen, launched.rows)
        names = [chunk.sequence.request_id for chunk in launched.chunks]
        self.scheduler.complete(under_way.step, dict(zip(names, chosen, strict=True)))
        for row, (chunk, token_id) in enumerate(zip(launched.chunks, chosen, strict=True)):
            answer = self._answers.get(chunk.sequence.request_id)
            if answer is not None and answer.sequence is chunk.sequence:
                yield self._step_of(answer, chunk, token_id, told.get(row))
        self._report(under_way)

    def _step_of(
        self,
        answer: _Answer,
        chunk: scheduler.Chunk,
        token_id: int,
        told: interface.TokenLogProbabilities | None,
    ) -> interface.Step:
        request, sequence = answer.request, answer.sequence
        finish = sampling.finish_reason(
            token_id,
            stop_token_ids=request.stop_token_ids,
            generated=chunk.position + 1,
            max_tokens=sequence.max_tokens,
        )
        if request.matcher:
            request.matcher.accept(token_id)
            if request.matcher.is_finished:
                finish = interface.FinishReason.STOP
        start = None
        if answer.is_first:
            answer.is_first = False
            queued = (answer.started or answer.arrived) - answer.arrived
            start = interface.Start(cached_tokens=sequence.cached_tokens, queued_seconds=queued)
        if finish:
            self._end(request.request_id)
        return interface.Step(
            request_id=interface.RequestId(request.request_id),
            token_ids=(token_id,),
            log_probabilities=(told,) if told else (),
            finish_reason=finish,
            start=start,
        )

    def _end(self, request_id: str) -> None:
        self.scheduler.remove(request_id)
        answer = self._answers.pop(request_id)
        others = {
            content_hash
            for other in self._answers.values()
            for content_hash in other.request.content_hashes
        }
        for content_hash in answer.request.content_hashes:
            if content_hash in others:
                # The server may have dropped a load that was asked for in this request's name.
                self.pictures.ask_again(content_hash)
            else:
                self.pictures.forget(content_hash)

    def _fail(self, request_id: str, error: errors.RuntimeBaseError) -> None:
        self._end(request_id)
        self._failed.append(stepping.failure(request_id, error))

    def _give_up(self, step: scheduler.Step) -> None:
        """Fail the requests of a step; raises, and ends the worker, where the device is lost."""
        if self.runner.model.device.type == "cuda":
            torch.cuda.synchronize()
        for chunk in step.chunks:
            self._fail(chunk.sequence.request_id, _unexpected())

    def _survive(self, step: scheduler.Step) -> None:
        """Go on after a step that memory was too short for: smaller, or without a request."""
        self._good_steps = 0
        self.pictures.shrink(0, needed=self._needed())
        if self.runner.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if step.tokens > 1 and self.scheduler.budget > 1:
            self.scheduler.budget = max(1, min(self.scheduler.budget, step.tokens) // 2)
            self.runner.tiles_per_pass = max(1, self.runner.tiles_per_pass // 2)
            logger.warning("out of memory: steps have %d tokens now", self.scheduler.budget)
            return
        self._fail(
            step.chunks[0].sequence.request_id,
            errors.EngineUnavailableError(
                "there is not enough memory for this request; send it alone, or make it smaller"
            ),
        )
        self.scheduler.budget = self.scheduler.limits.max_batched_tokens
        self.runner.tiles_per_pass = self.runner.most_tiles_per_pass

    def _recover(self) -> None:
        """Let steps grow again, some time after memory was short."""
        self._good_steps += 1
        limit = self.scheduler.limits.max_batched_tokens
        if self.scheduler.budget < limit and self._good_steps % _RECOVERY_STEPS == 0:
            self.scheduler.budget = min(limit, 2 * self.scheduler.budget)
            self.runner.tiles_per_pass = min(
                self.runner.most_tiles_per_pass, 2 * self.runner.tiles_per_pass
            )

    def _report(self, under_way: _UnderWay) -> None:
        step, planner, pictures = under_way.step, self.scheduler, self.pictures
        # With a lag a step begins while the one in front of it runs.
        began = max(under_way.began, self._collected)
        self._collected = self._clock()
        self._reports.append(
            interface.StepReport(
                began=began - self._started,
                seconds=self._collected - began,
                decodes=step.decodes,
                prefill_tokens=step.tokens - step.decodes,
                tiles=under_way.tiles,
                tower_passes=under_way.passes,
                load=self.load(),
                preemptions=planner.preemptions,
                prompt_tokens_looked_up=planner.prompt_tokens_looked_up,
                prompt_tokens_found=planner.prompt_tokens_found,
                pictures_looked_up=pictures.lookups,
                pictures_found=pictures.hits,
            )
        )


def _pictures_behind(
    sequence: scheduler.Sequence_, start: int, *, before: int | None = None
) -> list[gallery.Wanted]:
    """Return the pictures with tokens at `start` or later, and before `before`."""
    return [
        gallery.Wanted(content_hash, placement.length // config.TOKENS_PER_TILE)
        for placement, content_hash in sequence.pictures
        if placement.offset + placement.length > start
        and (before is None or placement.offset < before)
    ]


def _is_out_of_memory(error: BaseException) -> bool:
    is_told = any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_told


def _unexpected() -> errors.EngineUnavailableError:
    return errors.EngineUnavailableError("this request failed; the server's log says why")
