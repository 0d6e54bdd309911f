"""What a request becomes: grids, tiles, token ids, hashes, without any weights."""

import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import rich.console
import rich.table

from internvl_runtime import errors, settings
from internvl_runtime.engine import interface
from internvl_runtime.model import config, prompt, tokenizer
from internvl_runtime.server import media, prepare, schemas
from internvl_runtime.vision import fetch


class _Request(pydantic.BaseModel):
    """The part of a chat request that makes its prompt."""

    messages: tuple[schemas.Message, ...]


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A prompt and its pictures."""

    prompt: prompt.Prompt
    pictures: Sequence[media.Opened]

    def describe(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "prompt_tokens": len(self.prompt.token_ids),
            "parts": self._count_parts(),
            "token_ids": list(self.prompt.token_ids),
            "images": [
                {
                    "width": picture.width,
                    "height": picture.height,
                    "columns": picture.grid.columns,
                    "rows": picture.grid.rows,
                    "tiles": picture.grid.tiles,
                    "tiles_sha256": hashlib.sha256(picture.load().tobytes()).hexdigest(),
                    "content_hash": picture.content_hash,
                    "offset": placement.offset,
                    "tokens": placement.length,
                }
                for placement in sorted(self.prompt.placements, key=lambda place: place.index)
                for picture in [self.pictures[placement.index]]
            ],
        }

    def _count_parts(self) -> dict[str, int]:
        context = sum(placement.length for placement in self.prompt.placements)
        markers = 2 * len(self.prompt.placements)
        text = len(self.prompt.token_ids) - context - markers
        return {"text": text, "image_markers": markers, "image_context": context}


async def inspect(
    model_dir: Path, messages: Sequence[schemas.Message], *, config_: settings.Settings
) -> Inspected:
    """Prepare a conversation for the model of a checkpoint's folder.

    Files are read wherever this user may read them. Raises StageError for a
    folder that is none, and RequestError for a request that can not be served.
    """
    model = config.read_model_config(model_dir)
    local = config_.model_copy(update={"media_folder": Path("/")})
    fetcher = fetch.Fetcher(fetch.FetchPolicy())
    preparer = prepare.create_preparer(
        model=model,
        tokens=tokenizer.load_tokenizer(model_dir, model),
        limits=_limits_of(model),
        fetcher=fetcher,
        config_=local,
    )
    try:
        fetched = await preparer.loader.fetch(messages)
        return Inspected(*preparer.expand_chat(messages, fetched))
    finally:
        await fetcher.close()


def read_request(path: Path) -> tuple[schemas.Message, ...]:
    """Read the messages of a chat request in OpenAI's JSON; raises RequestError when it is none."""
    try:
        return _Request.model_validate_json(path.read_bytes()).messages
    except OSError as e:
        raise errors.RequestError(f"{path} can not be read: {e.strerror}") from e
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise errors.RequestError(f"{path}: {where}: {first['msg']}") from e


def question(
    images: Sequence[Path], text: str, *, max_dynamic_patch: int | None
) -> tuple[schemas.Message, ...]:
    """Return one user message: pictures, then text; raises RequestError for a missing picture."""
    for image in images:
        if not image.is_file():
            raise errors.RequestError(f"there is no file {image}")
    parts: list[dict[str, Any]] = [
        {
            "type": "image_url",
            "image_url": {"url": _file_url(image), "max_dynamic_patch": max_dynamic_patch},
        }
        for image in images
    ]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return (schemas.Message.model_validate(message),)


def show(inspected: Inspected, *, console: rich.console.Console) -> None:
    """Print tables for a person."""
    described = inspected.describe()
    pictures = rich.table.Table(title="pictures", title_justify="left")
    for heading in ("#", "size", "grid", "tiles", "tokens", "offset", "sha256 of the tiles"):
        pictures.add_column(heading)
    for number, image in enumerate(described["images"], start=1):
        pictures.add_row(
            str(number), f"{image['width']} x {image['height']}",
            f"{image['columns']} x {image['rows']}", str(image["tiles"]), str(image["tokens"]),
            str(image["offset"]), image["tiles_sha256"],
        )  # fmt: skip
    parts = rich.table.Table(title="prompt tokens", title_justify="left")
    for heading in ("text", "<img> and </img>", "<IMG_CONTEXT>", "together"):
        parts.add_column(heading, justify="right")
    counts = described["parts"]
    parts.add_row(
        str(counts["text"]), str(counts["image_markers"]), str(counts["image_context"]),
        str(described["prompt_tokens"]),
    )  # fmt: skip
    if described["images"]:
        console.print(pictures)
    console.print(parts)
    console.print(f"token ids: {_shorten(inspected.prompt)}")


def _shorten(expanded: prompt.Prompt) -> str:
    """Write token ids with every run of a picture's tokens as `id*count`."""
    words: list[str] = []
    position = 0
    for placement in expanded.placements:
        words += map(str, expanded.token_ids[position : placement.offset])
        words.append(f"{expanded.token_ids[placement.offset]}*{placement.length}")
        position = placement.offset + placement.length
    return json.dumps([*words, *map(str, expanded.token_ids[position:])]).replace('"', "")


def _limits_of(model: config.ModelConfig) -> interface.EngineLimits:
    context = model.language.max_position_embeddings
    return interface.EngineLimits(
        max_sequence_tokens=context,
        max_input_tokens=context,
        max_batched_tokens=context,
        max_batch_size=1,
        max_tiles_per_image=model.max_dynamic_patch,
        max_tiles_per_request=context // config.TOKENS_PER_TILE,
    )


def _file_url(path: Path) -> str:
    return "file://" + urllib.parse.quote(str(path.resolve()))
