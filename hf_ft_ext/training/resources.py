"""Time and peak memory of training, measured by a callback that any Trainer takes."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak memory of this process between `reset()` and `bytes()`.

    CUDA: bytes allocated by torch on the current device. Elsewhere: the resident set. Linux keeps its
    high-water mark and lets a process reset it; other systems give the level at the time of asking.
    """

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        self.exact = self.cuda
        if not self.cuda and _CLEAR_REFS.exists():
            with contextlib.suppress(OSError):
                self._reset_high_water()
                self.exact = True

    @staticmethod
    def _reset_high_water() -> None:
        _CLEAR_REFS.write_text("5")  # see proc(5): resets VmHWM to the present resident set

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.exact:
            self._reset_high_water()

    def bytes(self) -> int:
        """The peak since the last `reset()`, in bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if self.exact:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return self.level()

    def level(self) -> int:
        """The present level, in bytes."""
        return torch.cuda.memory_allocated() if self.cuda else psutil.Process().memory_info().rss


class ResourceMonitor(TrainerCallback, ExportableState):
    """Measures training alone: preparation (see `preparation`) and optimizer steps, no evaluation.

    Attributes:
        train_seconds: preparation plus training loop, evaluations in between left out; a resumed run
            adds the seconds up to its checkpoint.
        preparation_seconds: the part of it spent before the first step (a gradient pre-pass, say).
        samples_per_second: training examples per second of the loop, all processes together.
        peak_memory_bytes: CUDA: peak allocated in training; CPU: peak resident set in training, above the
            level before it (model loaded). Of the process that it is read in.
    """

    def __init__(self):
        self.memory = PeakMemory()
        self._before: int | None = None
        self._peak = 0
        self.earlier = {"preparation_seconds": 0.0, "loop_seconds": 0.0, "samples": 0.0}  # before a resume
        self._preparation = self._loop = self._samples = 0.0
        self._started: float | None = None
        self._first_epoch = 0.0

    # --- what was measured -------------------------------------------------------------------------

    @property
    def preparation_seconds(self) -> float:
        return self.earlier["preparation_seconds"] + self._preparation

    @property
    def train_seconds(self) -> float:
        return self.preparation_seconds + self._loop_seconds()

    @property
    def samples_per_second(self) -> float:
        seconds = self._loop_seconds()
        return (self.earlier["samples"] + self._samples) / seconds if seconds > 0 else 0.0

    @property
    def peak_memory_bytes(self) -> int:
        before = 0 if self.memory.cuda else (self._before or 0)
        return max(0, self._peak - before)

    def _loop_seconds(self) -> float:
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self.earlier["loop_seconds"] + self._loop + running

    # --- what is measured --------------------------------------------------------------------------

    @contextlib.contextmanager
    def preparation(self) -> Iterator[None]:
        """Count what runs inside as part of training (work before the first step)."""
        start = time.perf_counter()
        self.memory.reset()
        try:
            yield
        finally:
            self._preparation += time.perf_counter() - start
            self._peak = max(self._peak, self.memory.bytes())

    def _note_level(self, model: torch.nn.Module) -> None:
        if self._before is None:
            for parameter in model.parameters():
                parameter.detach().sum()  # weights may be mapped from a file and not resident yet
            self._before = self.memory.level()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs
    ) -> None:
        self._note_level(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs
    ) -> None:
        self._note_level(model)
        if state.global_step > 0:  # resumed: the checkpoint knows what was spent before
            saved = state.stateful_callbacks.get(type(self).__name__) or {}
            self.earlier.update(saved.get("attributes", {}).get("earlier", {}))
        self._first_epoch = state.epoch if state.global_step > 0 else 0.0
        self._loop = self._samples = 0.0  # train() may be called again, as a hyperparameter search does
        self._started = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.memory.reset()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs,
    ) -> None:
        self._peak = max(self._peak, self.memory.bytes())
        self._samples = self._samples_seen(args, state, train_dataloader)

    def _samples_seen(self, args, state, train_dataloader) -> float:
        try:
            return (state.epoch - self._first_epoch) * len(train_dataloader.dataset)
        except TypeError:  # streaming data have no length: full batches are all there is to count
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            return self._samples + per_step

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs
    ) -> None:
        if self._started is not None and metrics:
            self._loop -= sum(value for key, value in metrics.items() if key.endswith("_runtime"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._started is not None:
            self._loop += time.perf_counter() - self._started
            self._started = None

    def state(self) -> dict:
        return {
            "args": {},
            "attributes": {
                "earlier": {
                    "preparation_seconds": self.preparation_seconds,
                    "loop_seconds": self._loop_seconds(),
                    "samples": self.earlier["samples"] + self._samples,
                }
            },
        }


def preparation(trainer: Trainer) -> contextlib.AbstractContextManager:
    """`ResourceMonitor.preparation` of the monitor that `trainer` carries; without one, nothing is measured."""
    monitor = find_monitor(trainer)
    return contextlib.nullcontext() if monitor is None else monitor.preparation()


def find_monitor(trainer: Trainer) -> ResourceMonitor | None:
    """The monitor that `trainer` carries (restoring callback states from a checkpoint makes a new one)."""
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, ResourceMonitor)), None)
