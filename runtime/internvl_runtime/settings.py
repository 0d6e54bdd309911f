"""Every setting of the runtime, read from the environment in this place alone."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import pydantic
import pydantic.fields
import pydantic_settings

PREFIX = "INTERNVL_RUNTIME_"
"""Of the environment variables."""


_Port = Annotated[int, pydantic.Field(ge=0, le=65535)]
_Count = Annotated[int, pydantic.Field(ge=0)]
_Seconds = Annotated[float, pydantic.Field(ge=0)]


class Settings(pydantic_settings.BaseSettings):
    """Settings whose environment variables begin with `PREFIX`."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    cache_root: Path = Path("/cache")
    """Folder that holds weights/, checkpoints/ and engines/. A claim is mounted here in a pod."""

    termination_log: Path = Path("/dev/termination-log")
    """File that gets the one JSON object that a stage, or a server that fails, ends with; skipped
    where there is none."""

    huggingface_token: str | None = pydantic.Field(None, validation_alias="HF_TOKEN", repr=False)
    """Token of the Hugging Face hub, for gated and private repositories."""

    modelscope_token: str | None = pydantic.Field(
        None, validation_alias="MODELSCOPE_API_TOKEN", repr=False
    )
    """Token of ModelScope."""

    source_headers_folder: Path | None = None
    """Folder with a file for each header that an `http` source wants; a Secret is mounted here."""

    source_seconds: _Seconds = 30.0
    """How long a source may send nothing before the connection counts as lost."""

    source_failures: _Count = 8
    """Failures in a row, without a byte between them, after which a source is unreachable."""

    host: str = "0.0.0.0"  # noqa: S104 - a pod serves its Service on every address
    """Address that the HTTP server listens on."""

    port: _Port = 8000
    """Port of the OpenAI API."""

    metrics_port: _Port = 9400
    """Port of `/metrics`, apart from the API so that it is never exposed with it; 0: none."""

    served_model_names: tuple[str, ...] = ()
    """Names that requests may use in `model`; empty: the first 12 digits of the engine's key."""

    max_image_bytes: _Count = 20 * 2**20
    """Largest encoded picture that is accepted, in bytes."""

    max_image_pixels: _Count = 89_478_485
    """Largest picture, in pixels, checked before it is decoded (Pillow's own warning limit)."""

    max_queued_requests: _Count = 256
    """Requests that may wait for the engine; one more gets a 429. Higher means longer waits."""

    max_request_bytes: _Count = 64 * 2**20
    """Largest request body, in bytes: base64 pictures count with a third more. What one request's
    URLs bring together has the same bound."""

    max_waiting_bytes: _Count = 2 * 2**30
    """Bytes of pictures that waiting requests may hold together; one more gets a 429."""

    max_messages: _Count = 1024
    """Messages of one conversation."""

    parse_special_tokens: bool = False
    """Whether the words of special tokens in a user's text (`<ref>`, `<|im_end|>`) become those
    tokens, as in the authors' code. Off, text stays text: nobody writes another's turn."""

    media_folder: Path | None = None
    """Folder below which `file://` pictures and videos may be read; none: no file is."""

    fetch_allowed_hosts: tuple[str, ...] = ()
    """Hosts of http(s) pictures, `.suffix` for all below one; empty: every public host."""

    fetch_private_hosts: tuple[str, ...] = ()
    """Hosts whose addresses may be private, loopback or link-local. Metadata addresses never."""

    fetch_proxy: str | None = None
    """HTTP proxy that http(s) pictures are fetched through; it resolves and connects then."""

    fetch_seconds: _Seconds = 10.0
    """Time for one picture, redirects included."""

    max_video_bytes: _Count = 48 * 2**20
    """Largest video, in bytes."""

    max_videos: _Count = 4
    """Videos of one request: each takes a process for a while."""

    video_frames: _Count = 8
    """Frames of a video that says no `num_frames`; the model card's default."""

    max_video_frames: _Count = 32
    """Most `num_frames` of a video: each frame is a tile of 256 tokens."""

    video_seconds: _Seconds = 30.0
    """Processor and wall time for decoding one video."""

    api_keys_file: Path | None = None
    """File with one API key a line, read again when it changes; none: no key is needed."""

    cors_allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API; empty: CORS is off."""

    preparation_threads: Annotated[int, pydantic.Field(ge=1)] = 2
    """Requests whose pictures and text are prepared at the same time; the others wait."""

    worker_start_seconds: _Seconds = 1800.0
    """How long the engine worker may take to load before the server gives up."""

    propagation_seconds: _Seconds = 10.0
    """How long requests are still accepted after SIGTERM, until every node knows that this pod
    has left its Service."""

    drain_seconds: _Seconds = 60.0
    """How long running requests may go on behind that."""

    stalled_seconds: _Seconds = 60.0
    """How long a stream waits for a client that does not read; its request is cancelled then."""

    tokenizer_model: Path = Path("tokenizer.model")
    """A copy of InternLM2's tokenizer.model; only synthesizing its published shapes needs it."""

    kv_cache_bytes: _Count = 0
    """Most bytes of the key/value cache, which takes fewer where fewer are of use. 0: at most 4 GiB
    on a CPU, and all that is free behind the largest step on a GPU."""

    picture_cache_bytes: _Count = 512 * 2**20
    """Bytes of picture features that stay for later requests with the same pictures."""

    worker_silent_seconds: _Seconds = 30.0
    """How long the engine worker may give no sign of life before it is ended, and the pod."""

    worker_step_seconds: _Seconds = 600.0
    """How long one engine step may take before the worker is ended, and the pod."""

    torch_threads: _Count = 0
    """Threads that torch uses on a CPU; 0 leaves the choice to torch."""


def variable(location: tuple[int | str, ...]) -> str:
    """Return the environment variable of a setting."""
    return f"{PREFIX}{'_'.join(map(str, location))}".upper()


def termination_log(environment: Mapping[str, str]) -> Path:
    """Return where a result goes, also where other settings can not be read."""
    default = Settings.model_fields["termination_log"].default
    return Path(environment.get(variable(("termination_log",)), default))


def variables() -> dict[str, pydantic.fields.FieldInfo]:
    """Return every environment variable that is read, with its field."""
    return {
        str(field.validation_alias or variable((name,))): field
        for name, field in Settings.model_fields.items()
    }


def misspelt(environment: Iterable[str]) -> dict[str, str]:
    """Return the variables of our prefix that are read by nobody, with the nearest that is.

    Kubernetes sets some for a Service of such a name; nothing that is read is near them.
    """
    known = variables()
    near = {
        name: difflib.get_close_matches(name, known, n=1, cutoff=0.9)
        for name in environment
        if name.startswith(PREFIX) and name not in known
    }
    return {name: matches[0] for name, matches in near.items() if matches}
