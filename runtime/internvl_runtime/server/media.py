"""Pictures and videos of a request: fetched in the event loop, opened in a thread."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

from internvl_runtime import errors, settings
from internvl_runtime.engine import interface
from internvl_runtime.model import conversation
from internvl_runtime.server import schemas
from internvl_runtime.vision import fetch, picture, sources, video

Opened = picture.Picture | picture.Frame


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What was got in the event loop, for the thread that opens the rest."""

    contents: Mapping[str, bytes]
    """Bytes by URL, for the URLs that lie in the web."""
    frames: Mapping[schemas.VideoUrl, list[picture.Frame]]


_ROLES = {
    "system": conversation.Role.SYSTEM,
    "developer": conversation.Role.SYSTEM,
    "user": conversation.Role.USER,
    "assistant": conversation.Role.ASSISTANT,
}
_FETCHED_AT_ONCE = 8
"""URLs of one request."""
_KNOWN_PICTURES = 4096
"""Data URLs that are remembered, about 2 MB."""
_DECODED_AT_ONCE = 2
"""Videos of all requests: each has a process of its own."""


class Loader:
    """Gets the media of requests under the server's limits."""

    def __init__(
        self, fetcher: fetch.Fetcher, *, limits: interface.EngineLimits, settings: settings.Settings
    ) -> None:
        self._fetcher = fetcher
        self._limits = limits
        self._settings = settings
        self._decoding = asyncio.Semaphore(_DECODED_AT_ONCE)
        self._known = picture.KnownPictures(most=_KNOWN_PICTURES)

    async def fetch(self, messages: Sequence[schemas.Message]) -> Fetched:
        """Fetch what lies in the web, each URL once, and decode videos.

        Raises RequestError when something can not be had, or is too much.
        """
        urls = _web_urls(messages, self._settings)
        self._check_counts(urls, messages)
        budget = fetch.Budget(self._settings.max_request_bytes)
        at_once = asyncio.Semaphore(_FETCHED_AT_ONCE)

        async def fetch_one(url: str, max_bytes: int) -> bytes:
            async with at_once:
                return await self._fetcher.fetch(url, max_bytes=max_bytes, budget=budget)

        async with _first_error(), asyncio.TaskGroup() as tasks:
            fetching = {
                url: tasks.create_task(fetch_one(url, most), name=f"fetch {url[:80]}")
                for url, most in urls.items()
            }
        contents = {url: task.result() for url, task in fetching.items()}
        frames = {
            video_url: await self._decode(video_url, contents) for video_url in _videos(messages)
        }
        return Fetched(contents, frames)

    async def _decode(
        self, described: schemas.VideoUrl, contents: Mapping[str, bytes]
    ) -> list[picture.Frame]:
        frames = described.num_frames or self._settings.video_frames
        if frames > self._settings.max_video_frames:
            raise errors.RequestError(
                f"video_url.num_frames is {frames}; at most {self._settings.max_video_frames} "
                "frames are accepted: ask for fewer",
                parameter="messages",
            )
        limits = video.VideoLimits(
            max_pixels=self._settings.max_image_pixels, seconds=self._settings.video_seconds
        )
        data = contents.get(described.url)
        if data is None:
            data = await asyncio.to_thread(
                sources.read_url,
                described.url,
                max_bytes=self._settings.max_video_bytes,
                folder=self._settings.media_folder,
            )
        async with self._decoding:
            return await video.read_frames(data, frames=frames, limits=limits)

    def _check_counts(self, urls: Mapping[str, int], messages: Sequence[schemas.Message]) -> None:
        most = self._limits.max_tiles_per_request
        if len(urls) > most:
            raise errors.RequestError(
                f"there are {len(urls)} URLs; at most {most} tiles are accepted in a request: send "
                "fewer pictures",
                parameter="messages",
                code="too_many_tiles",
            )
        videos = sum(1 for _ in _videos(messages))
        if videos > self._settings.max_videos:
            raise errors.RequestError(
                f"there are more than {self._settings.max_videos} videos; send fewer in a request",
                parameter="messages",
            )

    def read(
        self, messages: Sequence[schemas.Message], fetched: Fetched
    ) -> tuple[list[conversation.Turn], list[Opened]]:
        """Return the conversation and its pictures, in order. Blocking: call it in a thread."""
        reader = _Reader(self._limits, self._settings, fetched, self._known)
        return [reader.read_message(message) for message in messages], reader.opened


@dataclasses.dataclass
class _Reader:
    """Opens one request's media."""

    limits: interface.EngineLimits
    settings: settings.Settings
    fetched: Fetched
    known: picture.KnownPictures
    opened: list[Opened] = dataclasses.field(default_factory=list)

    def read_message(self, message: schemas.Message) -> conversation.Turn:
        content = message.content or ""
        parts = (content,) if isinstance(content, str) else tuple(map(self._read_part, content))
        return conversation.Turn(_ROLES[message.role], parts)

    def _read_part(self, part: schemas.ContentPart) -> conversation.Part:
        match part:
            case schemas.TextPart():
                return part.text
            case schemas.ImagePart():
                return self._add(self._open_picture(part))
            case schemas.VideoPart():
                frames = self.fetched.frames[part.video_url]
                return conversation.Video(tuple(map(self._add, frames)))

    def _add(self, opened: Opened) -> conversation.Image:
        self.opened.append(opened)
        most = self.limits.max_tiles_per_request
        tiles = sum(one.grid.tiles for one in self.opened)
        if tiles > most:
            raise errors.RequestError(
                f"the pictures make {tiles} tiles or more; at most {most} are accepted in a "
                "request: send fewer pictures, or give them a lower max_dynamic_patch or "
                'detail "low"',
                parameter="messages",
                code="too_many_tiles",
            )
        return conversation.Image(len(self.opened) - 1)

    def _open_picture(self, part: schemas.ImagePart) -> picture.Picture:
        url = part.image_url.url
        max_tiles = _tile_limit(part, self.limits.max_tiles_per_image)
        max_pixels = self.settings.max_image_pixels
        if sources.scheme_of(url) == "data":
            return self.known.open(
                url, lambda: self._read(url), max_tiles=max_tiles, max_pixels=max_pixels
            )
        content = self.fetched.contents.get(url) or self._read(url)
        return picture.open_picture(content, max_tiles=max_tiles, max_pixels=max_pixels)

    def _read(self, url: str) -> bytes:
        return sources.read_url(
            url, max_bytes=self.settings.max_image_bytes, folder=self.settings.media_folder
        )


def _tile_limit(part: schemas.ImagePart, most: int) -> int:
    """Return the most tiles of a picture's grid; raises RequestError above the server's limit."""
    wanted = part.image_url.max_dynamic_patch or part.max_dynamic_patch
    if wanted is not None and wanted > most:
        raise errors.RequestError(
            f"max_dynamic_patch is {wanted}; this engine was built for at most {most} tiles a "
            f"picture: ask for at most {most}",
            parameter="messages",
            code="too_many_tiles",
        )
    if part.image_url.detail == "low":
        return 1
    return wanted or most


@contextlib.asynccontextmanager
async def _first_error() -> AsyncIterator[None]:
    """Raise the first refusal alone where a group of tasks raises several at once."""
    try:
        yield
    except BaseExceptionGroup as group:
        # Not `except*`: Python before 3.11.4 wraps in a group again what is raised from there.
        refusals, others = group.split(errors.RequestError)
        if refusals is None or others is not None:
            raise
        raise refusals.exceptions[0] from None


def _videos(messages: Sequence[schemas.Message]) -> Iterator[schemas.VideoUrl]:
    parts = (part for message in messages for part in message.parts)
    return (part.video_url for part in parts if isinstance(part, schemas.VideoPart))


def _web_urls(messages: Sequence[schemas.Message], settings_: settings.Settings) -> dict[str, int]:
    """Return the URLs to fetch, with the most bytes of each."""
    return {
        url: most
        for message in messages
        for url, most in _urls(message, settings_)
        if sources.scheme_of(url) in sources.WEB_SCHEMES
    }


def _urls(message: schemas.Message, settings_: settings.Settings) -> Iterator[tuple[str, int]]:
    for part in message.parts:
        match part:
            case schemas.ImagePart():
                yield part.image_url.url, settings_.max_image_bytes
            case schemas.VideoPart():
                yield part.video_url.url, settings_.max_video_bytes
