"""Centre frames against the frames that were written, and what happens to files that are no whole videos."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probes import zeroshot
from probes.sources import open_source

av = pytest.importorskip("av")
from probes.video import decode_centre_frame  # noqa: E402

REPO = Path(__file__).resolve().parents[2]
SHARD = REPO / "recipes/quickstart/videos/twemoji_videos.tar.gz"


def write_video(count: int, codec: str = "ffv1", container: str = "matroska") -> bytes:
    """`count` grey frames, frame i of value 20 i."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        video = output.add_stream(codec, rate=5)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        for number in range(count):
            pixels = np.full((32, 32, 3), 20 * number, dtype=np.uint8)
            output.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
        output.mux(video.encode(None))
    return stream.getvalue()


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9])
@pytest.mark.parametrize(("codec", "container"), [("ffv1", "matroska"), ("mpeg4", "mp4"), ("mpeg4", "avi")])
def test_the_centre_frame_is_number_half_the_count(count, codec, container):
    frame = np.asarray(decode_centre_frame(write_video(count, codec, container)))
    assert frame.shape == (32, 32, 3)
    assert abs(float(frame.mean()) - 20 * (count // 2)) < 4


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
def test_a_video_that_is_cut_is_an_error(keep):
    whole = write_video(9, "mpeg4", "avi")
    with pytest.raises((OSError, ValueError)):
        decode_centre_frame(whole[: keep if keep > 1 else int(keep * len(whole))])


def test_the_quickstart_video_shows_the_labelled_picture_in_its_centre():
    with tarfile.open(REPO / "recipes/quickstart/pictures/twemoji_test.tar.gz") as shard:
        pictures = {m.name: shard.extractfile(m).read() for m in shard if m.name.endswith(".webp")}
    source = open_source("tar", str(SHARD), "test", media="video")
    assert len(source) == 60
    for index in range(0, 60, 7):
        name = source.keys[index].rpartition("/")[2].replace(".mp4", ".webp")
        still = np.asarray(Image.open(io.BytesIO(pictures[name])).convert("RGB"), dtype=np.float32)
        assert np.abs(np.asarray(source.image(index), dtype=np.float32) - still).mean() < 16


def test_an_unreadable_video_is_named(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "videos" / label).mkdir(parents=True)
        (tmp_path / "videos" / label / "1.mkv").write_bytes(write_video(3))
    (tmp_path / "videos/dog/1.mkv").write_bytes(b"no video")
    argv = [str(REPO / "recipes/quickstart/video.yaml"), f"data.test={tmp_path / 'videos'}", "data.format=folder"]
    argv += [f"run.dir={tmp_path / 'run'}"]
    assert zeroshot.main(argv) == 2
    assert "unreadable video in test: " + str(tmp_path / "videos/dog/1.mkv") in capsys.readouterr().err
    assert zeroshot.main([*argv, "data.on_corrupt=skip", "run.on_existing=overwrite"]) == 0
    assert "1 unreadable video(s) were left out" in capsys.readouterr().out
