"""One run with arbitrary arguments: it works, or one of our errors ends it before the first step."""

import contextlib
import io
import os
import tempfile
import warnings
from pathlib import Path
from unittest import mock

from quick import SOLVER_METHODS
from workload import Workload

import run_glue
from hf_ft_ext.training.runs.resources import ResourceMonitor

# The loss can only be known in training.
_IN_TRAINING = ("the loss is", "the loss at the current weights", "holds NaN or infinity", "not finite")


class NotClean(AssertionError):
    """A run that failed in another way than by one of our errors, or too late."""


def check_run(method: str, root: Path, words: list[str]) -> int:
    """Run `method` with `words` behind a working command, in this process; its status, 0 or 2.

    Raises:
        NotClean, or what a library raised.
    """
    steps = () if method in SOLVER_METHODS else ("--max_steps", "1", "--save_strategy", "no")
    few = ("--max_train_samples", "24") if not any("num_k" in word for word in words) else ()
    argv = [*Workload(method, root).argv, *steps, *few, *words]
    stepped = []
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(ResourceMonitor, "on_substep_end", lambda *_, **__: stepped.append(0), create=True),
        mock.patch.object(ResourceMonitor, "on_step_end", lambda *_, **__: stepped.append(1)),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        status = run_glue.main(argv)
    text = err.getvalue()
    if status not in (0, 2):
        raise NotClean(f"status {status}: {text[-1000:]}")
    if status == 2 and "error: " not in text:
        raise NotClean(f"no error was shown: {text[-1000:]}")
    said = text.rpartition("error: ")[2]
    if status == 2 and 1 in stepped and not any(words in said for words in _IN_TRAINING):
        raise NotClean(f"refused only after a step: {said}")
    return status
