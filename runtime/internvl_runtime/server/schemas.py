"""Request bodies of the OpenAI API, as far as this server reads them.

Source: the OpenAI API reference for chat completions. Unknown fields are
ignored, as OpenAI's own clients send new ones now and then; known ones that
would change the answer and are not offered are refused by name.
"""

from typing import Annotated, Any, Literal

import pydantic

_NOT_OFFERED: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "stop": (None, [], ""),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "audio": (None,),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "response_format": (None, {"type": "text"}),
    "ignore_eos": (None, False),
}
"""Known fields and the values of them that change nothing."""


def _refuse_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError("the text holds half of a surrogate pair; send whole characters") from e
    return text


Text = Annotated[str, pydantic.AfterValidator(_refuse_lone_surrogates)]


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)


class TextPart(_Body):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Body):
    """Where a picture is."""

    url: str


class ImagePart(_Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, pydantic.Field(discriminator="type")]


class Message(_Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | tuple[ContentPart, ...] | None = None


class StreamOptions(_Body):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class ChatCompletionRequest(_Body):
    """The body of `POST /v1/chat/completions`."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True)

    model: Text
    messages: Annotated[tuple[Message, ...], pydantic.Field(min_length=1)]
    max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @pydantic.model_validator(mode="after")
    def refuse_what_is_not_offered(self) -> "ChatCompletionRequest":
        """Refuse fields that would change the answer and have no effect here."""
        for name, harmless in _NOT_OFFERED.items():
            value: Any = (self.model_extra or {}).get(name)
            if value not in harmless:
                raise ValueError(f"{name} is not offered by this server; leave it out")
        return self


class Usage(pydantic.BaseModel):
    """Token counts; image tokens count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
