"""What becomes of a run that is interrupted: a checkpoint if steps run, a line that says how to go on."""

import torch
from accelerate.utils import gather
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hf_ft_ext.launch.stopping import Interrupted, Signals
from hf_ft_ext.training.checkpoints import last_sound_checkpoint


class SaveAndStop(TrainerCallback):
    """Once a signal has come, saves a checkpoint after the step and raises `Interrupted` when it is complete.

    transformers' own `enable_jit_checkpoint` saves between gradients and step, after a wait of three seconds, for
    SIGTERM only; a run that goes on from there is not the unbroken one. Where nothing can be saved (no steps, or
    `save_strategy=no`) the run ends at once. All processes stop at the same step.

    It belongs behind all callbacks that write into a checkpoint.
    """

    def __init__(self, signals: Signals):
        self.signals = signals
        self._number: int | None = None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        # Methods without steps call this too, and have no optimizer.
        self.signals.check()
        self.signals.waits = optimizer is not None and args.save_strategy != SaveStrategy.NO

    def on_step_end(self, args, state, control, **kwargs):
        self._look(args, control)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.signals.waits:
            self._look(args, control)

    def _look(self, args, control) -> None:
        number = self.signals.requested or 0
        if args.world_size > 1:
            number = int(gather(torch.tensor([number], device=args.device)).max())
        if number and self.signals.waits:
            self._number = number
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self._number is not None:
            self.signals.waits = False
            raise Interrupted(self._number)

    def on_train_end(self, args, state, control, **kwargs):
        self.signals.waits = False
        if self._number is not None:
            raise Interrupted(self._number)


def what_now(signals: Signals) -> str:
    """How the interrupted run goes on, in one sentence."""
    folder = signals.output_dir
    checkpoint = None if folder is None else last_sound_checkpoint(folder)
    if checkpoint is None:
        return "there is no checkpoint to go on from; run the same command again, with --overwrite_output_dir if asked"
    return f"{checkpoint} is complete; run the same command again with --resume_from_checkpoint true"
