"""`SparseTrainer`: a Trainer that fine-tunes MLP layers with SparseGrad."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames

from hf_ft_ext.adapters.sparse_grad.model import layers_by_columns
from hf_ft_ext.errors import InputError
from hf_ft_ext.sparse.adapter import (
    INITS,
    add_sparse_grad,
    choose_columns,
    columns_of,
    has_sparse_grad,
    warn_of_untrained,
)
from hf_ft_ext.sparse.arguments import DENSE, DYNAMIC, HOSVD, NONE, STATIC, STRUCTURED, SparseTrainingArguments
from hf_ft_ext.sparse.convert import convert_to_sparse, freeze_rest, kind_of, sparse_layers
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.optimizer import SparseAdamW, restore_supports
from hf_ft_ext.sparse.prepare import prepare_layers, refresh_supports
from hf_ft_ext.sparse.saved.delta import DELTA_FILE, save_delta
from hf_ft_ext.sparse.sparsity.watch import SparsityWatch
from hf_ft_ext.training.finite import StopAtNaN
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.method_trainer import MethodTrainer
from hf_ft_ext.training.runs.plan import TrainedWeight
from hf_ft_ext.training.runs.resources import preparation
from hf_ft_ext.training.saved.saving import checkpoint_to_resume
from hf_ft_ext.training.sharing import FinishedRun, delta_code
from hf_ft_ext.training.weights.quantized import refuse_quantized
from hf_ft_ext.training.weights.sharding import DEEPSPEED, refuse_sharding, sharding

logger = logging.getLogger(__name__)

_OPTIMIZER_STATE = "optimizer.pt"  # transformers' name for it
_OF_PREPASS = (
    "sparse_basis", "sparse_basis_orientation", "sparse_basis_scope", "sparse_basis_steps", "sparse_skip_leading",
)  # fmt: skip


class SparseTrainer(StopAtNaN, MethodTrainer):
    """`transformers.Trainer` with SparseGrad on the MLP layers.

    `train()` first computes the bases from the gradients of `sparse_basis_steps` batches; a resumed run loads them
    instead.

    With structured support the model gets a `SparseGradConfig` adapter. The base weights do not change and may be
    quantized, any optimizer of `optim` works, and `save_model` and checkpoints write a PEFT adapter. Otherwise, and
    with settings that the adapter does not support (`SparseTrainingArguments.setting_without_adapter`), the model is
    converted in place and saved as an ordinary model that `from_pretrained` loads.

    Args:
        model, args and all others: as for `Trainer`. Other `TrainingArguments` are completed with the defaults of
            `SparseTrainingArguments`.

    Raises:
        InputError: no layer to convert, or an option that this method does not support.

    Source: Chekalina et al., EMNLP 2024, arXiv 2410.07383 (`sparse_support="dynamic"`); the fixed block of structured
    support is this package's.
    """

    own_files: ClassVar[tuple[str, ...]] = (DELTA_FILE,)
    shared_files: ClassVar[tuple[str, ...]] = (DELTA_FILE,)
    arguments_class = SparseTrainingArguments
    no_optimizer = "makes its own optimizer (SparseAdamW)"
    no_optimizer_class = True

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, *positional, **kwargs):
        self._resumed_from: str | None = None
        super().__init__(model, args, *positional, **kwargs)

    def check_arguments(self) -> None:
        args = self.args
        if not args.as_adapter or sharding(args) == DEEPSPEED:
            refuse_sharding(args, "sparse training")
        super().check_arguments()
        if not args.as_adapter:
            self._check_optim()

    def _check_optim(self) -> None:
        if self.args.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise InputError(
                f"optim={self.args.optim.value!r} has no sparse form for converted layers; use adamw_torch or "
                "adamw_torch_fused, or structured support, whose adapter works with any optimizer"
            )

    def _check_optimizers(self, optimizer: Any, scheduler: Any, factory: Any) -> None:
        # An adapter works with any optimizer class. An existing optimizer object lacks the adapter's parameters.
        super()._check_optimizers(optimizer, scheduler, None if self.args.as_adapter else factory)

    def apply_arguments(self) -> None:
        super().apply_arguments()
        args = self.args
        self.remove_callback(SparsityWatch)
        self.remove_callback(_RefreshSupports)
        if args.sparse_show_steps:
            self.add_callback(SparsityWatch(self, args.sparse_show_steps, args.basis_steps))
        if args.sparse_basis_refresh_steps and args.sparse_support != DYNAMIC:
            self.add_callback(_RefreshSupports(self))

    def prepare_model(self, model: nn.Module) -> nn.Module:
        args = self.args
        if has_sparse_grad(model):
            _check_adapter_arguments(args, model)
            declare_mean_loss(model)
            return model
        if args.as_adapter and not sparse_layers(model):
            declare_mean_loss(model)
            return add_sparse_grad(model, args)
        self._check_optim()
        refuse_quantized(model, f"sparse training with {args.setting_without_adapter} changes")
        if hasattr(model, "peft_config"):
            raise InputError("the model carries PEFT adapters; pass the base model, or merge the adapters first")
        if args.sparse_support == STRUCTURED and not sparse_layers(model):
            logger.info("%s converts layers in place: the whole model is saved.", args.setting_without_adapter)
        if converted := sparse_layers(model):
            _check_converted(converted, args)
        else:
            convert_to_sparse(
                model,
                args.sparse_n_params,
                args.sparse_density,
                args.sparse_target_modules,
                args.sparse_support,
                args.sparse_basis,
                args.basis_scope,
                args.sparse_threshold,
            )
        freeze_rest(model, args.train_rest)
        declare_mean_loss(model)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **kwargs) -> TrainOutput:
        self._resumed_from = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        output = super().train(resume_from_checkpoint, *positional, **kwargs)
        if has_sparse_grad(self.model):
            warn_of_untrained(self.model)
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Run the pre-pass, then create the optimizer of all trained parameters (converted layers: `SparseAdamW`)."""
        if has_sparse_grad(self.model):
            if not all(columns.ready for columns in columns_of(self.model)):
                with preparation(self):
                    choose_columns(self)
            return super().create_optimizer(model)
        if self.optimizer is None:
            _, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            layers = sparse_layers(self.model)
            if not self._preparation_is_saved():
                with preparation(self):
                    prepare_layers(self, layers, self.args)
            kwargs |= {"layers": layers.values(), "dense_moments": self.args.sparse_moments == DENSE}
            if self.args.sparse_support == DYNAMIC:
                kwargs |= {"refresh_steps": self.args.sparse_basis_refresh_steps}
                kwargs |= {"refresh_gradients": self.args.basis_steps}
            self.optimizer_cls_and_kwargs: tuple[type[SparseAdamW], dict[str, Any]] | None = (SparseAdamW, kwargs)
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None  # the next trial of a search has other layers

    def settled_arguments(self, checkpoint: str) -> tuple[str, ...]:
        settled = super().settled_arguments(checkpoint)
        saved = has_sparse_grad(self.model) or self._preparation_is_saved()
        if not saved or self.args.sparse_basis_refresh_steps:  # a later pre-pass reads these arguments again
            return settled
        return (*settled, *_OF_PREPASS)

    def _preparation_is_saved(self) -> bool:
        return self._resumed_from is not None and os.path.isfile(os.path.join(self._resumed_from, _OPTIMIZER_STATE))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        layers = [layer for layer in sparse_layers(self.model).values() if layer.values is not None]
        path = os.path.join(self.state.best_model_checkpoint, _OPTIMIZER_STATE)
        if layers and os.path.isfile(path):
            # The best model's weights are loaded; its delta needs the values and supports of the same step.
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            restore_supports(layers, state["supports"])
        elif any(layer.earlier for layer in layers):
            logger.warning(
                "%s holds no optimizer state (save_only_model), so the best model's delta is unknown after refreshes "
                "of the basis; save_delta and export_lora use the supports of the last step.",
                self.state.best_model_checkpoint,
            )

    def save_for_sharing(self, folder: str) -> None:
        """Write the delta beside the model if the support is fixed: a small file that completes the base model."""
        if self.args.sparse_support != DYNAMIC and not has_sparse_grad(self.model):
            save_delta(self.model, folder)

    @classmethod
    def delta_code(cls, run: FinishedRun) -> str | None:
        """Return Python code that applies the delta to the base model."""
        return delta_code(run, DELTA_FILE, "load_delta")

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Set placeholders of the right size for supports that are not chosen yet, to measure memory."""
        if has_sparse_grad(self.model):
            unready = [columns for columns in columns_of(self.model) if not columns.ready]
            for columns in unready:
                columns.ready = True
            try:
                yield
            finally:
                for columns in unready:
                    columns.ready = False
            return
        waiting = [
            layer for layer in sparse_layers(self.model).values() if layer.values is not None and layer.support is None
        ]
        for layer in waiting:
            layer.support = FixedSupport.placeholder(layer.n_params, layer.block, layer.weight, layer.basis.identity)
        try:
            yield
        finally:
            for layer in waiting:
                layer.support = None

    def model_weights(self) -> list[torch.Tensor]:
        """Return the weights of the model, without the values that a fixed support keeps beside its weight."""
        values = {id(layer.values) for layer in sparse_layers(self.model).values()}
        return [p for p in self.model.parameters() if id(p) not in values]

    def trained_weights(self) -> list[TrainedWeight]:
        """Return what training changes: updated entries of converted weights, and all other trained parameters."""
        if has_sparse_grad(self.model):
            return self._adapter_weights()
        layers = sparse_layers(self.model)
        rows, kinds = [], set()
        for name, parameter in self.model.named_parameters():
            owner, _, part = name.rpartition(".")
            layer = layers.get(owner) if part in ("weight", "values") else None
            if not parameter.requires_grad:
                continue
            if layer is None:
                rows.append(TrainedWeight.dense(name, parameter))
                continue
            size = parameter.element_size()
            # Two moments per entry; with dynamic support also index and step count (int32); factors once per kind.
            dynamic, shape = layer.values is None, (layer.out_features, layer.in_features)
            state = layer.n_params * (2 * size + 8 if dynamic else 2 * size)
            if self.args.sparse_moments == DENSE:
                state = 2 * layer.weight.numel() * size
            if not layer.basis.identity and layer.kind not in kinds:
                r, c = layer.block or shape
                state += (layer.out_features * r + layer.in_features * c) * size
                if dynamic and self.args.sparse_basis_refresh_steps:  # the running sums
                    state += (layer.out_features**2 + layer.in_features**2) * size
                kinds.add(layer.kind)
            rows.append(TrainedWeight(f"{owner}.weight", shape, layer.n_params, parameter.numel() * size, state))
        return rows

    def _adapter_weights(self) -> list[TrainedWeight]:
        rows, counted = [], set()
        columns = {
            f"{name}.sparse_grad_values.{self.model.active_adapter}": columns
            for columns, layers in layers_by_columns(self.model, self.model.active_adapter)
            for name, _ in layers
        }
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            row = TrainedWeight.dense(name, parameter)
            if name in columns and id(columns[name]) not in counted:  # shared columns count once
                counted.add(id(columns[name]))
                size = sum(buffer.numel() * buffer.element_size() for buffer in columns[name].buffers())
                row = replace(row, state_bytes=row.state_bytes + size)
            rows.append(row)
        return rows


class _RefreshSupports(TrainerCallback):
    """Chooses new fixed supports every `sparse_basis_refresh_steps` steps."""

    def __init__(self, trainer: SparseTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step % args.sparse_basis_refresh_steps == 0 and step < state.max_steps:
            trainer = self.trainer
            refresh_supports(trainer, sparse_layers(trainer.model), args, trainer.optimizer)


def _check_adapter_arguments(args: SparseTrainingArguments, model: PeftModel) -> None:
    """Refuse arguments that the model's own SparseGrad adapter has already set."""
    if not args.as_adapter:
        raise InputError(
            f"the model has a SparseGrad adapter, and {args.setting_without_adapter} is for the plain model; leave it "
            "out"
        )
    fixed = ("sparse_density", "sparse_n_params", "sparse_target_modules", "sparse_basis_scope", "sparse_train_rest")
    given = [name for name in fixed if getattr(args, name) is not None]
    if args.sparse_basis != HOSVD and INITS[args.sparse_basis] != model.active_peft_config.init:
        given.append(f"sparse_basis (init={model.active_peft_config.init!r}, not {args.sparse_basis})")
    if args.sparse_basis_steps is not None and all(columns.ready for columns in columns_of(model)):
        given.append(f"the basis, so that sparse_basis_steps={args.sparse_basis_steps} would have no effect")
    if given:
        raise InputError(
            f"the model has a SparseGrad adapter, which already fixes {given[0]}; leave it out, or pass the base model"
        )


def _check_converted(layers: dict[str, SparseGradLinear], args: SparseTrainingArguments) -> None:
    """Check that a model converted by the user agrees with the arguments."""
    fixed = ("sparse_density", "sparse_n_params", "sparse_target_modules", "sparse_threshold")
    if given := [name for name in fixed if getattr(args, name) is not None]:
        raise InputError(
            f"the model was converted already, which already fixes {given[0]}; leave it out, or pass the plain model"
        )
    for name, layer in layers.items():
        support = DYNAMIC if layer.values is None else STATIC if layer.block is None else STRUCTURED
        if support != args.sparse_support or layer.basis.identity != (args.sparse_basis == NONE):
            basis = "without a basis" if layer.basis.identity else "for a basis"
            raise InputError(
                f"{name} was converted with {support} support and {basis}, but the arguments say "
                f"sparse_support={args.sparse_support}, sparse_basis={args.sparse_basis}; pass the same to both"
            )
        if args.sparse_basis_scope is not None and layer.kind != kind_of(name, layer, args.sparse_basis_scope):
            raise InputError(
                f"{name} was converted with another basis_scope than sparse_basis_scope={args.sparse_basis_scope}; "
                "pass the same to both, or leave sparse_basis_scope out"
            )
