"""The processes of a trainer: the first writes and prints, the others compute along. Imports no torch.

For `trainer.devices` > 1 Lightning runs the whole command again for each further process, which then does all that the
first does up to the files; torchrun and SLURM start all of them themselves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Lightning's own order, so that both name the same process the first.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """Whether this process writes the run folder and prints; true without a launcher."""
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0) == 0


@contextlib.contextmanager
def first_process_prints() -> Iterator[None]:
    """Drop the standard output of all but the first process; errors are shown from every one."""
    with contextlib.ExitStack() as stack:
        if not is_first_process():
            silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield
