"""Write the quickstart's videos: one picture of the quickstart among others.

    python scripts/quickstart_videos.py recipes/quickstart/pictures/twemoji_test.tar.gz \\
        recipes/quickstart/videos/twemoji_videos.tar.gz

Only the centre frame shows the picture that the label is of; the frames before and after show pictures of other
classes. MPEG-4 Part 2 in MP4, every frame a key frame, one thread: the same bytes from the same build of FFmpeg.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

SIDE = 64
KEY_EVERY = 1
"""Every frame is a key frame: their pictures share nothing."""
PER_CLASS = 2
LENGTHS = (5, 6, 8, 9)
"""Frames of a video, in turn; even and odd, so that the rounding of the centre counts."""


def read_shard(path: Path) -> list[tuple[str, str, Image.Image]]:
    """(key, label, picture) of each sample, sorted by key."""
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as shard:
        for member in shard:
            key, _, extension = member.name.partition(".")
            stream = shard.extractfile(member)
            if stream is not None:
                parts.setdefault(key, {})[extension] = stream.read()
    return [
        (key, json.loads(part["json"])["label"], Image.open(io.BytesIO(part["webp"])).convert("RGB"))
        for key, part in sorted(parts.items())
        if "webp" in part
    ]


def encode(frames: list[Image.Image]) -> bytes:
    """The frames as an MP4 file at 5 frames a second."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("mpeg4", rate=5, options={"flags": "+bitexact+qscale", "global_quality": "944"})
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        video.gop_size = KEY_EVERY
        video.codec_context.thread_count = 1
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = number, Fraction(1, 5)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return stream.getvalue()


def main() -> None:
    """Write the shard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="shard of pictures")
    parser.add_argument("target", type=Path, help="shard of videos to write")
    arguments = parser.parse_args()
    samples = read_shard(arguments.pictures)
    taken: dict[str, int] = {}
    chosen = []
    for sample in samples:
        taken[sample[1]] = taken.get(sample[1], 0) + 1
        if taken[sample[1]] <= PER_CLASS:
            chosen.append(sample)
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    with (
        arguments.target.open("wb") as stream,
        gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as shard,
    ):
        for position, (key, label, picture) in enumerate(chosen):
            length = LENGTHS[position % len(LENGTHS)]
            others = [image for _, other, image in chosen[position:] + chosen[:position] if other != label][
                : length - 1
            ]
            frames = [*others[: length // 2], picture, *others[length // 2 :]]
            for extension, content in (("mp4", encode(frames)), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
