"""Callbacks for every trainer of the launcher, and checks that need the constructed trainer."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback

from hf_ft_ext.arguments import Gradients, MethodTrainingArguments, RunArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.hub.push import is_hub_error, reason
from hf_ft_ext.launch.folder import not_writable
from hf_ft_ext.launch.sharing import prepare_branch
from hf_ft_ext.launch.validation import check_checkpoint, check_optimizer
from hf_ft_ext.methods import find_method
from hf_ft_ext.offload import has_offloaded
from hf_ft_ext.training.checks import check_full_batch
from hf_ft_ext.training.method_trainer import MethodTrainer
from hf_ft_ext.training.runs.plan import TrainedWeight
from hf_ft_ext.training.runs.resources import ResourceMonitor
from hf_ft_ext.training.saved.checkpoints import WriteChecksums
from hf_ft_ext.training.weights.placement import check_placement


def run_callbacks(
    run_args: RunArguments,
    args: MethodTrainingArguments,
    callbacks: Sequence[TrainerCallback],
    savers: Sequence[TrainerCallback] = (),
) -> list[TrainerCallback]:
    """Callbacks of a run: resource monitor, early stopping if asked for, checksums of checkpoints, then `callbacks`.

    Args:
        savers: callbacks that write files into a checkpoint; they run before its checksums are computed.
    """
    patience = run_args.early_stopping_patience
    early_stopping = [EarlyStopping(patience)] if patience and args.do_train else []
    return [ResourceMonitor(), *savers, *early_stopping, WriteChecksums(run_args.method), *callbacks]


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping; a resumed run goes on with the count of evaluations that its checkpoint holds.

    transformers restores the count only together with the patience of the earlier run.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step > 0:  # resumed
            saved = state.stateful_callbacks.get(type(self).__name__, {})
            self.early_stopping_patience_counter = saved.get("attributes", {}).get(
                "early_stopping_patience_counter", 0
            )


class TrainedAdapterTrainer(MethodTrainer):
    """Mixin before a method's trainer: the model has a trained adapter, and is evaluated as it is."""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model

    def trained_weights(self) -> list[TrainedWeight]:
        return []

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        yield


def trainer_class_for(method: str, model: nn.Module, args: MethodTrainingArguments) -> Any:
    """The trainer class of a method; for a model with a trained adapter one that leaves the model as it is.

    Raises:
        InputError: the method predicts with more than a model, so an adapter is not enough.
    """
    kind: Any = find_method(method).trainer_class()
    if args.do_train or not isinstance(model, PeftModel):
        return kind
    if hasattr(kind, "holds_result"):
        raise InputError(
            f"--method {method} predicts with the solution that it saved, and the folder of --model_name_or_path "
            "holds a trained adapter without one; pass the method that trained the adapter, such as --method lora"
        )
    return type(f"{kind.__name__}OfTrainedAdapter", (TrainedAdapterTrainer, kind), {})


def check_model_placement(
    model: PreTrainedModel, args: MethodTrainingArguments, kind: type[MethodTrainer], copied: bool
) -> None:
    """Refuse a model placement by `device_map` that the method does not support; see `check_placement`.

    Args:
        copied: whether several copies of the model train.
    """
    unchanged = not args.do_train and kind.several_devices and args.gradients is Gradients.WEIGHTS
    check_placement(model, kind.several_devices, unchanged, kind.offloaded_models)
    if copied and has_offloaded(model):
        raise InputError(
            "hp_search trains a copy of the model in each trial, and copies of an offloaded model share the stored "
            "weights; leave hp_search or device_map out"
        )


def check_trainer(trainer: Trainer, method: str) -> Trainer:
    """Check a trainer's branch on the Hub, batches, optimizer and checkpoint before training; return the trainer.

    Raises:
        InputError: one of them does not work.
    """
    args = trainer.args
    prepare_branch(trainer)
    if args.do_train:
        if not args.needs_all_rows:
            check_full_batch(args, trainer.train_dataset)
        check_optimizer(trainer)
    check_checkpoint(trainer, method)
    return trainer


@contextlib.contextmanager
def trainer_errors_as_input_errors(args: MethodTrainingArguments) -> Iterator[None]:
    """Turn errors that `Trainer` raises for bad arguments into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    except Exception as error:
        path = getattr(error, "filename", None)
        if isinstance(error, OSError) and path is not None and str(args.output_dir).startswith(str(path)):
            raise not_writable(args.output_dir, error) from error
        if not (args.push_to_hub and is_hub_error(error)):
            raise
        raise InputError(f"--push_to_hub: the Hub repository cannot be made: {reason(error)}") from error
