"""Every setting of the runtime, read from the environment in this place alone."""

from pathlib import Path

import pydantic_settings


class Settings(pydantic_settings.BaseSettings):
    """Settings with the prefix `INTERNVL_RUNTIME_`."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix="INTERNVL_RUNTIME_", extra="forbid", frozen=True
    )

    cache_root: Path = Path("/cache")
    """Folder that holds weights/, checkpoints/ and engines/. A claim is mounted here in a pod."""

    termination_log: Path = Path("/dev/termination-log")
    """File that gets the one JSON object a build stage ends with; skipped where there is none."""

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
    """Largest request body, in bytes: base64 pictures count with a third more."""

    preparation_threads: int = 2
    """Requests whose pictures and text are prepared at the same time; the others wait."""

    worker_start_seconds: float = 1800.0
    """How long the engine worker may take to load before the server gives up."""

    drain_seconds: float = 60.0
    """How long running requests may go on after SIGTERM."""

    tokenizer_model: Path = Path("../shared/data/tokenizers/internlm2.model")
    """A copy of InternLM2's tokenizer.model; only synthesizing its published shapes needs it."""

    torch_threads: int = 0
    """Threads that torch uses on a CPU; 0 leaves the choice to torch."""
