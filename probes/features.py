"""`python -m probes.features extract|ls|verify|gc`: fill the feature store and look after it. Torch only to extract."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probes.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR
from probes.launch import first_process_prints
from probes.recipe import load_recipe, recipe_sections
from probes.sections import DataSection, FeaturesSection, ModelSection, RunSection, TrainerSection
from probes.zeroshot_sections import ComputeSection

EXIT_DAMAGED = 1


@dataclass
class TrainerExtraction:
    """The sections that extraction reads, of a recipe with a trainer."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    features: FeaturesSection = field(default_factory=FeaturesSection)
    data: DataSection = field(default_factory=DataSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)


@dataclass
class ComputeExtraction:
    """The sections that extraction reads, of a recipe without a trainer."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    features: FeaturesSection = field(default_factory=FeaturesSection)
    data: DataSection = field(default_factory=DataSection)
    compute: ComputeSection = field(default_factory=ComputeSection)


def extract(arguments: argparse.Namespace) -> int:
    """Store all features that a recipe uses; several processes, of torchrun or not, share the work."""
    has_compute = "compute" in recipe_sections(arguments.recipe, arguments.overrides)
    schema: type[Any] = ComputeExtraction if has_compute else TrainerExtraction
    recipe = load_recipe(arguments.recipe, arguments.overrides, schema, other_sections=True)
    with first_process_prints():
        from probes.splits import open_evaluation_split, prepare_splits

        data = recipe.data
        splits = prepare_splits(data, multi_label=True) if data.train else open_evaluation_split(data)
        from probes.precision import settle_precision

        recipe, said = settle_precision(recipe)
        print(f"precision: {said}")
        from probes.extraction import load_tables

        for name, table in load_tables(recipe, splits, views=recipe.features.views).items():
            skipped = f", {len(table.skipped)} unreadable left out" if table.skipped else ""
            copies = f" in {table.num_views} views" if table.num_views > 1 else ""
            print(f"{name}: {len(table):,} x {table.encoder.feature_dim}{copies}{skipped}")
    return 0


def list_store(arguments: argparse.Namespace) -> int:
    """Print a table of the entries."""
    from probes.store_care import COLUMNS, describe_entry, find_entries

    entries, problems = find_entries(arguments.cache)
    rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *map(describe_entry, entries)]
    widths = {name: max(len(row[name]) for row in rows) for name in COLUMNS}
    for row in rows:
        print("  ".join(row[name].ljust(widths[name]) for name in COLUMNS).rstrip())
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_DAMAGED if problems else 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare every shard with its checksum; 1 when any is damaged."""
    from probes.store_care import find_damaged, find_entries

    entries, problems = find_entries(arguments.cache)
    count, damaged = find_damaged(entries)
    for problem in [*problems, *map(str, damaged)]:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{count} shard(s) of {len(entries)} entries: {len(damaged)} damaged")
    return EXIT_DAMAGED if damaged or problems else 0


def collect_garbage(arguments: argparse.Namespace) -> int:
    """Print what can go, and delete it with --apply."""
    from probes.store_care import find_removals, remove

    found = find_removals(arguments.cache, damaged=arguments.damaged, older_than_days=arguments.older_than)
    for removal in found:
        print(f"{'deleted' if arguments.apply else 'would delete'} {removal.path} ({removal.reason})")
        if arguments.apply:
            remove(removal)
    total = sum(removal.nbytes for removal in found) / 1e6
    print(f"{len(found)} item(s), {total:,.1f} MB" + ("" if arguments.apply else "; nothing was deleted (use --apply)"))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m probes.features", description="Extract features into the store, and look after the store."
    )
    commands = parser.add_subparsers(required=True, metavar="extract|ls|verify|gc")
    command = commands.add_parser("extract", help="store the features of a recipe (also under torchrun)")
    command.add_argument("recipe", help="recipe file with the sections model, features and data")
    command.add_argument("overrides", nargs="*", metavar="key=value", help='such as features.kinds="[cls, gap]"')
    command.set_defaults(run=extract)
    for name, run, text in (
        ("ls", list_store, "list the entries"),
        ("verify", verify, "compare all shards with their checksums; exit code 1 when one is damaged"),
        ("gc", collect_garbage, "list what can go: files that killed processes left behind, and more by option"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("cache", nargs="?", type=Path, default=Path(FeaturesSection().cache), help="the store")
        command.set_defaults(run=run)
    command.add_argument("--damaged", action="store_true", help="read everything, and list damaged shards")
    command.add_argument("--older-than", type=float, metavar="DAYS", help="list entries not written to for so long")
    command.add_argument("--apply", action="store_true", help="delete what is listed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 (damage found), 2 (mistake of the user's) or 130."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        if os.environ.get("EVA_CLIP_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, and the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
