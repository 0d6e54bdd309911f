"""Request bodies of the OpenAI API, as far as this server reads them.

Source: the OpenAI API reference for chat completions and completions, and
vLLM's reference for the fields that OpenAI does not have. Unknown fields are
ignored and counted, as OpenAI's own clients send new ones now and then; known
ones that would change the answer and are not offered are refused by name.
"""

from typing import Annotated, Any, Literal

import pydantic
import pydantic_core

_NOT_OFFERED: dict[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}
"""Known fields and the values of them that change nothing."""

_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "parallel_tool_calls", "service_tier", "reasoning_effort",
     "prompt_cache_key", "safety_identifier", "verbosity"}
)  # fmt: skip
"""Known fields that change no answer here."""

MOST_ANSWERS = 16
_MOST_STOPS = 16
_MOST_STOP_CHARACTERS = 256
_MOST_TOP_CHAT = 20
_MOST_TOP_COMPLETION = 5
_MOST_BIASED = 1024
_MOST_PARTS = 1024
_MOST_MESSAGES = 4096
_MOST_PROMPT_IDS = 40_000


def _refuse_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError("the text holds half of a surrogate pair; send whole characters") from e
    return text


Text = Annotated[str, pydantic.AfterValidator(_refuse_lone_surrogates)]
_StopText = Annotated[Text, pydantic.Field(min_length=1, max_length=_MOST_STOP_CHARACTERS)]
_TokenId = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
_TileLimit = Annotated[int, pydantic.Field(ge=1, le=1024)]


def _wrong(parameter: str, message: str) -> pydantic_core.PydanticCustomError:
    """Return the error of one field, where the check looks at several."""
    return pydantic_core.PydanticCustomError("field", message, {"parameter": parameter})


def _at_most(count: int) -> pydantic.BeforeValidator:
    """Refuse a longer list before its items are looked at: each would make an error of its own."""

    def check(value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) > count:
            raise ValueError(f"the list has {len(value)} items, at most {count} are accepted")
        return value

    return pydantic.BeforeValidator(check)


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class TextPart(_Body):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Body):
    """Where a picture is, and how finely it is looked at."""

    url: Text
    detail: Literal["auto", "low", "high"] = "auto"
    """`low` is one tile; `auto` and `high` are up to the server's limit."""
    max_dynamic_patch: _TileLimit | None = None
    """Most tiles of the grid, the thumbnail not counted."""


class ImagePart(_Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl
    max_dynamic_patch: _TileLimit | None = None
    """As in `image_url`; there it counts first."""

    @pydantic.field_validator("image_url", mode="before")
    @classmethod
    def accept_a_plain_url(cls, value: Any) -> Any:
        """Accept `"image_url": "https://..."`, which some clients send."""
        return {"url": value} if isinstance(value, str) else value


class VideoUrl(_Body):
    """Where a video is, and how many of its frames are looked at."""

    url: Text
    num_frames: Annotated[int, pydantic.Field(ge=1, le=1024)] | None = None


class VideoPart(_Body):
    """A video."""

    type: Literal["video_url"]
    video_url: VideoUrl


ContentPart = Annotated[TextPart | ImagePart | VideoPart, pydantic.Field(discriminator="type")]


class Message(_Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[tuple[ContentPart, ...], _at_most(_MOST_PARTS)] | None = None

    @property
    def parts(self) -> tuple[ContentPart, ...]:
        """The content parts; none where the content is a plain text."""
        return self.content if isinstance(self.content, tuple) else ()


_Messages = Annotated[tuple[Message, ...], pydantic.Field(min_length=1), _at_most(_MOST_MESSAGES)]
_PromptIds = Annotated[tuple[_TokenId, ...], _at_most(_MOST_PROMPT_IDS)]


class StreamOptions(_Body):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class JsonSchema(_Body):
    """A schema that the answer follows."""

    name: Text | None = None
    schema_: Annotated[dict[str, Any] | bool, pydantic.Field(alias="schema")] = True


class ResponseFormat(_Body):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @pydantic.model_validator(mode="after")
    def need_a_schema(self) -> "ResponseFormat":
        """Refuse `json_schema` without one."""
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('with "type": "json_schema" give json_schema: {name, schema}')
        return self


class SamplingFields(_Body):
    """Fields that chat completions and completions share."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    model: Text | None = None
    """One of the served names; empty or absent means the first of them."""
    max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, pydantic.Field(ge=-1, lt=2**31)] | None = None
    """-1 and 0 keep every token."""
    min_p: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    n: Annotated[int, pydantic.Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: (
        _StopText | Annotated[tuple[_StopText, ...], pydantic.Field(max_length=_MOST_STOPS)] | None
    ) = None
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)] | None = None
    priority: Annotated[int, pydantic.Field(ge=-100, le=100)] | None = None
    """A lower one is served earlier; 0 where it is left out."""
    presence_penalty: Annotated[float, pydantic.Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, pydantic.Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, pydantic.Field(ge=0.01, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, pydantic.Field(pattern="^[0-9]{1,9}$")],
                Annotated[float, pydantic.Field(ge=-100, le=100)],
            ],
            pydantic.Field(max_length=_MOST_BIASED),
        ]
        | None
    ) = None
    """Token ids, written as texts, and what is added to their logits."""
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @pydantic.model_validator(mode="after")
    def refuse_what_is_not_offered(self) -> "SamplingFields":
        """Refuse fields that would change the answer and have no effect here."""
        for name, harmless in _NOT_OFFERED.items():
            if (self.model_extra or {}).get(name) not in harmless:
                raise _wrong(name, "is not offered by this server; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    def unknown_fields(self) -> list[str]:
        """Return the names of fields that nobody here knows."""
        return sorted(set(self.model_extra or ()) - _NOT_OFFERED.keys() - _WITHOUT_EFFECT)


class ChatCompletionRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    messages: _Messages
    max_completion_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=_MOST_TOP_CHAT)] | None = None

    @pydantic.model_validator(mode="after")
    def need_logprobs(self) -> "ChatCompletionRequest":
        """Refuse `top_logprobs` without `logprobs`, as OpenAI does."""
        if self.top_logprobs and not self.logprobs:
            raise _wrong("top_logprobs", "needs logprobs: true")
        return self


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[tuple[Text, ...], _at_most(MOST_ANSWERS)]
        | _PromptIds
        | Annotated[tuple[_PromptIds, ...], _at_most(MOST_ANSWERS)]
    )
    """Texts are encoded as they are; token ids are taken as they are."""

    @pydantic.field_validator("prompt", mode="before")
    @classmethod
    def bound_prompts(cls, value: Any) -> Any:
        """Refuse too many prompts by their number, before the union tries them as ids."""
        is_several = isinstance(value, list) and value and not isinstance(value[0], int)
        if is_several and len(value) > MOST_ANSWERS:
            raise ValueError(f"there are {len(value)} prompts, at most {MOST_ANSWERS} are accepted")
        return value

    logprobs: Annotated[int, pydantic.Field(ge=0, le=_MOST_TOP_COMPLETION)] | None = None


class TokenizeRequest(_Body):
    """The body of `POST /tokenize`: a prompt or messages."""

    model: Text | None = None
    prompt: Text | None = None
    messages: _Messages | None = None
    add_special_tokens: bool = True
    """Whether a prompt gets what the family puts in front: BOS for InternLM2."""

    @pydantic.model_validator(mode="after")
    def need_one(self) -> "TokenizeRequest":
        """Refuse both and none."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class PromptTokensDetails(pydantic.BaseModel):
    """What is known of the prompt's tokens."""

    cached_tokens: int
    """Tokens that an earlier request had in front, computed and kept."""


class Usage(pydantic.BaseModel):
    """Token counts; image tokens count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
