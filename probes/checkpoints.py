"""Checkpoints that survive: whole or absent, hashed, the newest few kept, and read back past a damaged one."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.callbacks import Checkpoint

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

BLOCK = 1 << 22


class Terminated(SystemExit):
    """SIGTERM, or SLURM's warning, arrived and the state was saved; exit code 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Pace:
    """Decides when to save, so that saving takes at most a twentieth of the time: epochs may last milliseconds."""

    SHARE = 20

    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        """Whether a save may be made now; the first always may."""
        return time.monotonic() >= self._next

    def saved(self, began: float) -> None:
        """Note that a save which began at this `time.monotonic()` is done."""
        now = time.monotonic()
        self._next = now + self.SHARE * (now - began)


class KeepCheckpoints(Checkpoint):
    """Saves at the ends of epochs and, with `every_steps`, inside them; stops at the next step after a SIGTERM.

    In a SLURM job SIGUSR1 (`--signal=SIGUSR1@120`) stops too and then puts the job back into the queue, where the
    same command with `run.on_existing=resume` goes on. Lightning's own handler would write a second kind of checkpoint.

    Args:
        folder: where `step-00001234.ckpt` and its `.sha256` go.
        every_steps: optimizer steps between checkpoints; the end of every epoch and a stop are saved besides. None is
            for a module whose state is whole between epochs only: their ends are saved at a `Pace`, the last always.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, every_steps: int | None = None, keep: int = 2) -> None:
        self.folder, self.every_steps, self.keep = folder, every_steps, keep
        self.stopping = self.requeue = False
        self._pace = Pace()
        self._saved = -1
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take over the signals: state is only whole between optimizer steps."""
        self._saved = trainer.global_step
        taken = [signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
        self._previous = {number: signal.signal(number, self._on_signal) for number in taken}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Give SIGTERM back."""
        self._release()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Give SIGTERM back."""
        self._release()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a step has just been made and one is due; the epoch's last is saved at its end."""
        step = trainer.global_step
        stepped, last = step > self._saved, batch_idx + 1 >= int(trainer.num_training_batches)
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if accumulating or last or not stepped:
            return
        stopping = self._any(trainer, self.stopping)
        if self.every_steps is not None and (stopping or step % self.every_steps == 0):
            self.save(trainer)
        if stopping:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the finished epoch."""
        stopping = self._any(trainer, self.stopping)
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if self.every_steps is not None or stopping or last or self._any(trainer, self._pace.due()):
            self.save(trainer)
        if stopping:
            self._stop(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write one checkpoint and drop those that are too old.

        Raises:
            OSError: it could not be written; the message names the last good one.
        """
        began, first = time.monotonic(), trainer.is_global_zero
        write_checkpoint(self.folder, trainer.global_step, self.keep, trainer.save_checkpoint, publishes=first)
        self._saved = trainer.global_step
        self._pace.saved(began)

    @staticmethod
    def _any(trainer: Trainer, decision: bool) -> bool:
        """Whether any process decided so."""
        return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        self.requeue = self.requeue or number != signal.SIGTERM

    def _stop(self, trainer: Trainer) -> None:
        if self._any(trainer, self.requeue) and trainer.is_global_zero:
            requeue_job()
        raise Terminated

    def _release(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def requeue_job() -> None:
    """Put this SLURM job, or this element of a job array, back into the queue; say so where SLURM refuses."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        outcome = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = outcome.stderr.strip() if outcome.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        print(f"note: job {job} could not be requeued ({problem}); the state is saved: submit it again", flush=True)
    else:
        print(f"note: job {job} is back in the queue", flush=True)


def write_checkpoint(
    folder: Path, step: int, keep: int, write: Callable[[Path], object], *, publishes: bool = True
) -> None:
    """Write one checkpoint and drop those that are too old.

    It is written beside its place, flushed to the disk and renamed; only then are older ones removed. When the disk is
    full the last good one stays.

    Args:
        folder: of the run's checkpoints; is made where there is none.
        step: optimizer steps made.
        keep: how many of the newest stay.
        write: writes the state to a path; several processes may call it together.
        publishes: whether this process is the one that names and removes files.

    Raises:
        OSError: it could not be written; the message names the last good one.
    """
    name = f"step-{step:08d}.ckpt"
    temporary, target = folder / f".{name}.partial", folder / name
    if publishes:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        if publishes and temporary.is_file():
            publish(temporary, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        good = list_checkpoints(folder)
        stays = f"the last good one is {good[-1]}" if good else "there is none yet"
        message = f"checkpoint {target} could not be written ({error}); {stays}; make room and resume"
        raise OSError(message) from error
    if publishes:
        for old in list_checkpoints(folder)[:-keep]:
            old.unlink()
            old.with_suffix(".sha256").unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Hash a file, flush it to the disk and give it its name."""
    digest = sha256_of(temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    target.with_suffix(".sha256").write_text(digest + "\n", encoding="utf-8")
    temporary.replace(target)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def newest_readable(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose bytes are those that were written, and a sentence on each that was passed over.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    found = list_checkpoints(folder)
    passed: list[str] = []
    for path in reversed(found):
        problem = _problem(path)
        if problem is None:
            return path, passed
        passed.append(f"checkpoint {path.name} is damaged ({problem}); the one before it is taken")
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read: {'; '.join(passed)}; start over in a new run.dir")
    return None, passed


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, or None."""
    recorded = path.with_suffix(".sha256")
    if recorded.is_file():
        expected = recorded.read_text(encoding="utf-8").strip()
        return None if sha256_of(path) == expected else "its sha256 is not the recorded one"
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds on damaged files
        return f"{type(error).__name__}: {error}"
    return None
