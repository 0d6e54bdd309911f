"""Frames of a video, decoded in a process of its own.

A container format is a large surface: FFmpeg runs under limits of memory,
processor time and wall time, reads nothing but the bytes it is given, and its
end is at worst the end of one request.
"""

import argparse
import asyncio
import dataclasses
import io
import json
import resource
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import PIL.Image

from internvl_runtime import errors
from internvl_runtime.model import config
from internvl_runtime.vision import grid, picture, sources, tiles

_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
"""Demuxers that refer to nothing outside the file: no playlists, no concatenation."""
_MEMORY_BYTES = 2 * 2**30
_TILE_BYTES = config.TILE_SIZE * config.TILE_SIZE * 3
_EXIT_REFUSED = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """What one video may cost."""

    max_pixels: int
    """Largest frame."""
    seconds: float
    """Wall time and processor time of the decoding process."""


def frame_indices(count: int, frames: int) -> list[int]:
    """Return which of a video's frames are shown: one from the middle of each segment.

    Source: `get_index` of the model card, without bounds; `round` rounds half
    to even.
    """
    last = count - 1
    segment = float(last) / frames
    return [int(segment / 2 + round(segment * number)) for number in range(frames)]


async def read_frames(data: bytes, *, frames: int, limits: VideoLimits) -> list[picture.Frame]:
    """Return that many frames of a video, one tile each.

    Raises RequestError when the bytes are no video, or decoding takes too
    much. A cancelled call ends the process.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "internvl_runtime.vision.video", f"--frames={frames}",
        f"--max-pixels={limits.max_pixels}", f"--seconds={limits.seconds}",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(limits.seconds):
            output, told = await process.communicate(data)
    except TimeoutError as e:
        raise _refused(f"decoding takes longer than {limits.seconds:g} s") from e
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == _EXIT_REFUSED:
        raise _refused(told.decode("utf-8", "replace").strip())
    if process.returncode:
        raise _refused("it can not be decoded within the limits of memory and time")
    head, _, body = output.partition(b"\n")
    width, height = json.loads(head)
    decoded = np.frombuffer(body, np.uint8).reshape(-1, config.TILE_SIZE, config.TILE_SIZE, 3)
    return [picture.frame_of(tile, width=width, height=height) for tile in decoded]


def _refused(message: str) -> errors.RequestError:
    return sources.refused(
        f"video: {message}; send a short MP4, WebM, MOV, MKV or AVI file", code="invalid_video"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read a video from the standard input, write size and tiles to the standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--max-pixels", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parsed = parser.parse_args(arguments)
    _limit_this_process(parsed.seconds)
    try:
        width, height, decoded = _decode(
            sys.stdin.buffer.read(), frames=parsed.frames, max_pixels=parsed.max_pixels
        )
    except errors.RequestError as e:
        print(e.message, file=sys.stderr)
        return _EXIT_REFUSED
    sys.stdout.buffer.write(json.dumps([width, height]).encode() + b"\n")
    for tile in decoded:
        sys.stdout.buffer.write(tile.tobytes())
    return 0


def _limit_this_process(seconds: float) -> None:
    processor = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (processor, processor))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _decode(
    data: bytes, *, frames: int, max_pixels: int
) -> tuple[int, int, list[npt.NDArray[np.uint8]]]:
    import av

    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    try:
        with av.open(io.BytesIO(data), "r", options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise errors.RequestError("the file has no video stream")
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > max_pixels:
                raise errors.RequestError(
                    f"a frame has {width} x {height} pixels, at most {max_pixels} are accepted"
                )
            count = sum(packet.size > 0 for packet in container.demux(stream))
            if not count:
                raise errors.RequestError("the video has no frame")
            container.seek(0)
            wanted = frame_indices(count, frames)
            found = {}
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = _tile(frame.to_image())
                if number == wanted[-1]:
                    break
    except av.FFmpegError as e:
        raise errors.RequestError(f"it can not be read ({e.strerror})") from e
    if not found:
        raise errors.RequestError("none of its frames can be decoded")
    last = max(found)
    return width, height, [found[min(index, last)] for index in wanted]


def _tile(frame: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    (tile,) = tiles.cut_tiles(frame.convert("RGB"), grid.Grid(1, 1))
    return np.asarray(tile)


if __name__ == "__main__":
    sys.exit(main())
