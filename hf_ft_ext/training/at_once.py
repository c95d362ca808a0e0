"""Training without steps: the base of trainers that solve the task as a whole."""

import time
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, speed_metrics

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.devices import refuse_data_parallel
from hf_ft_ext.training.precision import refuse_fp16_on_cpu
from hf_ft_ext.training.quantized import move, quantized_base
from hf_ft_ext.training.saving import CompleteSaves
from hf_ft_ext.training.sharding import refuse_sharding


class AtOnceTrainer(CompleteSaves, Trainer):
    """`transformers.Trainer` whose `train()` calls `solve` once, in the place of all steps.

    Callbacks see one step. There is no optimizer and there are no checkpoints.

    Args:
        model, args, and all else: as for `Trainer`.

    Attributes:
        solution: what `train()` makes, with its article, for messages.
        start_over: what to do instead of resuming.

    Raises:
        InputError: an optimizer passed, sharded parameters, several GPUs in one process; in `train`: a checkpoint to
            resume from, no training data or a stream.
    """

    solution: ClassVar[str]
    start_over: ClassVar[str] = "start anew"

    def __init__(self, model: nn.Module | None, args: TrainingArguments, *positional, **kwargs):
        if kwargs.get("optimizers", (None, None))[0] is not None or kwargs.get("optimizer_cls_and_kwargs") is not None:
            raise InputError(
                f"{type(self).__name__} solves the task at once and takes no steps; leave `optimizers` out"
            )
        refuse_sharding(args, self.solution)
        with quantized_base(model):
            super().__init__(model, args, *positional, **kwargs)
        refuse_fp16_on_cpu(self.accelerator)
        refuse_data_parallel(self.args)

    def solve(self) -> dict[str, float]:
        """Solve the task on `train_dataset`; the metrics, `train_loss` among them."""
        raise NotImplementedError

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs,
    ) -> TrainOutput:
        """Solve the task; return what `Trainer.train` returns.

        Raises:
            InputError: see the class.
        """
        if resume_from_checkpoint not in (None, False):
            raise InputError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: {self.solution} is found at once and leaves no "
                f"checkpoint; {self.start_over}"
            )
        if self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            raise InputError(f"{self.solution} needs a training data set of known length; pass train_dataset")
        self.is_in_train = True
        if self.model_init is not None:
            self.model = self.model_wrapped = self.call_model_init(trial)
        move(self.model, self.args.device)
        self.state.max_steps = self.args.max_steps
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        start = time.time()
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        metrics = self.solve()
        self.state.global_step, self.state.epoch = 1, 1.0
        self.callback_handler.train_dataloader = self.get_train_dataloader()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        metrics = {**speed_metrics("train", start, num_samples=len(self.train_dataset)), **metrics, "epoch": 1.0}
        self.is_in_train = False
        self.log(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(1, metrics["train_loss"], metrics)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        raise InputError(f"{self.solution} has no optimizer: call train(), which solves the task")
