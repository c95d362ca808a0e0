"""What becomes of a run that is interrupted: a checkpoint if steps run, a line that says how to go on."""

import time

import torch
from accelerate.utils import gather
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hf_ft_ext.launch.stopping import Interrupted, Signals
from hf_ft_ext.training.saved.checkpoints import last_sound_checkpoint


class SaveAndStop(TrainerCallback):
    """Once a signal has come, saves a checkpoint after the step and raises `Interrupted` when it is complete.

    transformers' own `enable_jit_checkpoint` saves between gradients and step, after a wait of three seconds, for
    SIGTERM only; a run that goes on from there is not the unbroken one. Where nothing can be saved (no steps, or
    `save_strategy=no`) the run ends at once.

    All processes stop at the same step. They ask each other, which costs a collective and on an accelerator a
    synchronisation, after steps that all of them know: the first ones, then about once a second (see `_Schedule`),
    after evaluations, after the last step and at the end.

    It belongs behind all callbacks that write into a checkpoint.
    """

    def __init__(self, signals: Signals):
        self.signals = signals
        self._number: int | None = None
        self._schedule = _Schedule()

    def on_train_begin(self, args, state, control, **kwargs):
        self._schedule = _Schedule(state.global_step)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        # Methods without steps call this too, and have no optimizer.
        self.signals.check()
        self.signals.waits = optimizer is not None and args.save_strategy != SaveStrategy.NO

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps or control.should_training_stop
        if args.world_size == 1 or last or self._schedule.is_due(state.global_step):
            self._look(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.signals.waits:
            self._look(args, state, control)

    def _look(self, args, state, control) -> None:
        number = self.signals.requested or 0
        if args.world_size > 1:
            seconds = self._schedule.seconds_per_step(state.global_step)
            mine = torch.tensor([[number, seconds]], dtype=torch.float32, device=args.device)
            number, seconds = gather(mine).amax(0).tolist()
            self._schedule.plan(state.global_step, seconds)
        if number and self.signals.waits:
            self._number = int(number)
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self._number is not None:
            self.signals.waits = False
            raise Interrupted(self._number)

    def on_train_end(self, args, state, control, **kwargs):
        if self.signals.waits:
            self._look(args, state, control)
        self.signals.waits = False
        if self._number is not None:
            raise Interrupted(self._number)


class _Schedule:
    """The steps after which the processes ask each other: about one second apart.

    The number of steps in between follows from the slowest process's time per step, and at most doubles each time, so
    that one odd step (the first one compiles) does not decide. Every process computes the same steps, because all of
    them use the same time.

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
        """This process's seconds per step since the processes last asked each other."""
        return (time.monotonic() - self._time) / max(step - self._asked, 1)

    def plan(self, step: int, seconds: float) -> None:
        """Fix the next step.

        Args:
            step: the present one.
            seconds: per step, the same on all processes.
        """
        if step > self._asked:  # not a second time after the same step, as an evaluation does
            within = int(self.INTERVAL / seconds) if seconds > 0 else 2 * self._steps
            self._steps = max(1, min(2 * self._steps, within))
        self._asked, self._time = step, time.monotonic()


def what_now(signals: Signals) -> str:
    """How the interrupted run goes on, in one sentence."""
    folder = signals.output_dir
    checkpoint = None if folder is None else last_sound_checkpoint(folder)
    if checkpoint is None:
        return "there is no checkpoint to go on from; run the same command again, with --overwrite_output_dir if asked"
    return f"{checkpoint} is complete; run the same command again with --resume_from_checkpoint true"
