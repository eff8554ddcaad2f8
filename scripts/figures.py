"""Print every table of measured figures that README.md and docs/ hold, each from the commands that stand beside it.

    python -m scripts.figures [--only NAME ...] [--write]

Without --only all of them: about 20 minutes on 2 cores, offline. With --write each table takes the place of the one
between `<!-- figures: NAME -->` and `<!-- end of figures -->` in its document. The last lines list the recipes whose
`expected:` was not reached: bring those up to date by hand.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

REPO = Path(__file__).resolve().parents[1]
QUICKSTART = "recipes/quickstart"
METHODS = ("linear", "logistic", "ridge", "knn", "ncm")
SHOTS = (1, 2, 4, 8, 16)
WITHIN = [f"data.{split}={QUICKSTART}/pictures/twemoji_{split}.tar.gz" for split in ("train", "test")]
CURVE = REPO / "benchmarks/results/quickstart_wise_ft.svg"
END = "<!-- end of figures -->"

Rows = Sequence[Sequence[object]]


@dataclass
class Bench:
    """Runs commands in a folder of its own, each once; extraction is shared, as in `logs/features`."""

    folder: Path
    write: bool = False
    done: dict[tuple[str, ...], Path] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def run(self, module: str, recipe: str, *overrides: str) -> Path:
        """The folder of a finished run.

        Raises:
            subprocess.CalledProcessError: the command failed; its output is on the screen.
        """
        command = (module, f"{QUICKSTART}/{recipe}.yaml", *overrides)
        if command not in self.done:
            run = self.folder / str(len(self.done))
            cache = ["features.cache=" + str(self.folder / "features")] if module in STORES else []
            self.call(module, *command[1:], *cache, f"run.dir={run}")
            self.done[command] = run
            unreached = [row for row in result_of(run).get("expectations", []) if row["verdict"] != "reached"]
            for row in [] if overrides else unreached:  # a changed recipe need not reach the figure
                self.missed.append(f"{recipe}.yaml: {row['name']} is {row['measured']}, not {row['expected']}")
        return self.done[command]

    def call(self, module: str, *arguments: str) -> str:
        """What `python -m module` prints on stdout."""
        print(f"running: python -m {module} {' '.join(arguments)}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", module, *arguments]
        outcome = subprocess.run(command, cwd=REPO, text=True, stdout=subprocess.PIPE, check=False)
        if outcome.returncode:
            print(outcome.stdout, file=sys.stderr)
            outcome.check_returncode()
        return outcome.stdout


STORES = {f"probes.{method}" for method in METHODS}
"""Commands that read the feature store."""


def result_of(run: Path) -> dict[str, Any]:
    """`result.json` of a finished run."""
    content: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return content


def top1(run: Path, score: str | None = None) -> str:
    """Top-1 in percent of the score of that name, or of the reported one."""
    scores = result_of(run)["scores"]
    return f"{next(row for row in scores if score in (None, row['name']))['top1']:.2f}"


def interval(run: Path) -> str:
    """The 95 % bootstrap interval over images."""
    return "–".join(f"{end:.1f}" for end in result_of(run)["interval"])


def scored(run: Path) -> tuple[str, str]:
    """Reported top-1 and its interval."""
    return top1(run), interval(run)


def table(header: Sequence[str], rows: Rows) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        .replace("| --- ", "|---")
        .replace("--- |", "---|")
    )


def quickstart(bench: Bench) -> str:
    """The probe across vendors and within one, beside its baselines."""
    runs = [bench.run("probes.linear", name) for name in ("linear", "linear_within")]
    baselines = [{row["name"]: f"{row['top1']:.2f}" for row in result_of(run)["baselines"]} for run in runs]
    names = {
        "raw pixels": "logistic regression on raw pixels",
        "same probe, random encoder": "same probe, randomly initialised encoder",
        "zero-shot": "zero-shot, class names as prompts",
    }
    rows = [["**linear probe of EVA01-CLIP-nano**", *(f"**{top1(run)}**" for run in runs)]]
    rows += [["its 95 % interval", *map(interval, runs)]]
    rows += [[label, *(found[name] for found in baselines)] for name, label in names.items()]
    rows += [["always the most frequent class", *map(majority, runs)]]
    sizes = [result_of(run)["split_sizes"] for run in runs]
    across, within = (f"{size['train']:,} to train, {size['test']:,} to test" for size in sizes)
    return table(["", f"across vendors ({across})", f"within one vendor ({within})"], rows)


def majority(run: Path) -> str:
    """Top-1 of always answering the most frequent class of the scored images."""
    with (run / "predictions.csv").open(encoding="utf-8") as stream:
        targets = Counter(row["target"] for row in csv.DictReader(stream))
    return f"{100 * max(targets.values()) / targets.total():.2f}"


def zero_shot(bench: Bench) -> str:
    """Pictures and videos by the names of their classes."""
    rows = []
    for recipe, what in (("zeroshot", "pictures"), ("video", "videos, by their centre frame")):
        result = result_of(bench.run("probes.zeroshot", recipe))
        figures = [f"{result['measured'][name]:.2f}" for name in ("top1", "top5", "mean_recall")]
        rows.append([f"`{recipe}.yaml`: {result['split_sizes']['test']:,} {what}", *figures])
    return table(["", "top-1", "top-5", "mean per-class recall"], rows)


def retrieval(bench: Bench) -> str:
    """Pictures and their names, both ways."""
    measured = result_of(bench.run("probes.retrieval", "retrieval"))["measured"]
    ways = ("text_to_image", "image_to_text")
    rows = [[way.replace("_", " "), *(f"{measured[f'{way}_r{k}']:.2f}" for k in (1, 5, 10))] for way in ways]
    return table(["", "R@1", "R@5", "R@10"], rows)


def names(bench: Bench) -> str:
    """Retrieval of names without their colon, as the model's card counts it."""
    printed = bench.call("scripts.nano.evaluate", f"{QUICKSTART}/pictures")
    line = next(line for line in printed.splitlines() if line.startswith("EVA01-CLIP-nano"))
    return table(["image to text, names without their colon", "R@1", "R@5"], [["EVA01-CLIP-nano", *line.split()[-2:]]])


def compare(bench: Bench, *data: str) -> str:
    """The methods on the same features, over three seeds."""
    runs = []
    for method in METHODS:
        recipe = "linear_within" if data and method == "linear" else method
        changes = data if recipe == method else ()
        runs.append(str(bench.run(f"probes.{method}", recipe, "run.seeds=[0,1,2]", *changes)))
    return bench.call("probes.compare", *runs).strip()


def few_shot(bench: Bench) -> str:
    """Ridge on few pictures a class: mean over five draws and half the 95 % interval of the mean."""
    shots = f"few_shot.shots=[{','.join(map(str, SHOTS))}]"
    repeats = result_of(bench.run("probes.ridge", "ridge", shots, "run.seeds=[0,1,2,3,4]"))["repeats"]
    cells = []
    for count in SHOTS:
        values = [row["top1"] for row in repeats if row["shots"] == count]
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        cells.append(f"{np.mean(values):.2f} ± {half:.2f}")
    return table(["pictures of each class", *map(str, SHOTS)], [["ridge, top-1", *cells]])


def bank(bench: Bench) -> str:
    """A grid of heads: what the hold-out chooses beside what test would have chosen."""
    run = bench.run("probes.linear", "bank")
    rows = []
    for score, what in (("selected", "chosen by the hold-out"), ("best", "chosen by test itself: an oracle")):
        row = next(row for row in result_of(run)["scores"] if row["name"] == score)
        rows.append([what, row["setting"], f"{row['top1']:.2f}"])
    return table(["head and epoch", "which", "top-1"], rows)


def finetune(bench: Bench) -> str:
    """Fine-tuning beside what it starts from."""
    shot = bench.run("probes.zeroshot", "zeroshot")
    probe = bench.run("probes.logistic", "logistic", "features.pool=cls")
    tuned, contrastive = bench.run("finetune", "finetune"), bench.run("finetune", "finetune_contrastive")
    rows = [
        ["zero-shot", "`python -m probes.zeroshot recipes/quickstart/zeroshot.yaml`", *scored(shot)],
        ["linear probe that it starts from",
         "`python -m probes.logistic recipes/quickstart/logistic.yaml features.pool=cls`", *scored(probe)],
        ["fine-tuned, raw weights", "`python -m finetune recipes/quickstart/finetune.yaml`",
         top1(tuned, "last_raw"), ""],
        ["**fine-tuned, averaged weights**", "the same run", f"**{top1(tuned, 'last_ema')}**", interval(tuned)],
        ["contrastive, averaged weights", "`python -m finetune recipes/quickstart/finetune_contrastive.yaml`",
         top1(contrastive, "last_ema"), interval(contrastive)],
    ]  # fmt: skip
    return table(["", "command", "top-1", "95 % interval"], rows)


def interpolate(bench: Bench) -> str:
    """Weights between the probe and the fine-tune; --write takes the picture too."""
    run = bench.run("finetune", "finetune", "data.holdout=0.15")
    bench.call("finetune.interpolate", str(run))
    if bench.write:
        shutil.copyfile(run / "interpolate/curve.svg", CURVE)
    mixtures = result_of(run / "interpolate")["rows"]
    rows = [
        ["hold-out of Noto", *(f"{row['holdout']:.2f}" for row in mixtures)],
        ["Twemoji", *(f"{row['test']:.2f}" for row in mixtures)],
    ]
    return table(["alpha (0 is the probe, 1 the fine-tune)", *(f"{row['alpha']:g}" for row in mixtures)], rows)


@dataclass(frozen=True)
class Block:
    """One table of a document."""

    document: str
    make: Callable[[Bench], str]


BLOCKS = {
    "quickstart": Block("README.md", quickstart),
    "zero-shot": Block("docs/zero-shot.md", zero_shot),
    "retrieval": Block("docs/zero-shot.md", retrieval),
    "names": Block("docs/zero-shot.md", names),
    "methods": Block("docs/methods.md", compare),
    "methods-within": Block("docs/methods.md", lambda bench: compare(bench, *WITHIN)),
    "few-shot": Block("docs/methods.md", few_shot),
    "bank": Block("docs/methods.md", bank),
    "fine-tuning": Block("docs/fine-tuning.md", finetune),
    "interpolate": Block("docs/fine-tuning.md", interpolate),
}


def provenance() -> str:
    """Processor and versions, as one sentence."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else None
    processor = model[1] if model else platform.processor() or platform.machine()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm", "scikit-learn"))
    python = platform.python_version()
    return f"*Printed on {os.cpu_count()} cores of {processor}; Python {python}, {versions}.*"


def insert(document: Path, name: str, content: str) -> None:
    """Put a table in the place of the one of that name.

    Raises:
        ValueError: the document has no place of that name, or several.
    """
    text = document.read_text(encoding="utf-8")
    place = re.compile(f"(<!-- figures: {re.escape(name)} -->\n).*?({re.escape(END)})", re.DOTALL)
    changed, count = place.subn(lambda found: f"{found[1]}{content}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"{document} has {count} places for the figures {name!r}; expected 1")
    document.write_text(changed, encoding="utf-8")


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=BLOCKS, default=list(BLOCKS), metavar="NAME", help=", ".join(BLOCKS)
    )
    parser.add_argument("--write", action="store_true", help="put the tables into the documents")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.write)
        for name in arguments.only:
            block = BLOCKS[name]
            content = f"{block.make(bench)}\n\n{provenance()}"
            print(f"<!-- figures: {name} -->\n{content}\n{END}\n", flush=True)
            if arguments.write:
                insert(REPO / block.document, name, content)
        for line in bench.missed:
            print(f"not what the recipe expects: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
