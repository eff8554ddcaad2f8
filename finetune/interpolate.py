"""`python -m finetune.interpolate RUN`: between the weights a fine-tune started from and those it ended with (WiSE-FT).

Every mixture (1 - alpha) * start + alpha * end is scored on the split that selects, which is of the training images'
kind, and on test, which may be shifted. The selecting split chooses alpha. With several runs of one recipe their ends
are averaged instead: all of them (uniform soup), and one after another as long as the selecting split gains (greedy).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR
from probes.sections import RecipeError

if TYPE_CHECKING:
    import torch

    from finetune.finished_run import FinishedRun

State = dict[str, "torch.Tensor"]
Row = dict[str, Any]


def mix(start: State, end: State, alpha: float) -> State:
    """(1 - alpha) * start + alpha * end of every floating-point tensor; others are the end's."""
    mixed = {}
    for name, tensor in end.items():
        if not tensor.is_floating_point() or alpha == 1:
            mixed[name] = tensor
        else:
            mixed[name] = start[name] if alpha == 0 else start[name].lerp(tensor, alpha)
    return mixed


def average(states: Sequence[State]) -> State:
    """The mean of several states; tensors that are not floating point are the first's."""
    return {
        name: sum(state[name] for state in states) / len(states) if tensor.is_floating_point() else tensor  # type: ignore[misc]
        for name, tensor in states[0].items()
    }


def sweep(run: FinishedRun, alphas: Sequence[float], weights: str | None) -> tuple[list[Row], dict[str, State]]:
    """Rows of all mixtures, and their weights by row name."""
    start, end = run.start_state(), run.end_state(weights)
    states = {f"alpha = {alpha:g}": mix(start, end, alpha) for alpha in alphas}
    rows = [{"name": name, "alpha": alpha} for name, alpha in zip(states, alphas, strict=True)]
    return score_all(run, rows, states), states


def soup(runs: Sequence[FinishedRun], weights: str | None) -> tuple[list[Row], dict[str, State]]:
    """Rows of every run's end, of the uniform soup and, with a split that selects, of the greedy one."""
    first = runs[0]
    ends = {str(run.path): run.end_state(weights) for run in runs}
    rows = score_all(first, [{"name": name} for name in ends], ends)
    states = {**ends, "uniform soup": average(list(ends.values()))}
    rows += score_all(first, [{"name": "uniform soup"}], states)
    selection = first.splits.selection
    if selection is not None:
        ranked = sorted(ends, key=lambda name: -next(row[selection.name] for row in rows if row["name"] == name))
        kept, best = [ranked[0]], max(row[selection.name] for row in rows[: len(ends)])
        for name in ranked[1:]:
            tried = average([ends[other] for other in [*kept, name]])
            score = score_all(first, [{"name": "tried"}], {"tried": tried}, only_selection=True)[0][selection.name]
            if score >= best:
                kept, best = [*kept, name], score
        states["greedy soup"] = average([ends[name] for name in kept])
        rows += score_all(first, [{"name": "greedy soup", "of": len(kept)}], states)
    return rows, states


def score_all(
    run: FinishedRun, rows: list[Row], states: dict[str, State], *, only_selection: bool = False
) -> list[Row]:
    """Add top-1 on the selecting split and on test, in percent, to every row."""
    model = run.build()
    splits = [run.splits.selection, None if only_selection else run.splits.test]
    for row in rows:
        model.load_state_dict(states[row["name"]])
        for split in splits:
            if split is not None:
                row[split.name] = run.score(model, split)["acc1"]
        if not only_selection:
            print(
                ", ".join(f"{k} {v:.2f}" if isinstance(v, float) and k != "alpha" else str(v) for k, v in row.items())
            )
    return rows


def choose(run: FinishedRun, rows: list[Row]) -> Row | None:
    """The row that the selecting split prefers (of equals the first), or None without such a split."""
    selection = run.splits.selection
    return None if selection is None else max(rows, key=lambda row: row[selection.name])


def write(output: Path, run: FinishedRun, rows: list[Row], states: dict[str, State], chosen: Row | None) -> None:
    """`table.csv`, `curve.svg`, and what was chosen as `result.json` and a folder that timm opens."""
    from eva_clip.export import save_for_timm
    from finetune.finish import fold_batch_norm

    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (output / "table.csv").write_text(stream.getvalue(), encoding="utf-8")
    if run.splits.selection is not None and run.splits.test is not None:
        draw(output / "curve.svg", rows, run.splits.selection.name, run.splits.test.name)
    content = {"run": str(run.path), "rows": rows, "chosen": chosen, "classes": run.splits.classes}
    if chosen is not None:
        model = run.build()
        model.load_state_dict(states[chosen["name"]])
        save_for_timm(fold_batch_norm(model), output)
    (output / "result.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw(path: Path, rows: list[Row], across: str, up: str) -> None:
    """Accuracy on one split against that on the other, a point a row; mixtures are joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    xs, ys = [row[across] for row in rows], [row[up] for row in rows]
    axes.plot(xs, ys, "o-" if "alpha" in rows[0] else "o")
    for row, x, y in zip(rows, xs, ys, strict=True):
        label = f"{row['alpha']:g}" if "alpha" in row else row["name"]
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xlabel(f"top-1 on {across} (%)")
    axes.set_ylabel(f"top-1 on {up} (%)")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})


def open_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """The runs, all of one shape and one list of classes, judged by images that none of them was trained on.

    Raises:
        RecipeError: they do not belong together, or hold adapters.
    """
    from finetune.finished_run import FinishedRun
    from finetune.unseen import check_members

    runs = [FinishedRun(path) for path in paths]
    first = runs[0]
    for run in runs:
        if run.recipe.tune.what == "lora":
            raise RecipeError(f"{run.path} trained low-rank adapters, whose mean is not that of the weights they add")
        for what, one, other in (
            ("model", first.recipe.model.name, run.recipe.model.name),
            ("image size", first.recipe.model.image_size, run.recipe.model.image_size),
            ("head", (first.recipe.head.pool, first.recipe.head.kind), (run.recipe.head.pool, run.recipe.head.kind)),
            ("classes", first.splits.classes, run.splits.classes),
        ):
            if one != other:
                raise RecipeError(f"{run.path} has another {what} than {first.path} ({other}, not {one})")
    check_members(runs)
    return runs


def execute(arguments: argparse.Namespace) -> None:
    """Score, choose, write."""
    output = arguments.output or arguments.runs[0] / ("interpolate" if len(arguments.runs) == 1 else "soup")
    if output.exists() and any(output.iterdir()):
        raise RecipeError(f"{output} holds files already; choose another --output")
    runs = open_runs(arguments.runs)
    output.mkdir(parents=True, exist_ok=True)
    if len(runs) == 1:
        rows, states = sweep(runs[0], arguments.alphas, arguments.weights)
    else:
        rows, states = soup(runs, arguments.weights)
    chosen = choose(runs[0], rows)
    write(output, runs[0], rows, states, chosen)
    if chosen is None:
        print("nothing is chosen: the run held nothing out (data.holdout), and test does not choose")
    else:
        selection, test = runs[0].splits.selection, runs[0].splits.test
        assert selection is not None
        reported = f", top-1 on test {chosen[test.name]:.2f}" if test is not None else ""
        print(f"chosen by {selection.name}: {chosen['name']}{reported}; written to {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.interpolate",
        description="Mix the weights before and after a fine-tune (one RUN), or average the ends of several (soups).",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of python -m finetune")
    parser.add_argument(
        "--alphas", type=float, nargs="+", default=[number / 10 for number in range(11)], help="shares of the end"
    )
    parser.add_argument("--weights", choices=("raw", "ema"), help="the end: last raw weights, or their average")
    parser.add_argument("--output", type=Path, help="folder to write to; RUN/interpolate or RUN/soup")
    try:
        execute(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        if os.environ.get("EVA_CLIP_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
