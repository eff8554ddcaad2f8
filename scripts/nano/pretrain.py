"""Pre-train EVA01-CLIP-nano on the emojis of several vendors, contrastively.

    python -m scripts.nano.pretrain WORK RUN --shards recipes/quickstart/pictures --steps 12000

Loss = image-text InfoNCE + image-image supervised contrast (pictures of one emoji by several vendors) +
caption-word classification + layout (an 8 x 8 thumbnail, told by the class token). Half of the patches are
dropped, except at the end. Resumes from ``RUN/checkpoint.pt``; writes one
JSON object a line to ``RUN/log.jsonl`` and the averaged (EMA) weights to
``RUN/EVA01-CLIP-nano.safetensors``. With ``--hours`` the schedule ends on time: the learning rate follows
the larger of step and time progress.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import save_file

from scripts.nano.corpus import Corpus
from scripts.nano.probe import evaluate, load_shards
from scripts.nano.trainer import MODEL, Settings, Trainer


def export(trainer: Trainer, path: Path) -> None:
    """The averaged weights as fp16 safetensors, with what a reader of the file alone should know."""
    settings = trainer.settings
    summary = {
        "steps_done": trainer.step,
        "images_seen": trainer.step * settings.emojis * settings.views,
        "training_hours": round(trainer.seconds / 3600, 3),
        "pictures": trainer.corpus.vendor_counts,
        "settings": asdict(settings),
    }
    metadata = {
        "format": "pt",
        "model": MODEL,
        "license": "MIT",
        "attribution": "Trained on EmojiOne 2 and Streamline (CC BY 4.0), Noto and FxEmojis (Apache-2.0) "
        "and Fluent Emoji (MIT); see CARD.md",
        "training": json.dumps(summary),
    }
    state = {k: v.detach().half().contiguous() for k, v in trainer.average.state_dict().items()}
    save_file(state, path, metadata)


def run(trainer: Trainer, out: Path, shards: Path) -> None:
    """Train to the end of the schedule; log, evaluate, checkpoint and export every `eval_every` steps."""
    settings = trainer.settings
    pictures = load_shards(shards)
    sums: dict[str, float] = {}
    last = trainer.step
    while trainer.progress() < 1:
        for key, value in trainer.train_step().items():
            sums[key] = sums.get(key, 0.0) + value
        evaluating = trainer.step % settings.eval_every == 0 or trainer.progress() >= 1
        if trainer.step % 100 == 0 or evaluating:
            row = {"step": trainer.step, "seconds": round(trainer.seconds, 1), "lr": trainer.learning_rate()}
            row |= {key: round(value / (trainer.step - last), 4) for key, value in sums.items()}
            sums, last = {}, trainer.step
            if evaluating:
                trainer.save(out / "checkpoint.pt")
                export(trainer, out / f"{MODEL}.safetensors")
                row |= {key: round(value, 2) for key, value in evaluate(trainer.average, pictures).items()}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder given to fetch.py and pictures.py")
    parser.add_argument("run", type=Path, help="folder of the checkpoint, log and weights")
    parser.add_argument("--shards", type=Path, required=True, help="folder of the quickstart shards, for evaluation")
    for field in fields(Settings):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = vars(parser.parse_args())
    settings = Settings(**{field.name: arguments[field.name] for field in fields(Settings)})
    torch.set_num_threads(settings.threads)
    out: Path = arguments["run"]
    out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(arguments["work"], settings.vendors.split(",") if settings.vendors else None)
    trainer = Trainer(settings, corpus)
    if (out / "checkpoint.pt").exists():
        trainer.load(out / "checkpoint.pt")
    run(trainer, out, arguments["shards"])


if __name__ == "__main__":
    main()
