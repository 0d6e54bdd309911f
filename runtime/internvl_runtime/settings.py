"""Every setting of the runtime, read from the environment in this place alone."""

import difflib
from collections.abc import Iterable
from pathlib import Path

import pydantic
import pydantic.fields
import pydantic_settings

PREFIX = "INTERNVL_RUNTIME_"
"""Of the environment variables."""


class Settings(pydantic_settings.BaseSettings):
    """Settings whose environment variables begin with `PREFIX`."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    cache_root: Path = Path("/cache")
    """Folder that holds weights/, checkpoints/ and engines/. A claim is mounted here in a pod."""

    termination_log: Path = Path("/dev/termination-log")
    """File that gets the one JSON object a build stage ends with; skipped where there is none."""

    huggingface_token: str | None = pydantic.Field(None, validation_alias="HF_TOKEN", repr=False)
    """Token of the Hugging Face hub, for gated and private repositories."""

    modelscope_token: str | None = pydantic.Field(
        None, validation_alias="MODELSCOPE_API_TOKEN", repr=False
    )
    """Token of ModelScope."""

    source_headers_folder: Path | None = None
    """Folder with a file for each header that an `http` source wants; a Secret is mounted here."""

    source_seconds: float = 30.0
    """How long a source may send nothing before the connection counts as lost."""

    source_failures: int = 8
    """Failures in a row, without a byte between them, after which a source is unreachable."""

    host: str = "0.0.0.0"  # noqa: S104 - a pod serves its Service on every address
    """Address that the HTTP server listens on."""

    port: int = 8000
    """Port of the OpenAI API."""

    metrics_port: int = 9400
    """Port of `/metrics`, apart from the API so that it is never exposed with it; 0: none."""

    served_model_names: tuple[str, ...] = ()
    """Names that requests may use in `model`; empty: the first 12 digits of the engine's key."""

    max_image_bytes: int = 20 * 2**20
    """Largest encoded picture that is accepted, in bytes."""

    max_image_pixels: int = 89_478_485
    """Largest picture, in pixels, checked before it is decoded (Pillow's own warning limit)."""

    max_queued_requests: int = 256
    """Requests that may wait for the engine; one more gets a 429. Higher means longer waits."""

    max_request_bytes: int = 64 * 2**20
    """Largest request body, in bytes: base64 pictures count with a third more. What one request's
    URLs bring together has the same bound."""

    max_waiting_bytes: int = 2 * 2**30
    """Bytes of pictures that waiting requests may hold together; one more gets a 429."""

    max_messages: int = 1024
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

    fetch_seconds: float = 10.0
    """Time for one picture, redirects included."""

    max_video_bytes: int = 48 * 2**20
    """Largest video, in bytes."""

    max_videos: int = 4
    """Videos of one request: each takes a process for a while."""

    video_frames: int = 8
    """Frames of a video that says no `num_frames`; the model card's default."""

    max_video_frames: int = 32
    """Most `num_frames` of a video: each frame is a tile of 256 tokens."""

    video_seconds: float = 30.0
    """Processor and wall time for decoding one video."""

    api_keys_file: Path | None = None
    """File with one API key a line, read again when it changes; none: no key is needed."""

    cors_allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API; empty: CORS is off."""

    preparation_threads: int = 2
    """Requests whose pictures and text are prepared at the same time; the others wait."""

    worker_start_seconds: float = 1800.0
    """How long the engine worker may take to load before the server gives up."""

    propagation_seconds: float = 10.0
    """How long requests are still accepted after SIGTERM, until every node knows that this pod
    has left its Service."""

    drain_seconds: float = 60.0
    """How long running requests may go on behind that."""

    stalled_seconds: float = 60.0
    """How long a stream waits for a client that does not read; its request is cancelled then."""

    tokenizer_model: Path = Path("tokenizer.model")
    """A copy of InternLM2's tokenizer.model; only synthesizing its published shapes needs it."""

    kv_cache_bytes: int = 0
    """Most bytes of the key/value cache, which takes fewer where fewer are of use. 0: at most 4 GiB
    on a CPU, and all that is free behind the largest step on a GPU."""

    picture_cache_bytes: int = 512 * 2**20
    """Bytes of picture features that stay for later requests with the same pictures."""

    worker_silent_seconds: float = 30.0
    """How long the engine worker may give no sign of life before it is ended, and the pod."""

    worker_step_seconds: float = 600.0
    """How long one engine step may take before the worker is ended, and the pod."""

    torch_threads: int = 0
    """Threads that torch uses on a CPU; 0 leaves the choice to torch."""


def variables() -> dict[str, pydantic.fields.FieldInfo]:
    """Return every environment variable that is read, with its field."""
    return {
        str(field.validation_alias or f"{PREFIX}{name}".upper()): field
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
