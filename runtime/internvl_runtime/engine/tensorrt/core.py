"""The engine: pictures through the vision engine, tokens through TensorRT-LLM's executor.

One thread calls everything here. The executor batches in flight by itself; a step
waits for what its requests got since the last one. The vision engine runs in a
thread beside, so that no token waits for the tower.
"""

import dataclasses
import datetime
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent import futures
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from internvl_runtime import errors
from internvl_runtime.engine import gallery, interface, stepping
from internvl_runtime.engine.tensorrt import built as builts
from internvl_runtime.engine.tensorrt import counts, requests
from internvl_runtime.model import config

logger = logging.getLogger(__name__)

_WAIT = datetime.timedelta(milliseconds=10)
"""How long a step waits for the executor before it looks at what else has come."""
_AHEAD = 2
"""Requests beyond the batch that the executor has at hand when one of the batch ends."""


class Tower(Protocol):
    """Encodes tiles."""

    most_tiles: int

    def encode(self, tiles: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return features [N, 256, hidden] of uint8 tiles [N, 448, 448, 3], on the host."""
        ...


@dataclasses.dataclass(eq=False)
class _Answer:
    """A request that the executor has."""

    request: stepping.Submitted
    queued: float
    """Seconds from its arrival to the executor."""
    is_told: bool = False
    """Whether its start has been told."""


@dataclasses.dataclass(frozen=True)
class _Waiting:
    request: stepping.Submitted
    arrived: float


class Engine:
    """Answers requests in batches."""

    def __init__(
        self,
        module: Any,
        executor: Any,
        built: builts.Built,
        tower: Tower,
        pictures: gallery.Gallery,
        *,
        load: stepping.LoadPicture,
        tells_logits: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take `tensorrt_llm.bindings.executor` and an Executor of it.

        With `tells_logits` answers with log-probabilities come at once, with the most likely
        tokens of each step: the way of a build that compares.
        """
        self.pictures = pictures
        self._module = module
        self._executor = executor
        self._built = built
        self._tower = tower
        self._load = load
        self._tells_logits = tells_logits
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._answers: dict[str, _Answer] = {}
        self._names: dict[int, str] = {}
        """Requests by the executor's ids."""
        self._unread: dict[int, Any] = {}
        """The executor's requests with pictures, by their ids, until their first response.

        It copies the pinned table on a stream that torch knows nothing of: let go before, its
        memory would be the next table's while it is still read.
        """
        self._failed: list[interface.Step] = []
        self._encoder = futures.ThreadPoolExecutor(1, thread_name_prefix="vision")
        self._encoding: futures.Future[dict[str, torch.Tensor]] | None = None
        self._under_way: frozenset[str] = frozenset()
        """Pictures in the vision engine."""
        self._reports: list[interface.StepReport] = []
        self._counts = counts.Counts(clock())
        self._heard = self._encoding_began = clock()
        """When the executor has told something."""
        self._bytes_per_tile = config.TOKENS_PER_TILE * built.row_bytes

    @property
    def blocks(self) -> int:
        """Blocks of the key/value cache, as far as the executor has told."""
        return self._counts.blocks

    @property
    def silent_seconds(self) -> float:
        """For how long the executor or the vision engine has told nothing; for any thread."""
        heard = [self._heard] if self._answers else []
        began = [self._encoding_began] if self._encoding else []
        now = self._clock()
        return now - min(heard + began, default=now)

    @property
    def is_busy(self) -> bool:
        """Whether another step would do something without anything new."""
        return bool(self._answers or self._unread or self._failed or self._encoding)

    @property
    def has_work(self) -> bool:
        """Whether a request is not answered yet."""
        return bool(self._answers or self._failed or self._waiting)

    def load(self) -> interface.EngineLoad:
        """Return what the engine holds; for any thread."""
        return interface.EngineLoad(
            running=len(self._answers),
            waiting=len(self._waiting),
            blocks_used=self._counts.blocks_used,
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
            requests.check(request, self._built)
        except errors.RequestError as e:
            self.refuse(request.request_id, e)
            return
        self._waiting[request.request_id] = _Waiting(request, self._clock())
        for content_hash in request.content_hashes:
            self.pictures.count(content_hash, is_needed=not self.pictures.has(content_hash))

    def refuse(self, request_id: str, error: errors.RuntimeBaseError) -> None:
        """Answer a request that never began with an error."""
        self._failed.append(stepping.failure(request_id, error))

    def cancel(self, request_id: str) -> None:
        """Forget a request; one that has ended is none."""
        self._drop(request_id)
        for number, name in list(self._names.items()):
            if name == request_id:
                self._executor.cancel_request(number)
                del self._names[number], self._answers[request_id]

    def put_tiles(self, content_hash: str, tiles: gallery.Tiles) -> None:
        """Take in a picture's tiles, uint8 [N, 448, 448, 3]."""
        self.pictures.put_tiles(content_hash, tiles)

    def fail_picture(self, content_hash: str, error: errors.RuntimeBaseError) -> None:
        """Give up the requests that need a picture which can not be loaded."""
        if self.pictures.is_asked(content_hash):
            self._fail_waiting({content_hash}, error)

    def step(self) -> list[interface.Step]:
        """Return what the executor has answered; waits for it a short while."""
        self._take_features()
        self._enqueue()
        self._begin_encoding()
        steps = self._await_responses()
        self._report()
        failed, self._failed = self._failed, []
        return steps + failed

    def reset(self) -> None:
        """Forget what answered requests have left, but the executor's blocks."""
        self.pictures.shrink(0, needed=())
        self.pictures.hits = self.pictures.lookups = 0
        self.take_reports()
        self._counts.reset()

    def close(self) -> None:
        """End running answers, the executor and the thread of the vision engine."""
        try:
            for number in self._names:
                self._executor.cancel_request(number)
            self._executor.shutdown()
        finally:
            self._encoder.shutdown()

    def _enqueue(self) -> None:
        """Hand requests to the executor whose pictures are encoded, and ask for missing ones."""
        may_ask = True
        ranked = self._ranked()
        for waiting in ranked:
            request = waiting.request
            wanted = _wanted(request)
            missing = self.pictures.missing(wanted)
            if missing:
                # Behind one that finds no room nobody may ask: small requests would starve it.
                is_first = waiting is ranked[0]
                may_ask = may_ask and self._ask(request, missing, is_first=is_first)
            elif len(self._answers) < self._built.max_batch_size + _AHEAD and all(
                self.pictures.is_encoded(each.content_hash) for each in wanted
            ):
                self._enqueue_one(waiting)

    def _ranked(self) -> list[_Waiting]:
        """Return the requests that the executor has not: by priority, then as they came."""
        return sorted(self._waiting.values(), key=lambda each: each.request.priority)

    def _ask(
        self, request: stepping.Submitted, missing: list[gallery.Wanted], *, is_first: bool
    ) -> bool:
        indexes = {name: index for index, name in enumerate(request.content_hashes)}
        return self.pictures.ask(
            missing, lambda name: self._load(request.request_id, indexes[name]), is_first=is_first
        )

    def _enqueue_one(self, waiting: _Waiting) -> None:
        request = waiting.request
        del self._waiting[request.request_id]
        try:
            features = {name: self.pictures.features(name) for name in request.content_hashes}
            tells_logits = self._tells_logits and bool(request.sampling.log_probabilities)
            created = requests.create(
                self._module, request, features, self._built, tells_logits=tells_logits
            )
            number = self._executor.enqueue_request(created)
        except Exception:
            logger.exception("the executor refuses %s", request.request_id)
            self.refuse(request.request_id, _unexpected())
            return
        now = self._clock()
        if not self._answers:
            self._heard = now
        self._names[number] = request.request_id
        if request.content_hashes:
            self._unread[number] = created
        self._answers[request.request_id] = _Answer(request, now - waiting.arrived)

    def _begin_encoding(self) -> None:
        """Give the vision engine the next pass: tiles of several requests, up to its maximum."""
        if self._encoding or not self.pictures.waiting:
            return
        batch: dict[str, gallery.Tiles] = {}
        room = self._tower.most_tiles
        needed, ranked = self._wanted_pictures(), self._ranked()
        for waiting in ranked:
            for name in waiting.request.content_hashes:
                tiles = self.pictures.waiting.get(name)
                if tiles is None or name in batch or len(tiles) > room:
                    continue
                count = sum(map(len, batch.values())) + len(tiles)
                # Others than the first wait until features go: queues are longer than memory.
                if waiting is ranked[0] or self.pictures.has_room_for(
                    count * self._bytes_per_tile, needed=needed
                ):
                    batch[name] = tiles
                    room -= len(tiles)
        if batch:
            self._under_way = frozenset(batch)
            self._encoding_began = self._clock()
            self._encoding = self._encoder.submit(self._encode, batch)

    def _encode(self, batch: dict[str, gallery.Tiles]) -> dict[str, torch.Tensor]:
        features = self._tower.encode(np.concatenate(list(batch.values())))
        parts = features.split([len(tiles) for tiles in batch.values()])
        return {name: part.flatten(0, 1).clone() for name, part in zip(batch, parts, strict=True)}

    def _take_features(self) -> None:
        """Take in what the vision engine has made; waits a short while where nothing else runs."""
        if self._encoding is None:
            return
        if not self._answers:
            futures.wait([self._encoding], timeout=_WAIT.total_seconds())
        if not self._encoding.done():
            return
        encoding, self._encoding = self._encoding, None
        try:
            made = encoding.result()
        except Exception:
            logger.exception("the vision engine failed")
            _raise_if_lost()
            self._fail_waiting(self._under_way, _unexpected())
            return
        needed = self._wanted_pictures()
        self._counts.take_pass(sum(map(len, made.values())) // config.TOKENS_PER_TILE)
        for name, features in made.items():
            self.pictures.put_features(name, features, needed=needed)

    def _await_responses(self) -> list[interface.Step]:
        if not (self._answers or self._unread):
            return []
        steps = []
        for response in self._executor.await_responses(timeout=_WAIT):
            self._heard = self._clock()
            self._unread.pop(response.request_id, None)
            name = self._names.get(response.request_id)
            if name is not None:
                steps.append(self._step_of(name, response))
        return steps

    def _step_of(self, name: str, response: Any) -> interface.Step:
        answer = self._answers[name]
        if response.has_error():
            logger.error("the executor gave %s up: %s", name, response.error_msg)
            _raise_if_lost()
            self._end(name, response.request_id)
            return stepping.failure(name, _unexpected())
        result = response.result
        (token_ids,) = result.output_token_ids
        finish = requests.finish_reason(self._module, result.finish_reasons[0])
        if result.is_final and finish is None:
            logger.error("the executor ended %s: %s", name, result.finish_reasons[0])
            self._end(name, response.request_id)
            return stepping.failure(name, _unexpected())
        if result.is_final:
            self._end(name, response.request_id)
        return interface.Step(
            request_id=interface.RequestId(name),
            token_ids=tuple(token_ids),
            log_probabilities=self._told(answer.request, token_ids, result),
            finish_reason=finish,
            start=self._start(answer, result),
        )

    def _told(
        self, request: stepping.Submitted, token_ids: list[int], result: Any
    ) -> tuple[interface.TokenLogProbabilities, ...]:
        top = request.sampling.log_probabilities
        if top is None:
            return ()
        if self._tells_logits and top:
            return requests.told_of_logits(
                result.generation_logits[0], token_ids, top=top, vocab_size=self._built.vocab_size
            )
        return requests.told(result.log_probs[0], token_ids)

    def _start(self, answer: _Answer, result: Any) -> interface.Start | None:
        """Tell once how the request began: when the executor does, at the latest at the end."""
        metrics = result.request_perf_metrics
        if answer.is_told or (metrics is None and not result.is_final):
            return None
        answer.is_told = True
        reused = metrics.kv_cache_metrics.num_reused_blocks if metrics else 0
        return interface.Start(
            cached_tokens=reused * self._built.tokens_per_block, queued_seconds=answer.queued
        )

    def _end(self, name: str, number: int) -> None:
        del self._names[number], self._answers[name]

    def _drop(self, name: str) -> None:
        """Forget a request that the executor has not, and pictures that no other one wants."""
        dropped = self._waiting.pop(name, None)
        wanted = self._wanted_pictures()
        for content_hash in dropped.request.content_hashes if dropped else ():
            if content_hash in wanted:
                # The server may have dropped a load that was asked for in this request's name.
                self.pictures.ask_again(content_hash)
            else:
                self.pictures.forget(content_hash)

    def _wanted_pictures(self) -> set[str]:
        return {name for each in self._waiting.values() for name in each.request.content_hashes}

    def _fail_waiting(
        self, content_hashes: Collection[str], error: errors.RuntimeBaseError
    ) -> None:
        for name, waiting in list(self._waiting.items()):
            if not set(content_hashes).isdisjoint(waiting.request.content_hashes):
                self._drop(name)
                self.refuse(name, error)

    def _report(self) -> None:
        for told in self._executor.get_latest_iteration_stats():
            self._heard = self._clock()
            report = self._counts.take(told, self.load(), self.pictures, now=self._heard)
            if report.tokens:
                self._reports.append(report)


def _wanted(request: stepping.Submitted) -> list[gallery.Wanted]:
    return [
        gallery.Wanted(
            request.content_hashes[placement.index], placement.length // config.TOKENS_PER_TILE
        )
        for placement in request.prompt.placements
    ]


def _raise_if_lost() -> None:
    """Raise, and end the worker, where the GPU is lost for everybody."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _unexpected() -> errors.EngineUnavailableError:
    return errors.EngineUnavailableError("this request failed; the server's log says why")
