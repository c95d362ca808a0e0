"""Handling an interrupted run: a checkpoint if training steps are running, and a line on how to continue."""

import time

import torch
from accelerate.utils import gather
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hf_ft_ext.launch.stopping import Interrupted, Signals
from hf_ft_ext.training.saved.checkpoints import last_complete_checkpoint


class SaveAndStop(TrainerCallback):
    """After a signal, saves a checkpoint at the end of the step and raises `Interrupted` when it is complete.

    After the last step of an epoch this waits for the end of the epoch: a run that is resumed from a checkpoint
    between the two would leave out the evaluation there.

    transformers' own `enable_jit_checkpoint` saves between gradients and optimizer step, after a wait of three
    seconds, for SIGTERM only; a run resumed from there differs from an uninterrupted one. If nothing can be saved (no
    steps, or `save_strategy=no`), the run ends at once.

    All processes stop at the same step. They compare their signals by a collective, which on an accelerator also costs
    a synchronisation. They do so after steps that all of them know: the first ones, then about once a second (see
    `_Schedule`), after evaluations, after the last step and at the end.

    Register it after all callbacks that write files into a checkpoint.
    """

    def __init__(self, signals: Signals):
        self.signals = signals
        self._number: int | None = None
        self._epoch_ends = False  # whether the end of the epoch follows
        self._schedule = _Schedule()

    def on_train_begin(self, args, state, control, **kwargs):
        self._schedule = _Schedule(state.global_step)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        # Methods without steps call this too, and have no optimizer.
        self.signals.check()
        self.signals.waits = optimizer is not None and args.save_strategy != SaveStrategy.NO

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps or control.should_training_stop
        # With `save_strategy=best` an evaluation that is not the best one takes back that a checkpoint is due.
        waits = args.save_strategy != SaveStrategy.BEST
        self._epoch_ends = waits and (last or float(state.epoch).is_integer())
        if args.world_size == 1 or last or self._schedule.is_due(state.global_step):
            self._compare_signals(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._epoch_ends = False
        self._stop_if_signalled(control)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.signals.waits:
            self._compare_signals(args, state, control)

    def _compare_signals(self, args, state, control) -> None:
        number = self.signals.requested or 0
        if args.world_size > 1:
            seconds = self._schedule.seconds_per_step(state.global_step)
            mine = torch.tensor([[number, seconds]], dtype=torch.float32, device=args.device)
            number, seconds = gather(mine).amax(0).tolist()
            self._schedule.plan(state.global_step, seconds)
        if number and self.signals.waits:
            self._number = int(number)
        self._stop_if_signalled(control)

    def _stop_if_signalled(self, control) -> None:
        if self._number is not None and not self._epoch_ends:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self._number is not None and not self._epoch_ends:
            self.signals.waits = False
            raise Interrupted(self._number)

    def on_train_end(self, args, state, control, **kwargs):
        if self.signals.waits:
            self._compare_signals(args, state, control)
        self.signals.waits = False
        if self._number is not None:
            raise Interrupted(self._number)


def how_to_continue(signals: Signals) -> str:
    """How to continue the interrupted run, in one sentence."""
    folder = signals.output_dir
    checkpoint = None if folder is None else last_complete_checkpoint(folder)
    if checkpoint is None:
        return "there is no checkpoint to resume; run the same command again, with --overwrite_output_dir if asked"
    values = " ".join(f"--{name} {value}" for name, value in signals.found.items())
    instead = f", and {values} in place of --hp_search" if values else ""  # a search itself cannot resume
    return f"{checkpoint} is complete; run the same command again with --resume_from_checkpoint true{instead}"


class _Schedule:
    """The steps after which the processes compare their signals: about one second apart.

    The interval follows from the slowest process's time per step and at most doubles each time, so that one unusual
    step (the first one compiles) has little influence. All processes use the same time and therefore compute the same
    steps.

    Args:
        step: the step at which training starts.
    """

    INTERVAL = 1.0  # seconds

    def __init__(self, step: int = 0):
        self._asked, self._steps = step, 1
        self._time = time.monotonic()

    def is_due(self, step: int) -> bool:
        return step >= self._asked + self._steps

    def seconds_per_step(self, step: int) -> float:
        """This process's seconds per step since the last comparison."""
        return (time.monotonic() - self._time) / max(step - self._asked, 1)

    def plan(self, step: int, seconds: float) -> None:
        """Set the step of the next comparison.

        Args:
            step: the current step.
            seconds: seconds per step, the same value on all processes.
        """
        if step > self._asked:  # an evaluation after the same step compares again
            within = int(self.INTERVAL / seconds) if seconds > 0 else 2 * self._steps
            self._steps = max(1, min(2 * self._steps, within))
        self._asked, self._time = step, time.monotonic()
