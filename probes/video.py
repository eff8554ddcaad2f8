"""The centre frame of a video. No torch."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from probes.sections import RecipeError

if TYPE_CHECKING:
    from PIL import Image


def decode_centre_frame(data: bytes) -> Image.Image:
    """Frame number `n // 2` (from 0) of the `n` that decode, in the order they are shown.

    Frames are counted by decoding them all: containers' own counts, lengths and seek tables are often approximate.
    A rotation in the file's metadata is not applied, as EXIF orientation is not.

    Args:
        data: an encoded video; its first video stream is read.

    Raises:
        RecipeError: PyAV is not installed.
        ValueError: no video stream, no frame, fewer frames than the container lists, or a damaged centre frame.
        av.error.FFmpegError: the container or the stream cannot be read.
    """
    av = _import_av()
    count = _count_frames(av, data)
    with av.open(io.BytesIO(data)) as container:
        for number, frame in enumerate(container.decode(_video_stream(container))):
            if number == count // 2:
                if frame.is_corrupt:
                    raise ValueError(f"its centre frame, {number} of {count}, is damaged")
                image: Image.Image = frame.to_image()
                return image
    raise ValueError(f"it decodes to {count} frames at first and to fewer again")


def _count_frames(av: Any, data: bytes) -> int:
    """Number of frames that decode.

    A file cut short is recognised where its container lists its frames (MP4, MOV, AVI); others only end earlier.
    """
    packets = frames = 0
    with av.open(io.BytesIO(data)) as container:
        stream = _video_stream(container)
        listed = stream.frames
        for packet in container.demux(stream):
            packets += packet.size > 0  # an empty packet asks the decoder for what it still holds
            frames += len(packet.decode())
    if packets < listed:
        raise ValueError(f"it is truncated: {packets} of the {listed} frames that it lists")
    if not frames:
        raise ValueError("it has no frame")
    return frames


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it has no video stream")
    return container.streams.video[0]


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise RecipeError(
            "data.media is video and PyAV is not installed; run pip install 'eva-clip-transfer[video]'"
        ) from error
    return av
