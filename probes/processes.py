"""Several processes on one evaluation, as torchrun starts them: who does what, and its rows put together.

Work is dealt in whole batches, so that each forward pass is one that a single process would run, and the rows come
back in the order of their positions: scores do not depend on the number of processes. Imports no torch at the top.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from probes.sections import RecipeError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the slowest before it gives up."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process."""


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int = 0
    size: int = 1


# Not torch.distributed's own state: a trainer's process group must not change what a function below does.
_world = World()
_group: Any = None
"""Of the exchange of rows, where it is not the default one."""


def world() -> World:
    """This process's place; the only one outside of `join_processes`."""
    return _world


def is_main() -> bool:
    """Whether this process writes the run folder and prints."""
    return _world.rank == 0


@contextlib.contextmanager
def join_processes() -> Iterator[World]:
    """Join the processes that torchrun started, each on its own GPU where there are any; alone without torchrun.

    Standard output of all but the main process is dropped. Rows are exchanged in main memory (gloo), where embeddings
    are kept, so that processes may also share a GPU.

    Raises:
        RecipeError: the environment is only partly torchrun's.
    """
    global _world
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield _world
        return
    absent = [name for name in VARIABLES if name not in os.environ]
    if absent:
        size = os.environ["WORLD_SIZE"]
        raise RecipeError(f"WORLD_SIZE is {size} but {', '.join(absent)} is not set; start with torchrun, or unset it")
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group("gloo", timeout=TIMEOUT)
    _world = World(distributed.get_rank(), distributed.get_world_size())
    try:
        with contextlib.ExitStack() as stack:
            if not is_main():
                silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield _world
        distributed.barrier()  # no process takes the connections down while another still reads
    finally:
        _world = World()
        distributed.destroy_process_group()


@contextlib.contextmanager
def join_trainer() -> Iterator[World]:
    """Join the processes that a trainer has trained on, also after its end; alone where it was one.

    Rows are exchanged in main memory, whatever the trainer exchanged gradients by.
    """
    global _world, _group
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        yield _world
        return
    _group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    _world = World(distributed.get_rank(), distributed.get_world_size())
    try:
        yield _world
        distributed.barrier(_group)
    finally:
        distributed.destroy_process_group(_group)
        _world, _group = World(), None


def on_main(function: Callable[[], T]) -> T:
    """The main process's result, in every process; its failure ends the others without a message of their own.

    Args:
        function: called in the main process only; its result is sent to the others as a pickle.
    """
    if world().size == 1:
        return function()
    from torch import distributed

    box: list[Any] = [None]
    if is_main():
        try:
            box = [(function(),)]
        finally:
            distributed.broadcast_object_list(box, group=_group)
    else:
        distributed.broadcast_object_list(box, group=_group)
    if box[0] is None:
        raise SystemExit(2)  # the main process says why
    result: T = box[0][0]
    return result


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of a list that all processes hold: every `size`-th item, from `rank` on."""
    return items[_world.rank :: _world.size]


def share_batches(count: int, size: int, of: tuple[int, int] | None = None) -> list[list[int]]:
    """This process's batches of `count` positions in order, as many as any other's: the last may be empty.

    Args:
        of: the process's rank and how many there are; None for those of `join_trainer`.
    """
    rank, processes = of or (_world.rank, _world.size)
    starts = range(0, count, size)
    batches = [list(range(start, min(start + size, count))) for start in starts[rank::processes]]
    return batches + [[]] * (-(-len(starts) // processes) - len(batches))


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all processes in ascending order of their positions; shares may be uneven or empty.

    Args:
        rows: [n, ...] on the CPU; same shape past the first, where n > 0, and same type in all processes.
        index: int64 [n], positions; over all processes each occurs once.

    Returns:
        Rows [N, ...] and positions int64 [N], in every process.
    """
    import torch

    assert len(rows) == len(index)
    rows, index = (rows, index) if _world.size == 1 else (_gather(rows), _gather(index))
    index, order = index.sort()
    assert bool((index[1:] != index[:-1]).all()), "a position came from two processes"
    if not torch.equal(order, torch.arange(len(order))):
        rows = rows[order]
    return rows, index


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenation over the processes of tensors that differ in their first dimension only; where it is 0, in any."""
    import torch
    from torch import distributed

    shapes: list[Any] = [None] * _world.size
    distributed.all_gather_object(shapes, tuple(tensor.shape), group=_group)
    largest = max(shapes, key=lambda shape: shape[0])
    padded = tensor.new_zeros(largest)
    padded[: len(tensor)] = tensor.view(len(tensor), *largest[1:])
    received = [torch.empty_like(padded) for _ in range(_world.size)]
    distributed.all_gather(received, padded, group=_group)
    return torch.cat([part[: shape[0]] for part, shape in zip(received, shapes, strict=True)])
