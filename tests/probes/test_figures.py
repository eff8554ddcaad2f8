"""Pictures of the report: every image mode becomes a small data URL that looks like the image."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from probes.figures import draw_thumbnail


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "YCbCr"])
def test_thumbnails_of_every_mode(mode: str) -> None:
    url, crisp = draw_thumbnail(Image.new(mode, (200, 100)))
    picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert picture.size == (96, 48)
    assert not crisp


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    url, crisp = draw_thumbnail(Image.fromarray(ramp))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L"))
    assert crisp
    assert (shown.min(), shown.max()) == (0, 255)
    assert 100 < np.median(shown) < 155
