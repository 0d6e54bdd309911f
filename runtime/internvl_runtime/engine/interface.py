"""What the server knows about an engine: requests, steps, limits."""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import NewType, Protocol

import numpy as np
import numpy.typing as npt

from internvl_runtime import errors
from internvl_runtime.model import prompt

RequestId = NewType("RequestId", str)

_GREEDY_TEMPERATURE = 1e-5
"""Below this the division overflows; vLLM, too, takes such temperatures for zero."""


class FinishReason(enum.StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


class Capability(enum.StrEnum):
    """What an engine may offer beyond temperature, top_p, max_tokens and seed.

    The values are the request fields that need it.
    """

    TOP_K = "top_k"
    MIN_P = "min_p"
    PRESENCE_PENALTY = "presence_penalty"
    FREQUENCY_PENALTY = "frequency_penalty"
    REPETITION_PENALTY = "repetition_penalty"
    LOGIT_BIAS = "logit_bias"
    LOG_PROBABILITIES = "logprobs"
    TOP_LOG_PROBABILITIES = "top_logprobs"
    GUIDED_DECODING = "response_format"


OFFERED = {
    "PyTorch": frozenset(Capability),
    "TensorRT": frozenset(Capability)
    - {
        # Its executor tells of the chosen token alone. How it wants a bias, and the bytes of a
        # vocabulary for grammars, no published source tells well enough to rely on unseen.
        Capability.TOP_LOG_PROBABILITIES,
        Capability.LOGIT_BIAS,
        Capability.GUIDED_DECODING,
    },
}
"""By backend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What an engine was built for, every build flag of it; the server checks requests with it."""

    max_sequence_tokens: int
    """Prompt and answer together."""
    max_input_tokens: int
    max_batched_tokens: int
    """Prompt tokens in one step."""
    max_batch_size: int
    max_tiles_per_image: int
    """Tiles of a grid; the thumbnail comes on top."""
    max_tiles_per_request: int
    """Tiles of all pictures, thumbnails included."""
    capabilities: frozenset[Capability] = frozenset(Capability)
    """Comes with the backend, and is no build flag."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from a row of logits."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""
    log_probabilities: int | None = None
    """How many of the most likely tokens are told at each step; None tells nothing."""
    seed: int | None = None
    answer_index: int = 0
    """Which of the `n` answers to one prompt this is: with one seed, each is another."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < _GREEDY_TEMPERATURE

    @property
    def is_cut(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


class ConstraintKind(enum.StrEnum):
    """What an answer must look like."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A grammar that every answer follows."""

    kind: ConstraintKind
    schema: str = ""
    """JSON text of a schema, for `json_schema`."""


@dataclasses.dataclass(frozen=True)
class TokenLogProbabilities:
    """How likely a generated token was, by the model's own logits.

    Natural logarithms, before penalties, bias, temperature and cuts.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]
    """The most likely token ids, best first."""


class Image(Protocol):
    """A picture of a request; its tiles are made when an engine asks for them."""

    @property
    def content_hash(self) -> str:
        """Equal hashes have equal tiles."""
        ...

    @property
    def size(self) -> int:
        """Bytes held until the request is answered."""
        ...

    def load(self) -> npt.NDArray[np.uint8]:
        """Return uint8 tiles [N, 448, 448, 3]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One answer to generate."""

    request_id: RequestId
    prompt: prompt.Prompt
    images: Sequence[Image]
    sampling: Sampling
    stop_token_ids: frozenset[int]
    """Ids that end the answer; none with `ignore_eos`."""
    constraint: Constraint | None = None
    priority: int = 0
    """A lower one is served earlier."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How a request began."""

    cached_tokens: int
    """Prompt tokens whose keys and values were there from earlier requests."""
    queued_seconds: float
    """From the engine's getting the request to its first step, or to the queue of TensorRT-LLM's
    executor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """What an engine holds now."""

    running: int
    waiting: int
    blocks_used: int
    """Blocks of the key/value cache that requests hold."""
    picture_cache_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one engine step did, for metrics and the step log."""

    began: float
    """Seconds since the engine's start."""
    seconds: float
    """From taking the step up to having its tokens."""
    decodes: int
    """Answers that went on by a token."""
    prefill_tokens: int
    """Prompt tokens computed."""
    tiles: int
    """Tiles encoded."""
    tower_passes: int
    load: EngineLoad
    """Behind the step."""
    preemptions: int
    """Since the engine's start, as the following numbers."""
    prompt_tokens_looked_up: int
    prompt_tokens_found: int
    """In the prefix cache."""
    pictures_looked_up: int
    pictures_found: int
    """In the cache of picture features."""

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.decodes + self.prefill_tokens


class Observer(Protocol):
    """Is told what an engine does."""

    def observe_step(self, report: StepReport) -> None:
        """Take in one step."""
        ...

    def observe_load(self, load: EngineLoad) -> None:
        """Take in what the engine holds, every second."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What one engine step made for one request."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    log_probabilities: tuple[TokenLogProbabilities, ...] = ()
    """One for each token, where the request asks for them."""
    finish_reason: FinishReason | None = None
    start: Start | None = None
    """Comes once, with the first token where the engine can tell then."""
    error: errors.RuntimeBaseError | None = None
    """Why the request was given up; no further step follows."""

    @property
    def is_last(self) -> bool:
        """Whether no further step follows."""
        return self.finish_reason is not None or self.error is not None


StepSink = Callable[[Step], None]


@dataclasses.dataclass(frozen=True)
class EngineStatistics:
    """How busy an engine is."""

    requests: int
    """Requests submitted and not finished."""


class Engine(Protocol):
    """Generates answers; owns scheduling, memory and numerics."""

    @property
    def limits(self) -> EngineLimits:
        """Limits of the loaded engine."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a request submitted now would be answered."""
        ...

    async def start(self) -> None:
        """Load; returns when the engine answers. Raises StageError when it can not."""
        ...

    def submit(self, request: GenerationRequest, sink: StepSink) -> None:
        """Queue a request; the sink gets its steps, in order, in the caller's event loop."""
        ...

    def cancel(self, request_id: RequestId) -> None:
        """Stop a request; its sink gets nothing more."""
        ...

    def statistics(self) -> EngineStatistics:
        """Return how busy the engine is."""
        ...

    async def stop(self) -> None:
        """End the engine and everything it started."""
        ...
