"""Training curves as inline SVG and pictures as data URLs: the graphics of the report. Imports no torch."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from probes.results import Score

LogRows = Sequence[Mapping[str, float]]
Series = dict[str, tuple[list[float], list[float]]]
"""Line name -> epochs and values; values that are not finite are NaN."""

THUMBNAIL_SIDE = 96
CRISP_SIDE = 48
"""Pictures up to this side are enlarged without smoothing, so that their pixels stay visible."""
LOSSLESS_BYTES = 12_000
"""PNG up to this size, JPEG beyond: 24 thumbnails stay far below a megabyte."""

# matplotlib writes fixed colours; these stand-ins become CSS variables, which follow light and dark mode.
INK, GRID = "#010101", "#020202"
LINES = {"train": "#030303", "holdout": "#040404", "val": "#050505", "test": "#060606", "lr": INK}
CSS_COLOURS = {INK: "currentColor", GRID: "var(--line)"} | {
    colour: f"var(--{name})" for name, colour in LINES.items() if name != "lr"
}


@dataclass(frozen=True)
class Curve:
    """One drawn panel."""

    title: str
    svg: str
    """Markup without references to anything outside it."""
    summary: str
    """What the picture shows, in words, for those who cannot see it."""
    lines: tuple[str, ...]
    """Names of the lines drawn."""
    dashed: bool
    """Whether lines of the reference run are drawn."""
    dotted: bool
    """Whether the reported score is drawn."""


def read_number(row: Mapping[str, float], key: str, scale: float = 1.0) -> float:
    """The scaled value, NaN when absent or not finite."""
    value = row.get(key)
    return float(value) * scale if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def read_series(log: LogRows, columns: Mapping[str, tuple[str, float]]) -> Series:
    """Line name -> (epochs, values) of every column (key, scale) that has a finite value."""
    epochs = [float(row.get("epoch", index)) for index, row in enumerate(log)]
    lines = {name: (epochs, [read_number(row, *column) for row in log]) for name, column in columns.items()}
    return {name: line for name, line in lines.items() if not all(map(math.isnan, line[1]))}


PANELS: tuple[tuple[str, str, Mapping[str, tuple[str, float]]], ...] = (
    (
        "Top-1 accuracy",
        "Top-1 accuracy (%)",
        {
            "train": ("train_class_acc", 100.0),
            "holdout": ("holdout_acc1", 1.0),
            "val": ("val_acc1", 1.0),
            "test": ("test_acc1", 1.0),
        },
    ),
    (
        "Mean average precision",
        "Mean average precision (%)",
        {name: (f"{name}_mean_ap", 1.0) for name in ("train", "holdout", "val", "test")},
    ),
    (
        "Loss",
        "Cross-entropy (nats)",
        {name: (f"{name}_loss", 1.0) for name in ("train", "holdout", "val", "test")},
    ),
    ("Learning rate", "Learning rate (step size)", {"lr": ("train_lr", 1.0)}),
)


def draw_curves(log: LogRows, reference: LogRows | None, reported: Score) -> list[Curve]:
    """One panel per quantity that the log holds; the reference dashed, the reported score as a dot."""
    curves = []
    for title, label, columns in PANELS:
        series = read_series(log, columns)
        if not series:
            continue
        published = read_series(reference or (), columns)
        epochs = {epoch for line in series.values() for epoch in line[0]}
        dot = reported if title == PANELS[0][0] and reported.epoch in epochs else None
        ends = [f"{name} ends at {last_finite(line[1]):.4g}" for name, line in series.items()]
        svg = draw_panel(label, series, published, dot)
        summary = f"{label} by epoch: {', '.join(ends)}."
        curves.append(Curve(title, svg, summary, tuple(series), bool(published), dot is not None))
    return curves


def last_finite(values: Sequence[float]) -> float:
    """The last value that is a number; there must be one."""
    return next(value for value in reversed(values) if not math.isnan(value))


def draw_panel(label: str, series: Series, published: Series, dot: Score | None) -> str:
    """SVG markup of one panel."""
    # A fixed salt gives the same identifiers in every run; the label in it keeps those of two panels apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 10}):
        figure = Figure(figsize=(4.3, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for name, (epochs, values) in published.items():
            axes.plot(epochs, values, color=LINES[name], linewidth=1.3, linestyle=(0, (4, 3)))
        for name, (epochs, values) in series.items():
            marker = "o" if len(epochs) <= 12 else ""
            axes.plot(epochs, values, color=LINES[name], linewidth=1.8, marker=marker, markersize=3.5)
        if dot is not None:
            axes.plot([dot.epoch], [dot.top1], "o", color=INK, markersize=7, markerfacecolor="none", zorder=5)
        style_axes(axes, label)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(buffer.getvalue())


def style_axes(axes: Axes, label: str) -> None:
    """Labels, whole epochs, light grid, no box."""
    axes.set_xlabel("Epoch (the first is 0)", color=INK)
    axes.set_ylabel(label, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.tick_params(colors=INK, length=0)
    axes.yaxis.get_offset_text().set_color(INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def inline_svg(markup: str) -> str:
    """A matplotlib SVG file as an element of an HTML page: no addresses, the page's font and colours."""
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    markup = re.sub(r"<svg [^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', markup)
    markup = markup.replace("xlink:href", "href")
    markup = re.sub(r"<g id=\"[^\"]*\"", "<g", markup)
    markup = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", markup)
    for colour, variable in CSS_COLOURS.items():
        markup = markup.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", markup)


def to_displayable(picture: Image.Image) -> Image.Image:
    """The picture in a mode that browsers show, at most `THUMBNAIL_SIDE` pixels a side."""
    if picture.mode[0] in "IF":  # 16-bit, 32-bit and float greyscale: convert() would clip instead of scale
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        span = float(np.ptp(values)) or 1.0
        picture = Image.fromarray(((values - values.min()) / span * 255).astype(np.uint8))
    transparent = "A" in picture.getbands() or "transparency" in picture.info
    picture = picture.convert("RGBA" if transparent else "RGB")
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return picture


def draw_thumbnail(picture: Image.Image) -> tuple[str, bool]:
    """A data URL of the picture, and whether it is so small that it should be enlarged without smoothing."""
    picture = to_displayable(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    kind = "png"
    if buffer.tell() > LOSSLESS_BYTES and picture.mode == "RGB":
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, format="JPEG", quality=85, optimize=True)
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{code}", max(picture.size) <= CRISP_SIDE
