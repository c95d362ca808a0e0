"""`FisherTrainer`: a Trainer that selects each layer's adapter, or the entries that train, by Fisher information."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_ft_ext.adapters.layer_prefix.model import keep_projection
from hf_ft_ext.entries.delta import DELTA_FILE, read_indices, save_entries
from hf_ft_ext.entries.layer import attach_entries, entries_of
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.arguments import (
    HEAD,
    MASK,
    PLAN_SETTINGS,
    RANDOM,
    SCORED,
    SELECT,
    SETTLED,
    FisherTrainingArguments,
)
from hf_ft_ext.fisher.candidates import as_input_error, fitting_candidates, layers_of, make_candidates
from hf_ft_ext.fisher.criteria import DEFAULT as DEFAULT_CRITERION
from hf_ft_ext.fisher.losses import ModelLoss
from hf_ft_ext.fisher.mask import choose_entries
from hf_ft_ext.fisher.pictures import PICTURE_FILE, draw_if_possible
from hf_ft_ext.fisher.plan import PLAN_FILE, AdapterPlan, model_fingerprint
from hf_ft_ext.fisher.prepass import prepass_batches
from hf_ft_ext.fisher.rates import split_by_rate
from hf_ft_ext.fisher.selection import added_parameters, random_choice, select_adapters, settings_of
from hf_ft_ext.models import seeded_init
from hf_ft_ext.models.peft import (
    check_heads,
    freeze_others,
    saved_for_statistics,
    task_type_of,
    trained_in_full,
)
from hf_ft_ext.per_example.state import forget_preparation
from hf_ft_ext.training.checks import refuse_label_names
from hf_ft_ext.training.finite import StopAtNaN
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.method_trainer import MethodTrainer, has_own_loss, loss_of_batch
from hf_ft_ext.training.runs.plan import TrainedWeight
from hf_ft_ext.training.runs.resources import preparation
from hf_ft_ext.training.saved.saving import checkpoint_to_resume
from hf_ft_ext.training.sharing import FinishedRun, delta_code
from hf_ft_ext.training.weights.precision import train_in_float32
from hf_ft_ext.training.weights.quantized import move, refuse_quantized
from hf_ft_ext.training.weights.sharding import refuse_sharding

logger = logging.getLogger(__name__)


class FisherTrainer(StopAtNaN, MethodTrainer):
    """`transformers.Trainer` that adapts the model by a Fisher pre-pass before training.

    The method is FishPAL's (thesis, lucalila/fishpal): scores choose the adapter of each layer. The default score,
    `agreement`, is this package's; the score of the thesis is `fisher_criterion="thesis"`. The model can be any that
    returns a loss and fits the adapters: a sequence classifier, or a causal language model with labels for its tokens.

    `train()` first computes gradients of some training examples, unless a plan, `fisher_mode` or the resumed
    checkpoint already determines what trains. Then it trains a model with only the chosen adapters, or the chosen
    entries. The classifier trains in full. `save_model` and checkpoints write one PEFT adapter that
    `PeftModel.from_pretrained` loads after `import hf_ft_ext`; with a mask, the plain model and a small delta.

    Args:
        model, args, and all other arguments: as for `Trainer`. Other `TrainingArguments` are completed with the
            defaults of `FisherTrainingArguments`.

    Attributes:
        plan: the adapter of each layer; `None` before `prepare()`, and with a mask.

    Raises:
        InputError: bad input, a plan that does not fit, or an option that this method does not support.

    Source: FishPAL (thesis, lucalila/fishpal); FISH masks: Sung et al. 2021, arXiv 2111.09839.
    """

    own_files: ClassVar[tuple[str, ...]] = (PLAN_FILE, PICTURE_FILE, DELTA_FILE)
    shared_files: ClassVar[tuple[str, ...]] = own_files
    arguments_class = FisherTrainingArguments
    no_optimizer = "adapts the model before it makes the optimizer, so an optimizer made earlier would train nothing"

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, *positional, **kwargs):
        self.plan: AdapterPlan | None = None
        self._resumed_from: str | None = None
        self._is_prepared: bool | None = None  # None within __init__, where the data is not set yet
        self._planned_with: tuple | None = None
        self._drawn: tuple[str, str] | None = None
        super().__init__(model, args, *positional, **kwargs)
        self._is_prepared = False
        args = self.args
        if isinstance(args.resume_from_checkpoint, str) and os.path.isdir(args.resume_from_checkpoint):
            self._resumed_from = args.resume_from_checkpoint  # set by the launcher
            self.prepare()

    def check_arguments(self) -> None:
        args = self.args
        refuse_sharding(args, "the pre-pass")
        super().check_arguments()
        self._read_plan_settings()
        if unused := sorted(set(args.fisher_candidate_settings or ()) - set(self._candidates)):
            logger.warning(
                "fisher_candidate_settings of %s are not used: the candidates are %s.",
                ", ".join(unused),
                ", ".join(self._candidates),
            )
        if self._needs_prepass():
            refuse_label_names(args)

    def _read_plan_settings(self) -> None:
        """Read the given plan, the candidates and the rates from the current arguments."""
        args = self.args
        self._given_plan = None if args.adapter_plan is None else AdapterPlan.load(args.adapter_plan)
        self._rates: dict[str, float] = args.fisher_learning_rates or {}
        self._candidates: dict[str, Any] = {}
        if args.fisher_mode != MASK and self._given_plan is None:
            self._candidates = make_candidates(args.fisher_candidates, args.fisher_candidate_settings)
        self._check_rates()

    def _needs_prepass(self) -> bool:
        """Whether a pre-pass computes gradients of training examples, which needs labels."""
        if self.args.fisher_mode == MASK:
            return self.args.mask in SCORED
        return self.args.fisher_mode == SELECT and self._given_plan is None

    def prepare_model(self, model: nn.Module) -> nn.Module:
        if self.args.fisher_mode == MASK:
            refuse_quantized(model, "a mask trains entries of")
        if getattr(model, "base_model_prefix", None) is None:
            raise InputError(
                f"{type(model).__name__} is not a transformers model, so its head is unknown; use the parts in a loop "
                "of your own: select_adapters(model, batches, loss=...) and peft's get_peft_model, or "
                "fisher_information(model, batches, loss=...) and attach_entries"
            )
        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise InputError(
                "the model carries PEFT adapters already; pass the base model, or merge the adapters first"
            )
        if entries_of(model):
            raise InputError("the model already trains entries of its weights; call merge_entries(model) first")
        declare_mean_loss(model)
        if self._given_plan is not None:
            self._given_plan.check_model(model)
        return model

    # --- adapting the model -----------------------------------------------------------------------

    def prepare(self) -> None:
        """Run the pre-pass and add the chosen adapters or entries. Later calls do nothing; `train()` calls it.

        Raises:
            InputError: as for the class.
        """
        if self._is_prepared:
            return
        forget_preparation(self.model)  # by an evaluation of the base model
        with preparation(self):
            self.model = self.model_wrapped = self._adapted(self.model)
        self._is_prepared = True
        self._signature_columns = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        if self._is_prepared is None:  # within __init__
            return model
        if self.args.adapter_plan is not None or self._planned_with != self._plan_settings(model):
            self.plan = None  # it was made with other settings, such as those of the previous trial
        with preparation(self):
            model = self._adapted(move(model, self.args.device))
        self._is_prepared = True
        self._write_plan()
        return model

    def _adapted(self, model: nn.Module) -> nn.Module:
        if self.args.fisher_mode == MASK:
            return self._with_entries(model)
        if self.plan is None:
            self._planned_with = self._plan_settings(model)
            self.plan = self._make_plan(model)
            logger.info("%s", self.plan.table())
        with as_input_error(sorted(self.plan.candidates)), seeded_init(self.args.seed):
            heads = trained_in_full(model)
            check_heads(model, heads)
            saved = [*heads, *saved_for_statistics(model, heads)]
            config = self.plan.config(saved, task_type=task_type_of(model))
            return freeze_others(train_in_float32(get_peft_model(model, config)), heads)

    def _plan_settings(self, model: nn.Module) -> tuple:
        """Everything that a plan depends on; if it changes, a new plan is made."""
        settings = {name: getattr(self.args, name) for name in PLAN_SETTINGS}
        return (
            json.dumps(settings, sort_keys=True, default=str),
            id(self.train_dataset),
            self._resumed_from,
            model_fingerprint(model)["weights"],
        )

    def _make_plan(self, model: nn.Module) -> AdapterPlan:
        self._read_plan_settings()
        args = self.args
        plan = self._given_plan
        if self._resumed_from is not None:
            plan = _plan_of_checkpoint(self._resumed_from)
        if plan is not None:
            plan.check_model(model)
            if not plan.same_weights(model):
                logger.warning("The adapter plan was made for other weights of the same shape; it is used anyway.")
            return plan
        if args.fisher_mode == SELECT:
            batches = prepass_batches(self, args.examples, args.fisher_batch_size)
            return select_adapters(
                model, batches, self._candidates, args.fisher_criterion or DEFAULT_CRITERION, args.fisher_budget,
                labels=args.fisher_labels, power=args.fisher_power, loss=self._user_loss(), seed=args.seed,
                progress=not args.disable_tqdm,
            )  # fmt: skip
        layers = layers_of(model)
        candidates = fitting_candidates(model, self._candidates, layers, args.seed)
        names = list(candidates)
        parameters = added_parameters(model, candidates, layers, args.seed)
        choice: dict[int, str | None] = dict.fromkeys(layers, names[0])
        if args.fisher_mode == RANDOM:
            choice = random_choice(layers, names, parameters, args.fisher_budget, args.seed)
        return AdapterPlan(
            choice,
            {name: settings_of(config) for name, config in candidates.items()},
            parameters=parameters,
            settings={"mode": args.fisher_mode, "budget": args.fisher_budget, "seed": args.seed},
            model=model_fingerprint(model),
        )

    def _with_entries(self, model: nn.Module) -> nn.Module:
        args = self.args
        if self._resumed_from is not None:
            chosen = read_indices(self._resumed_from)
        else:
            batches: Sequence[dict[str, torch.Tensor]] = ()
            if args.mask in SCORED:
                batches = prepass_batches(self, args.examples, args.fisher_batch_size)
            chosen = choose_entries(
                model, args.mask, args.keep_ratio, batches, args.seed, not args.disable_tqdm, self._user_loss()
            )
        heads = trained_in_full(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(f"{head}.") for head in heads))
        attach_entries(model, chosen)
        return model

    def _user_loss(self) -> ModelLoss | None:
        """The user's loss, if `compute_loss` or `compute_loss_func` defines one; the pre-pass then uses it too."""
        return ModelLoss(lambda model, batch: loss_of_batch(self, model, batch)) if has_own_loss(self) else None

    def _check_rates(self) -> None:
        known = set(self._given_plan.candidates if self._given_plan is not None else self._candidates) | {HEAD}
        if unknown := sorted(set(self._rates) - known):
            raise InputError(
                f"fisher_learning_rates names {unknown[0]!r}; the candidates are: {', '.join(sorted(known))}"
            )

    # --- training ---------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **kwargs) -> TrainOutput:
        last = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if not self._is_prepared or self.model_init is not None:
            self._resumed_from = last
        if self.model_init is None:
            self.prepare()
            self._write_plan()
        return super().train(resume_from_checkpoint, *positional, **kwargs)

    def _write_plan(self) -> None:
        if self.plan is not None and self.args.should_save:
            self._save_plan(self.plan, self.args.output_dir)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As `Trainer`'s, plus projections of bottlenecks, which `Trainer` would skip where they wrap a LayerNorm."""
        names = super().get_decay_parameter_names(model)
        known = set(names)
        projections = (
            name for name, _ in model.named_parameters()
            if name.endswith(".weight") and any(f".{part}." in name for part in ("bottleneck_down", "bottleneck_up"))
        )  # fmt: skip
        return [*names, *(name for name in projections if name not in known)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, with a parameter group for each learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self._rates:
            split_by_rate(optimizer, self.model, self.plan, self._rates)
        return optimizer

    def settled_arguments(self, checkpoint: str) -> tuple[str, ...]:
        return (*super().settled_arguments(checkpoint), *SETTLED)

    # --- files ------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained parameters; checkpoints also hold the projections of prefixes, which resuming needs."""
        with keep_projection(self.model) if _internal_call else nullcontext():
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            if self.plan is not None:
                self._save_plan(self.plan, folder, picture=not _internal_call)
            if self.args.fisher_mode == MASK and self._is_prepared:
                size = save_entries(self.model, folder)
                logger.info("saved the trained entries: %.2f MB in %s", size / 1e6, os.path.join(folder, DELTA_FILE))

    def _save_plan(self, plan: AdapterPlan, folder: str, picture: bool = True) -> None:
        os.makedirs(folder, exist_ok=True)
        plan.save(folder)
        drawn = os.path.abspath(folder), plan.table()
        if picture and plan.scores and drawn != self._drawn:  # the start of a run and its end have one folder
            draw_if_possible(plan, folder)
            self._drawn = drawn

    # --- summaries --------------------------------------------------------------------------------

    @classmethod
    def delta_code(cls, run: FinishedRun) -> str | None:
        """Return Python code that applies the entries to the base model."""
        return delta_code(run, DELTA_FILE, "load_entries")

    def trained_weights(self) -> list[TrainedWeight]:
        """The weights that train: adapters and classifier, or entries and classifier."""
        self.prepare()
        weights = []
        inside = {f"{name}_entries.values": (name, entries) for name, entries in entries_of(self.model).items()}
        for name, p in self.model.named_parameters():
            if p.requires_grad and name in inside:
                weight, entries = inside[name]
                size = entries.values.numel() * entries.values.element_size()
                shape = tuple(self.model.get_buffer(weight).shape)
                weights.append(TrainedWeight(weight, shape, entries.values.numel(), size, 2 * size))
            elif p.requires_grad:
                weights.append(TrainedWeight.dense(name, p))
        return weights

    def model_weights(self) -> list[torch.Tensor]:
        """The weights of the model: with a mask they are buffers, and the chosen entries are not counted again."""
        chosen = entries_of(self.model)
        values = {id(entries.values) for entries in chosen.values()}
        weights = [self.model.get_buffer(name) for name in chosen]
        return [*(p for p in self.model.parameters() if id(p) not in values), *weights]

    @contextmanager
    def planning(self) -> Iterator[None]:
        self.prepare()
        yield


def _plan_of_checkpoint(folder: str) -> AdapterPlan:
    if not os.path.isfile(os.path.join(folder, PLAN_FILE)):
        raise InputError(
            f"checkpoint {folder!r} has no {PLAN_FILE}, so this method did not write it with adapters; resume with "
            "the method that wrote it"
        )
    return AdapterPlan.load(folder)
