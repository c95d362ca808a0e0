"""`LinearHeadTrainer`: a Trainer that fits the last layer by linear probing."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, speed_metrics

from hf_ft_ext.errors import InputError
from hf_ft_ext.feature_rows import SAMPLE, batches_in_order, for_collator
from hf_ft_ext.linear_probe import LinearHead, find_last_layer, fit_linear_head, prepare_linear_head
from hf_ft_ext.linearhead.arguments import LinearHeadTrainingArguments
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.plan import TrainedWeight
from hf_ft_ext.training.sharding import refuse_sharding

logger = logging.getLogger(__name__)


class LinearHeadTrainer(Trainer):
    """`transformers.Trainer` whose `train()` fits the model's last layer by logistic or linear regression.

    The encoder runs once over the training data; no step is taken. In a prompt model the label words' output rows are
    fitted, untied from the input embeddings. Evaluation, prediction and saving are those of `Trainer`: the result is
    an ordinary model.

    Args:
        model, args, and all else: as for `Trainer`. Plain `TrainingArguments` are completed with the
            defaults of `LinearHeadTrainingArguments`.

    Raises:
        InputError: a model with PEFT adapters, an optimizer passed; in `train`: a class without rows, a model without
            a linear last layer, a checkpoint to resume from.

    Source: Kumar et al., ICLR 2022 (linear probing as a start, arXiv 2202.10054); LM-Kernel-FT's linear head.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, *positional, **kwargs):
        args = LinearHeadTrainingArguments.complete(args)
        if kwargs.get("optimizers", (None, None))[0] is not None or kwargs.get("optimizer_cls_and_kwargs") is not None:
            raise InputError("LinearHeadTrainer fits in closed form or by its own solver; leave `optimizers` out")
        refuse_sharding(args, "a linear head")
        if isinstance(model, PeftModel):
            raise InputError("the model carries PEFT adapters; pass the base model, or merge the adapters first")
        if model is not None:
            declare_mean_loss(model)
        self.fitted: LinearHead | None = None
        super().__init__(model, args, *positional, **kwargs)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs,
    ) -> TrainOutput:
        """Fit the head; return what `Trainer.train` returns, with the mean loss on the training data.

        Raises:
            InputError: see the class.
        """
        if resume_from_checkpoint not in (None, False):
            raise InputError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: a linear head is fitted at once and leaves no "
                "checkpoint; start anew"
            )
        if self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            raise InputError("a linear head needs a training data set of known length; pass train_dataset")
        self.is_in_train = True
        if self.model_init is not None:
            self.model = self.model_wrapped = self.call_model_init(trial)
        self.model.to(self.args.device)
        self.state.max_steps = self.args.max_steps
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        start = time.time()
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        self._fit_everywhere()
        self.state.global_step, self.state.epoch = 1, 1.0
        self.callback_handler.train_dataloader = self.get_train_dataloader()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        loss = self.fitted.fit.loss
        metrics = speed_metrics("train", start, num_samples=len(self.train_dataset))
        metrics |= {"train_loss": loss, "epoch": 1.0, "train_score": self.fitted.fit.score, "c": self.fitted.fit.c}
        self.is_in_train = False
        self.log(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(1, loss, metrics)

    def _fit_everywhere(self) -> None:
        """The first process fits; the others take its weights, or its refusal."""
        args = self.args
        outcome: list = [None]
        if args.process_index == 0:
            try:
                dataset, collate = for_collator(self, self.train_dataset)
                outcome[0] = fit_linear_head(
                    self.model,
                    dataset,
                    collate,
                    batch_size=args.per_device_eval_batch_size,
                    c=args.linearhead_c,
                    folds=args.linearhead_folds,
                    max_iter=args.linearhead_max_iter,
                    feature_cache_dir=args.feature_cache_dir,
                    feature_cache_gb=args.feature_cache_gb,
                    disable_tqdm=args.disable_tqdm,
                )
            except InputError as error:
                outcome[0] = error
        broadcast_object_list(outcome)
        if isinstance(outcome[0], InputError):
            raise outcome[0]
        self.fitted = outcome[0]
        if args.world_size > 1:
            prepare_linear_head(self.model)
            layer = self.model.get_submodule(self.fitted.layer)
            for parameter in layer.parameters():
                parameter.data.copy_(broadcast(parameter.data))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        raise InputError("a linear head has no optimizer: call train(), which fits it")

    def trained_weights(self) -> list[TrainedWeight]:
        """The last layer: no gradients, no moments."""
        prepare_linear_head(self.model)
        name = self.fitted.layer if self.fitted else self._last_layer()
        layer = self.model.get_submodule(name)
        return [
            TrainedWeight(f"{name}.{part}", tuple(p.shape), p.numel(), 0, 0) for part, p in layer.named_parameters()
        ]

    def _last_layer(self) -> str:
        batches = batches_in_order(*for_collator(self, self.train_dataset), SAMPLE, self.args.device)
        self.model.to(self.args.device)
        return find_last_layer(self.model, next(batches))[0]

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Nothing is kept for a backward pass."""
        with torch.no_grad():
            yield
