"""Time and peak memory of training, measured by a callback for any Trainer."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import gather
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_ft_ext.training.weights.quantized import is_readable

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak memory of this process between `reset()` and `bytes()`.

    On accelerators this is the memory that torch has allocated, summed over `devices`. On the CPU, and on devices for
    which torch does not count, it is the resident set. Linux keeps a high-water mark that a process can reset. Other
    systems and MPS have none, so the value there is the level at the time of the call.

    Args:
        devices: the devices of the run; none = the machine's accelerator, or else the CPU.

    Attributes:
        exact: whether a peak between two calls is measured.
        what: a description of what is measured.
    """

    def __init__(self, *devices: torch.device):
        if not devices:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            devices = (accelerator or torch.device("cpu"),)
        self._devices = _with_index(devices)
        try:
            self.level()
        except (RuntimeError, NotImplementedError, AttributeError):  # torch does not count memory on this device type
            self._devices = []
        self.what = "resident set" if not self._devices else f"allocated on {devices[0].type}"
        self.exact = all(hasattr(torch.get_device_module(device), "max_memory_allocated") for device in self._devices)
        if not self._devices:
            self.exact = False
            if _CLEAR_REFS.exists():
                with contextlib.suppress(OSError):
                    self._reset_high_water()
                    self.exact = True

    @staticmethod
    def _reset_high_water() -> None:
        _CLEAR_REFS.write_text("5")  # see proc(5): resets VmHWM to the current resident set

    def reset(self) -> None:
        """Forget earlier peaks."""
        if not self.exact:
            return
        for device in self._devices:
            torch.get_device_module(device).reset_peak_memory_stats(device)
        if not self._devices:
            self._reset_high_water()

    def bytes(self) -> int:
        """The peak since the last `reset()`, in bytes."""
        if not self.exact:
            return self.level()
        if self._devices:
            return sum(torch.get_device_module(device).max_memory_allocated(device) for device in self._devices)
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def level(self) -> int:
        """The current level, in bytes."""
        if self._devices:
            return sum(_allocated(device) for device in self._devices)
        return psutil.Process().memory_info().rss


class ResourceMonitor(TrainerCallback, ExportableState):
    """Measures training only: preparation (see `preparation`) and optimizer steps, without evaluation.

    Attributes:
        train_seconds: preparation plus training loop, without the evaluations in between; a resumed run adds the
            seconds up to its checkpoint.
        preparation_seconds: the part of it before the first step, such as a gradient pre-pass.
        samples_per_second: training examples per second of the loop, all processes together.
        peak_memory_bytes: peak during training above the level before training, with the model loaded (see
            `PeakMemory`). At the end of training it is the largest value of all processes.
        memory: the memory meter; `None` until the trainer is created, because the device is unknown before.
    """

    def __init__(self):
        self.memory: PeakMemory | None = None
        self._before: int | None = None
        self._peak = 0
        self._most = 0  # of all processes
        self.earlier = {"preparation_seconds": 0.0, "loop_seconds": 0.0, "samples": 0.0}  # before a resume
        self._preparation = self._loop = self._samples = 0.0
        self._started: float | None = None
        self._first_epoch = 0.0

    # --- results -----------------------------------------------------------------------------------

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
        return max(0, self._peak - (self._before or 0), self._most)

    def _loop_seconds(self) -> float:
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self.earlier["loop_seconds"] + self._loop + running

    # --- measurement -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def preparation(
        self, args: TrainingArguments | None = None, model: torch.nn.Module | None = None
    ) -> Iterator[None]:
        """A context whose time and memory count as training, for work before the first step.

        Args:
            args, model: the trainer's, if no callback may have passed them to the monitor yet.
        """
        if args is not None and model is not None:
            self._note_level(args, model)
        meter = self._meter()
        start = time.perf_counter()
        meter.reset()
        try:
            yield
        finally:
            self._preparation += time.perf_counter() - start
            self._peak = max(self._peak, meter.bytes())

    def _meter(self) -> PeakMemory:
        if self.memory is None:
            self.memory = PeakMemory()
        return self.memory

    def _note_level(self, args: TrainingArguments, model: torch.nn.Module) -> None:
        if self._before is None:
            here = [parameter.device for parameter in model.parameters() if parameter.device.type == args.device.type]
            meter = self.memory = PeakMemory(args.device, *here)  # `device_map` may have spread the model
            for parameter in model.parameters():
                if is_readable(parameter):
                    parameter.detach().sum()  # weights may be mapped from a file and not resident yet
            self._before = meter.level()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs
    ) -> None:
        parameter = next(model.parameters(), None)
        if parameter is None or parameter.device.type == args.device.type:  # else it is moved when training begins
            self._note_level(args, model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs
    ) -> None:
        self._note_level(args, model)
        if state.global_step > 0:  # resumed: the checkpoint stores the time spent before
            saved = state.stateful_callbacks.get(type(self).__name__) or {}
            self.earlier.update(saved.get("attributes", {}).get("earlier", {}))
        self._first_epoch = state.epoch if state.global_step > 0 else 0.0
        self._loop = self._samples = 0.0  # train() may be called again, as a hyperparameter search does
        self._started = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._meter().reset()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs,
    ) -> None:
        self._peak = max(self._peak, self._meter().bytes())
        self._samples = self._samples_seen(args, state, train_dataloader)

    def _samples_seen(self, args, state, train_dataloader) -> float:
        try:
            return (state.epoch - self._first_epoch) * len(train_dataloader.dataset)
        except TypeError:  # streams have no length: count full batches
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
        if args.world_size > 1:
            peaks = gather(torch.tensor([self.peak_memory_bytes], dtype=torch.long, device=args.device))
            self._most = int(peaks.max())

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
    """`ResourceMonitor.preparation` of the trainer's monitor; without a monitor, nothing is measured."""
    monitor = find_monitor(trainer)
    return contextlib.nullcontext() if monitor is None else monitor.preparation(trainer.args, trainer.model)


def find_monitor(trainer: Trainer) -> ResourceMonitor | None:
    """The monitor among the trainer's callbacks (restoring callback states from a checkpoint creates a new one)."""
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, ResourceMonitor)), None)


def _allocated(device: torch.device) -> int:
    # `torch.cuda`, `torch.xpu`, `torch.npu`, ... have the same functions; `torch.accelerator` has fewer
    module = torch.get_device_module(device)
    if hasattr(module, "memory_allocated"):
        return module.memory_allocated(device)
    if hasattr(module, "current_allocated_memory"):  # MPS
        return module.current_allocated_memory()
    return torch.accelerator.memory_allocated(device)


def _with_index(devices: Iterable[torch.device]) -> list[torch.device]:
    """The accelerators among `devices`, without duplicates; `cuda` becomes the current one, such as `cuda:0`."""
    found = set()
    for device in devices:
        if device.type in ("cpu", "meta"):
            continue
        index = device.index
        if index is None:
            module = torch.get_device_module(device)
            index = module.current_device() if hasattr(module, "current_device") else 0
        found.add((device.type, index))
    return [torch.device(kind, index) for kind, index in sorted(found)]
