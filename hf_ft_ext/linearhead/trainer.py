"""`LinearHeadTrainer`: a Trainer that fits the last layer by linear probing."""

import contextlib
import logging
from collections.abc import Iterator

import torch
from accelerate.utils import broadcast
from peft import PeftModel
from torch import nn

from hf_ft_ext.arguments.completion import chosen
from hf_ft_ext.errors import InputError
from hf_ft_ext.features.linear_probe import LinearHead, find_last_layer, fit_linear_head, prepare_linear_head
from hf_ft_ext.features.rows import SAMPLE, batches_in_order, data_and_collator
from hf_ft_ext.linearhead.arguments import LinearHeadTrainingArguments
from hf_ft_ext.metrics import REGRESSION
from hf_ft_ext.prompts.model import is_prompt_model
from hf_ft_ext.training.first_process import on_first_process
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.runs.plan import TrainedWeight
from hf_ft_ext.training.solver_trainer import SolverTrainer
from hf_ft_ext.training.weights.precision import autocast_of

logger = logging.getLogger(__name__)


class LinearHeadTrainer(SolverTrainer):
    """`transformers.Trainer` whose `train()` fits the model's last layer by logistic or ridge regression.

    The encoder runs once over the training data, and there are no optimizer steps. In a prompt model the output rows
    of the label words are untied from the input embeddings and fitted. Evaluation, prediction and saving are those of
    `Trainer`: the result is an ordinary model.

    Args:
        model, args, and all other arguments: as for `Trainer`. Other `TrainingArguments` are completed with the
            defaults of `LinearHeadTrainingArguments`.

    Raises:
        InputError: a model with PEFT adapters, or an optimizer; in `train`: a class without rows, a model without a
            linear last layer, or a checkpoint to resume from.

    Source: Kumar et al., ICLR 2022, arXiv 2202.10054 (linear probing before fine-tuning); LM-Kernel-FT's linear head.
    """

    solution = "a linear head"

    arguments_class = LinearHeadTrainingArguments
    fitted: LinearHead | None = None

    def prepare_model(self, model: nn.Module) -> nn.Module:
        if isinstance(model, PeftModel):
            raise InputError("the model carries PEFT adapters; pass the base model, or merge the adapters first")
        if not hasattr(getattr(model, "config", None), "num_labels"):
            raise InputError(
                f"{type(model).__name__} has no configuration that says how many labels it has (config.num_labels, "
                "config.id2label); use a transformers model"
            )
        problem = model.config.problem_type
        regression = problem == REGRESSION or (problem is None and model.config.num_labels == 1)
        if regression and not is_prompt_model(model):
            for name in ("linearhead_folds", "linearhead_max_iter"):
                if chosen(self.args, name):
                    raise InputError(
                        f"{name}={getattr(self.args, name)} is for logistic regression, and a regression is fitted by "
                        "ridge regression in one step; leave it out"
                    )
        declare_mean_loss(model)
        self.fitted = None
        return model

    def solve(self) -> dict[str, float]:
        """Fit the head."""
        fit = self._fit_on_all_processes().fit
        return {"train_loss": fit.loss, "train_score": fit.score, "c": fit.c}

    def _fit_on_all_processes(self) -> LinearHead:
        """Fit on the first process and broadcast its weights; its `InputError` is raised on every process."""
        args = self.args

        def fit() -> LinearHead:
            dataset, collate = data_and_collator(self, self.train_dataset)
            return fit_linear_head(
                self.model,
                dataset,
                collate,
                batch_size=args.rows_per_pass,
                c=args.linearhead_c,
                folds=args.linearhead_folds,
                max_iter=args.linearhead_max_iter,
                feature_cache_dir=args.feature_cache_dir,
                feature_cache_gb=args.feature_cache_gb,
                disable_tqdm=args.disable_tqdm,
                autocast=autocast_of(args),
            )

        self.fitted = fitted = on_first_process(fit)
        if args.world_size > 1:
            prepare_linear_head(self.model)
            layer = self.model.get_submodule(fitted.layer)
            for parameter in layer.parameters():
                parameter.data.copy_(broadcast(parameter.data))
        return fitted

    def trained_weights(self) -> list[TrainedWeight]:
        """The parameters of the last layer; they have no gradients and no moments. None without training rows."""
        if self.fitted is None and self.train_dataset is None:
            return []
        prepare_linear_head(self.model)
        name = self.fitted.layer if self.fitted else self._last_layer()
        layer = self.model.get_submodule(name)
        return [
            TrainedWeight(f"{name}.{part}", tuple(p.shape), p.numel(), 0, 0) for part, p in layer.named_parameters()
        ]

    def _last_layer(self) -> str:
        batches = batches_in_order(*data_and_collator(self, self.train_dataset), SAMPLE, self.args.device)
        self.model.to(self.args.device)
        return find_last_layer(self.model, next(batches))[0]

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Disable autograd: there is no backward pass."""
        with torch.no_grad():
            yield
