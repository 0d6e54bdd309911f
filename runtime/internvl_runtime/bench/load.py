"""Sends conversations to a server and measures what comes back."""

import asyncio
import dataclasses
import json
import random
import resource
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp

from internvl_runtime.bench import scenarios

_SECONDS = 600.0
"""Most time for one request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a server is loaded."""

    url: str
    model: str | None
    api_key: str | None
    max_tokens: int
    concurrency: int | None
    """Most conversations at once; None: no bound."""
    rate: float | None = None
    """Conversations that begin each second, at random times; None begins one when one ends."""
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One request; seconds since the run's start."""

    turn: int
    began: float
    first_token: float | None = None
    tokens: tuple[float, ...] = ()
    """When each piece of the answer came."""
    ended: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    """From the server's usage: pieces of a stream are not tokens."""
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All requests of a run."""

    requests: tuple[Measured, ...]
    seconds: float
    client_cores: float
    """Processor time of this client for each second of the run."""


async def run(
    conversations: Sequence[scenarios.Conversation], plan: Plan, *, report: Callable[[], None]
) -> Run:
    """Send all conversations; calls `report` after each."""
    started, used = time.perf_counter(), _processor_seconds()
    at_once = asyncio.Semaphore(plan.concurrency or len(conversations) or 1)
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = _Client(session, plan, started)

        async def converse(
            conversation: scenarios.Conversation, due: float | None
        ) -> list[Measured]:
            async with at_once:
                measured = await client.converse(conversation, due=due)
                report()
                return measured

        tasks = [
            asyncio.create_task(converse(conversation, due), name="conversation")
            async for conversation, due in _arrivals(conversations, plan)
        ]
        every = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - started
    return Run(
        requests=tuple(measured for each in every for measured in each),
        seconds=seconds,
        client_cores=(_processor_seconds() - used) / seconds,
    )


async def _arrivals(
    conversations: Sequence[scenarios.Conversation], plan: Plan
) -> AsyncIterator[tuple[scenarios.Conversation, float | None]]:
    """Yield conversations when they are to begin, as a Poisson process where there is a rate.

    And when that was: time that they wait behind it counts.
    """
    rng = random.Random(plan.seed)  # noqa: S311 - reproducible, no secret
    due = time.perf_counter()
    for conversation in conversations:
        if plan.rate:
            due += rng.expovariate(plan.rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield conversation, due if plan.rate else None


class _Client:
    def __init__(self, session: aiohttp.ClientSession, plan: Plan, started: float) -> None:
        self._session = session
        self._plan = plan
        self._started = started
        self._headers = {"Content-Type": "application/json"}
        if plan.api_key:
            self._headers["Authorization"] = f"Bearer {plan.api_key}"

    async def converse(
        self, conversation: scenarios.Conversation, *, due: float | None
    ) -> list[Measured]:
        """Ask every question, the first one at a time that is due; an error ends it."""
        messages: list[scenarios.Message] = []
        measured = []
        for turn, question in enumerate(conversation.questions):
            messages.append(question)
            began = due - self._started if due and not turn else None
            one, text = await self._ask(messages, turn, began)
            measured.append(one)
            if one.error:
                break
            messages.append({"role": "assistant", "content": text})
        return measured

    async def _ask(
        self, messages: Sequence[scenarios.Message], turn: int, began: float | None
    ) -> tuple[Measured, str]:
        body = json.dumps(self._body(messages)).encode()
        began = self._now() if began is None else began
        answer = _Answer(self._now)
        error = None
        try:
            async with self._session.post(
                f"{self._plan.url}/v1/chat/completions", data=body, headers=self._headers
            ) as response:
                if response.status != 200:  # noqa: PLR2004
                    error = f"{response.status}: {(await response.text())[:200]}"
                else:
                    async for line in response.content:
                        answer.take(line)
                    error = answer.error
        except (aiohttp.ClientError, TimeoutError) as e:
            error = f"{type(e).__name__}: {e}"
        usage = answer.usage
        details = usage.get("prompt_tokens_details") or {}
        measured = Measured(
            turn=turn,
            began=began,
            first_token=answer.times[0] if answer.times else None,
            tokens=tuple(answer.times),
            ended=self._now(),
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_tokens=details.get("cached_tokens") or 0,
            completion_tokens=usage.get("completion_tokens", 0),
            error=error,
        )
        return measured, "".join(answer.texts)

    def _body(self, messages: Sequence[scenarios.Message]) -> dict[str, Any]:
        model = {"model": self._plan.model} if self._plan.model else {}
        return {
            **model,
            "messages": list(messages),
            "max_tokens": self._plan.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _now(self) -> float:
        return time.perf_counter() - self._started


class _Answer:
    """What has come of a stream of server-sent events."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.times: list[float] = []
        self.texts: list[str] = []
        self.usage: dict[str, Any] = {}
        self.is_done = False
        self._now = now
        self._failure: str | None = None

    @property
    def error(self) -> str | None:
        """Why the stream is none, if it is."""
        if self._failure:
            return self._failure
        if not self.is_done:
            return "the stream ended early"
        return None if self.usage.get("completion_tokens") else "the stream told no usage"

    def take(self, line: bytes) -> None:
        """Take in one line."""
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.is_done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self._failure = str(chunk["error"])[:200]
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            text = delta.get("content") or ""
            is_opening = "role" in delta and not text
            if not is_opening:
                self.times.append(self._now())
                self.texts.append(text)


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
