"""The processes of a trainer: the first writes and prints, the others compute along. Imports no torch at the top.

For `trainer.devices` > 1 Lightning runs the whole command again for each further process, which then does all that the
first does up to the files; torchrun and SLURM start all of them themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from probes.section_base import RecipeError

# Lightning's own order, so that both name the same process the first.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, and whoever stands in for it; Lightning sets no RANK for those that it starts."""
TOLD = "EVA_CLIP_RUN_DIR"
"""Environment variable in which the first process tells those that Lightning starts where the run is."""
PATIENCE = timedelta(minutes=30)
"""How long a process waits for the first one's answer: it may have data to look through before."""

_questions = itertools.count()
_served: list[Any] = []


def is_first_process() -> bool:
    """Whether this process writes the run folder and prints; true without a launcher."""
    rank = next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)
    # Lightning's processes of further nodes, where nothing but the node is numbered.
    return rank == 0 and ("RANK" in os.environ or int(os.environ.get("NODE_RANK", "0")) == 0)


def agree_on_folder(choose: Callable[[str], Path]) -> Path:
    """One new run folder for all processes of a launch, though each has a clock of its own.

    torchrun's processes hear the first one's choice through torchrun's own store; SLURM's all derive it from the job
    and its step; those that Lightning starts inherit it.

    Args:
        choose: the folder of a run, given what names the launch, or "" for a new folder of this moment.

    Raises:
        RecipeError: the processes were started by something else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and all(name in os.environ for name in _RENDEZVOUS):
        return Path(_tell_by_store(lambda: str(choose(""))))
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return choose(_slurm_launch())
    if is_first_process():
        os.environ[TOLD] = str(choose(""))
    elif TOLD not in os.environ:
        raise RecipeError(
            "run.dir is null, and the first of these processes cannot tell the others which folder it took; name one, "
            "such as run.dir=logs/my-run, or start with torchrun, srun or trainer.devices"
        )
    return Path(os.environ[TOLD])


def _tell_by_store(choose: Callable[[], str]) -> str:
    """The first process's answer, in every process of a torchrun."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    first = is_first_process()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # As torch.distributed does later: torchrun's agent serves the store, or else the first process.
    serves = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(host, port, is_master=serves, timeout=PATIENCE, wait_for_workers=False, multi_tenant=True)
    if serves:
        _served.append(store)  # it ends with the object
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # restarted processes ask the same store anew
    key = f"eva_clip/run_dir/{attempt}/{next(_questions)}"
    if first:
        store.set(key, choose())
    told: bytes = store.get(key)
    return told.decode()


def _slurm_launch() -> str:
    """What names this launch among all of the cluster's: job, step, and how often the job was requeued."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restart = (os.environ.get(name, "0") for name in names)
    count = next(_questions)
    return f"job{job}.{step}" + (f"-restart{restart}" if restart != "0" else "") + (f"-{count + 1}" if count else "")


@contextlib.contextmanager
def first_process_prints() -> Iterator[None]:
    """Drop the standard output of all but the first process; errors are shown from every one."""
    with contextlib.ExitStack() as stack:
        if not is_first_process():
            silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield
