"""The tables of a suite as Markdown: measured beside published, by model. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from eva_clip.specs import get_model_spec
from probes.results import Expectation
from probes.suite_entries import Entry, Outcome

VARIANTS = {
    "imagenet1k": "IN-1K",
    "imagenetv2": "IN-V2",
    "imagenet_a": "IN-Adv.",
    "imagenet_r": "IN-Ren.",
    "imagenet_sketch": "IN-Ske.",
    "objectnet": "ObjectNet",
}
"""Recipes of the table of ImageNet variants, with its headings."""
VIDEO = {
    "ucf101": ("UCF-101", "top1"),
    "kinetics400": ("Kinetics-400", "mean_top1_top5"),
    "kinetics600": ("Kinetics-600", "mean_top1_top5"),
    "kinetics700": ("Kinetics-700", "mean_top1_top5"),
}
"""Recipes of the table of videos, with its headings and the figure that is conventional for each."""
CLASSIFICATION = {"top1": "top-1", "top5": "top-5", "mean_recall": "mean per-class recall"}
RETRIEVAL = {
    **{f"text_to_image_r{k}": f"text to image R@{k}" for k in (1, 5, 10)},
    **{f"image_to_text_r{k}": f"image to text R@{k}" for k in (1, 5, 10)},
}
LEGEND = (
    "Percent. `78.49 (78.53)`: measured (published). `absent`: the data are not there; `failed`: see below; `-`: no "
    "such figure. Rows with published figures alone are models that this suite did not run."
)


def write_tables(outcomes: Sequence[Outcome]) -> str:
    """All tables that a suite's outcomes fill, and what failed or differs, as Markdown."""
    parts = ["# Zero-shot evaluation", LEGEND]
    parts += [part for part in (_variants(outcomes), _videos(outcomes), _retrieval(outcomes)) if part]
    models = list(dict.fromkeys(outcome.model for outcome in outcomes))
    for model in models:
        mine = [outcome for outcome in outcomes if outcome.model == model]
        parts += _details(model, mine)
    parts += [_summary([outcome for outcome in outcomes if outcome.model == model]) for model in models]
    failed = [f"- {item.model}, {item.entry.name}: {item.message}" for item in outcomes if item.state == "failed"]
    parts += ["## Failed\n" + "\n".join(failed)] if failed else []
    return "\n\n".join(parts) + "\n"


def format_cell(outcome: Outcome, metric: str) -> str:
    """Measured or what stands in its place, and the published figure in brackets."""
    published = outcome.published.get(metric)
    value = outcome.measured.get(metric)
    shown = outcome.state if outcome.state != "measured" else "-" if value is None else f"{value:.2f}"
    return shown if published is None else f"{shown} ({published:.2f})"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """A Markdown table with padded columns: the first `labels` to the left, figures to the right."""
    widths = [max(3, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))]
    lines = [
        "| " + " | ".join(_pad(cell, width, column < labels) for column, (cell, width) in enumerate(pairs)) + " |"
        for pairs in (list(zip(row, widths, strict=True)) for row in [header, *rows])
    ]
    rule = ["-" * (width + 2) if column < labels else "-" * (width + 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _variants(outcomes: Sequence[Outcome]) -> str:
    columns = [(name, title, "top1") for name, title in VARIANTS.items()]
    return _by_model("## ImageNet variants, top-1", outcomes, columns)


def _videos(outcomes: Sequence[Outcome]) -> str:
    others = [item.entry.name for item in outcomes if item.entry.kind == "video" and item.entry.name not in VIDEO]
    columns = [(name, title, metric) for name, (title, metric) in VIDEO.items()]
    columns += [(name, name, "top1") for name in dict.fromkeys(others)]
    title = "## Video, one centre frame: top-1, on Kinetics the mean of top-1 and top-5"
    return _by_model(title, outcomes, columns)


def _by_model(title: str, outcomes: Sequence[Outcome], columns: Sequence[tuple[str, str, str]]) -> str:
    """One row a model and one column a set, for the sets that the suite has."""
    entries = {item.entry.name: item.entry for item in outcomes}
    columns = [column for column in columns if column[0] in entries]
    if not columns:
        return ""
    rows = []
    for model in dict.fromkeys(item.model for item in outcomes):
        mine = {item.entry.name: item for item in outcomes if item.model == model}
        rows.append([model, *(format_cell(mine[name], metric) for name, _, metric in columns)])
    for model in _published_alone([entries[name] for name, _, _ in columns], outcomes):
        cells = [_published_cell(entries[name], model, metric) for name, _, metric in columns]
        rows.append([model, *cells])
    return f"{title}\n\n" + format_table(["model", *(heading for _, heading, _ in columns)], rows)


def _retrieval(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for entry in dict.fromkeys(item.entry.file for item in outcomes if item.entry.kind == "retrieval"):
        mine = [item for item in outcomes if item.entry.file == entry]
        rows += [[item.entry.name, item.model, *(format_cell(item, metric) for metric in RETRIEVAL)] for item in mine]
        for model in _published_alone([mine[0].entry], outcomes):
            cells = [_published_cell(mine[0].entry, model, metric) for metric in RETRIEVAL]
            rows.append([mine[0].entry.name, model, *cells])
    if not rows:
        return ""
    return "## Retrieval\n\n" + format_table(["set", "model", *RETRIEVAL.values()], rows, labels=2)


def _details(model: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Every set of images and of videos with all figures, and the multi-label ones."""
    metrics = {
        "image": CLASSIFICATION,
        "video": {"top1": "top-1", "top5": "top-5", "mean_top1_top5": "mean of both"},
        "multi_label": {"mean_average_precision": "mean average precision"},
    }
    titles = {"image": "Image classification", "video": "Video", "multi_label": "Several classes an image"}
    parts = []
    for kind, columns in metrics.items():
        mine = [outcome for outcome in outcomes if outcome.entry.kind == kind]
        rows = [[item.entry.name, *(format_cell(item, metric) for metric in columns)] for item in mine]
        if rows:
            count = f"{len(rows)} set" + ("s" if len(rows) > 1 else "")
            parts.append(f"## {titles[kind]}, {count}: {model}\n\n" + format_table(["set", *columns.values()], rows))
    return parts


def _summary(outcomes: Sequence[Outcome]) -> str:
    """Counts of one model, and the figures that are further from the published ones than their tolerance."""
    states = [outcome.state for outcome in outcomes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("measured", "absent", "failed"))
    line = f"{outcomes[0].model}: {counts}."
    compared = [(item.entry.name, figure) for item in outcomes for figure in _compare(item)]
    if not compared:
        return line
    apart = [
        f"- {name} {figure.name}: {figure.measured:.2f} ({figure.expected:.2f}), {figure.verdict}"
        for name, figure in compared
        if figure.verdict != "reached"
    ]
    line += f" {len(compared) - len(apart)} of {len(compared)} figures are within their recipe's tolerance"
    return line + ("; the others:\n" + "\n".join(apart) if apart else ".")


def _compare(outcome: Outcome) -> list[Expectation]:
    if outcome.state != "measured":
        return []
    figures = outcome.entry.load().expected.compare(outcome.model, outcome.measured)
    return [figure for figure in figures if figure.measured is not None]


def _published_alone(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> list[str]:
    """Models that have published figures for these sets and that the suite did not run."""
    run = {get_model_spec(item.model).name for item in outcomes}
    return list(dict.fromkeys(m for entry in entries for m in entry.figures if get_model_spec(m).name not in run))


def _published_cell(entry: Entry, model: str, metric: str) -> str:
    value = entry.figures.get(model, {}).get(metric)
    return "-" if value is None else f"({value:.2f})"
