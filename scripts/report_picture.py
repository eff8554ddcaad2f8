"""Photograph a run's report for the first page of the documents.

    python -m scripts.report_picture RUN docs/report.png [--browser chromium] [--height 1690]

Needs Chromium (`apt-get install chromium`) and nothing from the network. The picture is reduced to 256 colours, which a
page of text and charts does not show.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def photograph(page: Path, target: Path, browser: str, width: int, height: int) -> None:
    """Write the top `height` pixels of an HTML page, laid out `width` pixels wide, as a PNG."""
    with tempfile.TemporaryDirectory() as profile:
        raw = Path(profile) / "page.png"
        size = [f"--window-size={width},{height}", f"--screenshot={raw}", f"--user-data-dir={profile}/profile"]
        command = [browser, *QUIET, *size, page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(raw) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("target", type=Path, help="PNG to write")
    parser.add_argument("--browser", default="chromium", help="the program")
    parser.add_argument("--width", type=int, default=1100, help="pixels")
    parser.add_argument("--height", type=int, default=1690, help="pixels from the top of the page")
    arguments = parser.parse_args()
    photograph(arguments.run / "report.html", arguments.target, arguments.browser, arguments.width, arguments.height)


if __name__ == "__main__":
    main()
