"""`SparseTrainer`: a Trainer that fine-tunes MLP layers by SparseGrad and all else by AdamW."""

import os

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames

from hf_ft_ext.errors import InputError
from hf_ft_ext.sparse.arguments import SparseTrainingArguments
from hf_ft_ext.sparse.convert import convert_to_sparse, sparse_layers
from hf_ft_ext.sparse.optimizer import SparseAdamW
from hf_ft_ext.sparse.prepass import compute_bases
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.plan import TrainedWeight
from hf_ft_ext.training.resources import preparation

_OPTIMIZER_STATE = "optimizer.pt"  # transformers' name for it


class SparseTrainer(Trainer):
    """`transformers.Trainer` with SparseGrad on the MLP layers.

    The model is converted in place when the trainer is made. `train()` first takes the gradients of
    `sparse_basis_steps` batches and computes a basis per kind of layer; a resumed run loads it instead.
    `save_model` and checkpoints leave an ordinary model that `from_pretrained` loads.

    Args:
        model, args, and all else: as for `Trainer`. Plain `TrainingArguments` are completed with the
            defaults of `SparseTrainingArguments`.

    Raises:
        InputError: nothing to convert, or an option that this method cannot honour.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, *positional, **kwargs):
        args = SparseTrainingArguments.complete(args)
        _refuse(args, kwargs)
        self._resumed_from: str | None = None
        if model is not None:
            self._convert(model, args)
        super().__init__(model, args, *positional, **kwargs)

    @staticmethod
    def _convert(model: nn.Module, args: SparseTrainingArguments) -> None:
        if hasattr(model, "peft_config"):
            raise InputError("the model carries PEFT adapters; pass the base model, or merge the adapters first")
        if not sparse_layers(model):
            convert_to_sparse(model, args.sparse_n_params, args.sparse_density, args.sparse_target_modules)
        declare_mean_loss(model)

    def call_model_init(self, trial=None) -> nn.Module:
        model = super().call_model_init(trial)
        self._convert(model, self.args)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **kwargs):
        last = resume_from_checkpoint
        if isinstance(last, bool):
            last = get_last_checkpoint(self.args.output_dir) if last else None
        self._resumed_from = last
        return super().train(resume_from_checkpoint, *positional, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`SparseAdamW` over all trained parameters, after the pre-pass that it needs."""
        if self.optimizer is None:
            _, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            layers = sparse_layers(self.model)
            if not self._basis_is_saved():
                with preparation(self):
                    compute_bases(self, layers, self.args.sparse_basis_steps)
            self.optimizer_cls_and_kwargs = (SparseAdamW, {**kwargs, "layers": layers.values()})
        return super().create_optimizer(model)

    def _basis_is_saved(self) -> bool:
        return self._resumed_from is not None and os.path.isfile(os.path.join(self._resumed_from, _OPTIMIZER_STATE))

    def trained_weights(self) -> list[TrainedWeight]:
        """What training changes: per converted weight its updated entries, all other parameters in full."""
        layers = {f"{name}.weight": layer for name, layer in sparse_layers(self.model).items()}
        rows, kinds = [], set()
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if (layer := layers.get(name)) is None:
                rows.append(TrainedWeight.dense(name, parameter))
                continue
            # Per entry: index, count (int32) and two moments; once per kind of layer: the factors.
            state = layer.n_params * 4 * 4
            if layer.kind not in kinds:
                state += (layer.out_features**2 + layer.in_features**2) * 4
                kinds.add(layer.kind)
            gradient = parameter.numel() * parameter.element_size()
            rows.append(TrainedWeight(name, tuple(parameter.shape), layer.n_params, gradient, state))
        return rows


def _refuse(args: SparseTrainingArguments, kwargs: dict) -> None:
    """Options that cannot be honoured are errors, not silence."""
    if args.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        raise InputError(f"optim={args.optim.value!r} has no sparse form; use adamw_torch or adamw_torch_fused")
    if kwargs.get("optimizers", (None, None))[0] is not None or kwargs.get("optimizer_cls_and_kwargs") is not None:
        raise InputError("SparseTrainer makes its own optimizer (SparseAdamW); leave `optimizers` out")
    if args.fsdp or args.deepspeed:
        raise InputError("sparse training needs whole weights on every process; run it without fsdp and deepspeed")
