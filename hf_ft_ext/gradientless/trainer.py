"""`GradientlessTrainer`: a Trainer that optimizes by comparing losses, without gradients."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import HeadReader, head_parameters
from hf_ft_ext.gradientless.arguments import GradientlessTrainingArguments
from hf_ft_ext.gradientless.build import buffers_of, build_optimizer, refuse_unsupported
from hf_ft_ext.gradientless.optimizers.exchange import CANDIDATES, SharedCandidates, SharedData
from hf_ft_ext.gradientless.optimizers.selection import FISHER
from hf_ft_ext.gradientless.scoring.evaluation import HeadEvaluation, StepEvaluation
from hf_ft_ext.gradientless.scoring.features import feature_rows, find_reader, first_batch, returns_rows_unchanged
from hf_ft_ext.gradientless.scoring.full_models import (
    CLASSIFIERS,
    FullObjective,
    has_usual_loss,
    labels_of,
    language_losses,
    language_row_losses,
    model_loss,
    objective_of_logits,
    rows_of,
)
from hf_ft_ext.gradientless.scoring.objectives import (
    F1,
    LOSS,
    Objective,
    check_labels,
    from_user_function,
    objective_of_arguments,
    row_losses,
)
from hf_ft_ext.gradientless.scoring.rows import FeatureRows, train_dataloader
from hf_ft_ext.gradientless.search_arguments import ACTIVITY, ADAM_BASELINE, DIVERGENCE, HEAD
from hf_ft_ext.gradientless.targets import masks_of_run, prepare_offloaded, searched_parameters
from hf_ft_ext.gradientless.trajectory import FILE as TRAJECTORY
from hf_ft_ext.gradientless.trajectory import rewind_to_best, save_trajectory
from hf_ft_ext.label_tokens import label_count, predicts_next_tokens
from hf_ft_ext.models.peft import wrap_with_peft
from hf_ft_ext.problem_types import REGRESSION
from hf_ft_ext.prompts.model import is_prompt_model
from hf_ft_ext.training.checks import check_full_batch
from hf_ft_ext.training.finite import StopAtNaN
from hf_ft_ext.training.first_process import broadcast_weights
from hf_ft_ext.training.generators import with_same_draws
from hf_ft_ext.training.loss_scale import declare_mean_loss, one_answer
from hf_ft_ext.training.method_trainer import DATA_LOADING, MethodTrainer, has_own_loss, loss_of_batch, overridden
from hf_ft_ext.training.runs.plan import TrainedWeight
from hf_ft_ext.training.sharing import FinishedRun, delta_code
from hf_ft_ext.training.weights.precision import warn_of_lost_updates

logger = logging.getLogger(__name__)


class GradientlessTrainer(StopAtNaN, MethodTrainer):
    """`transformers.Trainer` for gradient-free search: no backward pass, no gradients, no optimizer moments.

    Each optimizer step compares losses of one batch under different weights (see `search_method`). Dropout is off
    during the search. If only the head is searched, the encoder runs once over the training data before the first
    step (see `feature_cache_gb`), and all candidates of a tensor are evaluated at once.

    Args:
        model, args, and all others: as for `Trainer`. Other `TrainingArguments` are completed with the
            defaults of `GradientlessTrainingArguments`.
        objective: `objective(logits [rows, classes], labels [rows])` -> a number to minimise, in place of
            `search_objective`; it needs no derivative. The logits are those of a whole optimizer step. If rows are
            sequences of unequal lengths, logits and labels are padded at the end (labels with -100).
        masks: entries of the searched parameters that may change: bool tensors by name, such as a FISH mask; for
            search_method=spsa.

    Raises:
        InputError: nothing to search, or an option that this method does not support.
    """

    arguments_class = GradientlessTrainingArguments
    several_devices = offloaded_models = True
    no_optimizer = "makes its own optimizer (see search_method)"
    no_optimizer_class = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional,
        objective: Objective | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
        **kwargs,
    ):
        self.objective, self.masks, self._masks_given = objective, masks, masks is not None
        super().__init__(model, args, *positional, **kwargs)

    def check_arguments(self) -> None:
        refuse_unsupported(self.args, self.objective, self._masks_given)
        super().check_arguments()
        if self._own_loader() and self.args.world_size > 1 and self.args.candidate_parallel == CANDIDATES:
            raise InputError(
                "candidate_parallel=candidates gives every process the whole batch, which is not possible with an "
                "overridden get_train_dataloader; pass candidate_parallel=data"
            )

    def prepare_model(self, model: nn.Module) -> nn.Module:
        declare_mean_loss(model)
        if self.args.search_peft is not None:
            settings = self.args.search_peft_config
            model = wrap_with_peft(model, self.args.search_peft, settings, self.args.seed, "search_peft")
        if self.args.search_objective == F1:
            objective_of_arguments(self.args, model.config)  # raises before training if f1 does not fit the model
        if self.args.search_masks is None:
            self._searched = list(searched_parameters(model, self.args.search_target))
        else:
            self._searched, self.masks = masks_of_run(model, self.args.search_masks)
        prepare_offloaded(self.args, model, self._searched)
        if isinstance(model, PeftModel):
            self.args.set_rate_for_adapter()
        head = self.args.search_target in (None, HEAD) and not isinstance(model, PeftModel)
        if head and is_prompt_model(model) and not model.config.untied_words:
            logger.info(
                "The output rows of the label words are tied to the input embeddings, so they are not searched; pass "
                "untie_words to search separate rows."
            )
        self._forget_batches()
        return model

    def _forget_batches(self) -> None:
        self._micro_batches: list[dict[str, torch.Tensor]] = []
        self._reader: HeadReader | None = None
        self._rows: FeatureRows | None = None
        self._looked_for_features = False
        self._usual_loss: bool | None = None
        self._evaluation: HeadEvaluation | None = None

    @property
    def searched(self) -> dict[str, nn.Parameter]:
        """The searched parameters by name."""
        return {name: self.model.get_parameter(name) for name in self._searched}

    # --- training ----------------------------------------------------------------------------------

    def train(self, *positional, **kwargs) -> TrainOutput:
        self._forget_batches()  # data, encoder and loss may be others than in an earlier training
        try:
            return super().train(*positional, **kwargs)
        finally:
            for parameter, trains in getattr(self, "_before", ()):
                parameter.requires_grad_(trains)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of the searched parameters; all weights are frozen until `train` ends."""
        if self.optimizer is None:
            self._before = [(p, p.requires_grad) for p in self.model.parameters()]
            if self.args.search_method == ADAM_BASELINE:  # the searches lose no 16-bit updates: see `Rounding`
                warn_of_lost_updates(self.searched)
            self.model.requires_grad_(False)  # so that no memory is reserved for gradients
            broadcast_weights(self.model, self.args.world_size)
            decayed = self.get_decay_parameter_names(self.model)
            self.optimizer = build_optimizer(self.args, self.model, self.searched, self.masks, decayed)
            self._share_work()
        if self._evaluation is None and not self._own_loader():
            self._make_evaluation()
        return self.optimizer

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Without gradients, DistributedDataParallel would only allocate gradient buckets: prepare for evaluation.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _own_loader(self) -> bool:
        """Whether the user overrides data loading; the head's inputs are then found from the first batch."""
        return overridden(self, *DATA_LOADING)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        if not self.is_in_train or self._own_loader():
            return super().get_train_dataloader()
        # Cached features have their own loader; check the batch size before they are computed.
        check_full_batch(self.args, self.train_dataset)
        self._look_for_features()
        whole = self.args.candidate_parallel == CANDIDATES and self.args.world_size > 1
        if self._rows is None and not whole:
            return super().get_train_dataloader()
        return train_dataloader(self, self._rows, whole)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Collect the micro-batch; with the last one of a step, take the optimizer step and return its loss."""
        self._set_dropout()
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        if self._own_loader() and not self._looked_for_features:
            self._make_evaluation(batches[0])
        self._compare_loss(batches[0])
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(getattr(optimizer, "exchange", None), SharedData):
            optimizer.exchange.weight, optimizer.exchange.rows = self._weight_of(batches), list(map(rows_of, batches))
        # The step is taken here, as the training loop's optimizer.step() has no batches and comes after the loss.
        with self._scoring():
            loss = optimizer.step_ahead(*self._closure_and_evaluation(batches))
        return self.finite_loss(torch.tensor(loss, dtype=torch.float32, device=self.args.device))

    def _weight_of(self, batches: list[dict[str, torch.Tensor]]) -> float:
        """Weight of this process's mean loss in the mean over all processes."""
        labels = functools.partial(label_count, shifted=predicts_next_tokens(self.model))
        return float(sum(map(labels if self._by_model_loss() else rows_of, batches)))

    def _set_dropout(self) -> None:
        """Turn dropout off, or on with `search_dropout`.

        With an overridden `compute_loss`, `model.training` stays `True` on the model itself (not on its modules):
        trl's trainers name their metrics by it.
        """
        if self.model.training != self.args.search_dropout:
            self.model.train(self.args.search_dropout)
        if has_own_loss(self):
            self.model.training = True

    def _closure_and_evaluation(self, batches: list[dict[str, torch.Tensor]]) -> tuple:
        evaluation, reader = self._evaluation, self._reader
        if self._rows is not None and evaluation is not None:
            evaluation.load([(batch["features"], batch["labels"]) for batch in batches])
            return evaluation.closure, evaluation
        read = None if reader is None else functools.partial(reader.features_and_labels, batches)
        step = StepEvaluation(evaluation, self._full_objective(batches), read, self._all_in_head())
        return step.closure, step

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            yield

    def _full_objective(self, batches: list[dict[str, torch.Tensor]]) -> FullObjective:
        if self._by_model_loss():
            own = has_own_loss(self) or self.label_smoother is not None
            shifted = predicts_next_tokens(self.model)
            known = (language_losses, language_row_losses) if shifted and not own else ()
            full = model_loss(self._mean_loss, batches, shifted, *(functools.partial(f, self.model) for f in known))
            if self.args.search_method == ACTIVITY and full.row_passes is not None:
                differs = one_answer(self.accelerator, full.rows_differ()) if self._usual_loss is None else None
                self._usual_loss = self._usual_loss if differs is None else not differs
                full.row_passes = None if self._usual_loss is False else full.row_passes
        else:
            function, config = self.objective, self._inner().config
            if function is None:
                function = objective_of_arguments(self.args, config)
                check_labels(config, *labels_of(batches))
            full = objective_of_logits(self.model, function, batches, self._row_losses())
        full.value = self._same_draws(full.value)
        # The same dropout mask for all candidates, so they run one by one, not as rows of one forward pass.
        return FullObjective(full.value) if self.args.search_dropout else full

    def _mean_loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return loss_of_batch(self, self.model, batch)

    def _by_model_loss(self) -> bool:
        """Whether the loss has to come from `compute_loss`: overridden, or not that of a classifier."""
        own, inner = has_own_loss(self), self._inner()
        plain = type(inner).__name__.endswith(CLASSIFIERS) and self._usual_loss is not False
        # regression with a prompt compares the probabilities of two label words, not numbers
        plain = plain and not (is_prompt_model(inner) and inner.config.problem_type == REGRESSION)
        return self.objective is None and self.args.search_objective == LOSS and (own or not plain)

    def _compare_loss(self, batch: dict[str, torch.Tensor]) -> None:
        """Find out with the first batch whether a classifier has the usual loss, unless another one is used."""
        used = self.objective is None and self.args.search_objective == LOSS and self.label_smoother is None
        if used and self._usual_loss is None and not self._by_model_loss() and "labels" in batch:
            with self._scoring():
                own = not has_usual_loss(self.model, batch)
            self._usual_loss = not one_answer(self.accelerator, own)

    def _inner(self) -> nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def _objective_function(self) -> Objective:
        if (own := self.objective) is not None:
            return from_user_function(lambda *both: self._same_draws(functools.partial(own, *both))())
        return objective_of_arguments(self.args, self._inner().config)

    def _same_draws(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        """`evaluate` with the same random numbers for all candidates of a step, where the model or a loss draws."""
        return with_same_draws(evaluate, self.state.global_step + self.args.seed)

    # --- features ----------------------------------------------------------------------------------

    def _all_in_head(self) -> bool:
        return hasattr(self.model, "base_model_prefix") and set(self._searched) <= set(head_parameters(self.model))

    def _look_for_features(self, batch: dict[str, torch.Tensor] | None = None) -> None:
        """Find the head's inputs, and compute the features of all rows if batches contain exactly these rows.

        Args:
            batch: a training batch to find the head's inputs from; `None` = use rows of `train_dataset`.
        """
        if self._looked_for_features or (self.train_dataset is None and batch is None):
            return
        self._looked_for_features = True
        sample = first_batch(self) if batch is None else batch
        if sample is not None:
            self._compare_loss(sample)
        whole = self.args.search_dropout or self.args.search_method == ACTIVITY  # these run the whole model
        if whole or self._by_model_loss() or isinstance(self.model, PeftModel):
            return
        if not hasattr(self.model, "base_model_prefix") or not set(self._searched) & set(head_parameters(self.model)):
            return
        self._reader = find_reader(self, sample, as_in_model=not self._all_in_head())
        if batch is None and self._reader is not None and self._all_in_head() and returns_rows_unchanged(self):
            with self._scoring():
                self._rows = feature_rows(self, self._reader)

    def _make_evaluation(self, batch: dict[str, torch.Tensor] | None = None) -> None:
        self._look_for_features(batch)
        if self.args.search_selection == FISHER and (self._reader is None or not self._all_in_head()):
            raise InputError(
                "search_selection=fisher needs a search of head tensors only, with a head that reads one vector per "
                "row; pass search_selection=random"
            )
        if self._reader is None:
            return
        head = head_parameters(self.model)
        names = {id(p): name for name, p in self.searched.items() if name in head}
        fisher, objective = self.args.search_fisher or DIVERGENCE, self._objective_function()
        self._evaluation = HeadEvaluation(self._reader, names, objective, fisher, self._row_losses())

    def _row_losses(self) -> Objective | None:
        """The usual loss of each row; `None` with another objective."""
        if self.objective is not None or self.args.search_objective != LOSS:
            return None
        problem, smoothing = self._inner().config.problem_type, self.args.label_smoothing_factor
        return functools.partial(row_losses, problem_type=problem, smoothing=smoothing)

    # --- processes ---------------------------------------------------------------------------------

    def _share_work(self) -> None:
        if self.args.world_size == 1:
            return
        accelerator = self.accelerator

        def total(values: torch.Tensor) -> torch.Tensor:
            return accelerator.reduce(values.to(accelerator.device), reduction="sum").to(values.device)

        candidates = self.args.candidate_parallel == CANDIDATES
        rank = self.args.process_index, self.args.world_size
        self.optimizer.exchange = SharedCandidates(total, *rank) if candidates else SharedData(total, 1.0, *rank)

    # --- what is saved and logged --------------------------------------------------------------------

    own_files = shared_files = (TRAJECTORY,)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.args.search_trajectory and self.args.should_save and optimizer is not None:
            save_trajectory(optimizer, self.model, output_dir or self.args.output_dir)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        rewind_to_best(getattr(self.optimizer, "optimizer", self.optimizer), self.state)

    @classmethod
    def delta_code(cls, run: FinishedRun) -> str | None:
        """Python code that repeats the search from its trajectory; `None` if the initial model cannot be rebuilt."""
        arguments = run.record.get("arguments") or {}
        again = not (arguments.get("from_linearhead") or arguments.get("search_peft"))
        code = delta_code(run, TRAJECTORY, "apply_trajectory") if again else None
        seed = arguments.get("seed", 42)
        start = f"from transformers import set_seed\n\nset_seed({seed})  # initializes the head\n"
        return None if code is None else start + code

    def trained_weights(self) -> list[TrainedWeight]:
        """List the searched tensors; gradients and moments where the search keeps buffers of their size."""
        searched, args = self.searched.items(), self.args
        return [TrainedWeight(name, tuple(p.shape), p.numel(), *buffers_of(args, p)) for name, p in searched]

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Run without gradients: a search stores nothing for a backward pass."""
        with torch.no_grad():
            yield

    def log(self, logs: dict[str, float], *positional, **kwargs) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if "learning_rate" in logs and hasattr(optimizer, "evaluations"):
            logs = {**logs, "evaluations": optimizer.evaluations, "rejected_candidates": optimizer.rejected}
        super().log(logs, *positional, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0 if self._rows is not None else super().floating_point_ops(inputs)  # features have no tokens

    def _get_grad_norm(self, model, grad_norm=None) -> None:
        return None  # a search has no gradient
