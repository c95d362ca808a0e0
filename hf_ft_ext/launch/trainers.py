"""What the launcher gives every trainer that it makes, and the checks that only the made trainer allows."""

import contextlib
from collections.abc import Iterator, Sequence

from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback

from hf_ft_ext.arguments import Gradients, MethodTrainingArguments, RunArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.hub.push import is_of_the_hub, reason
from hf_ft_ext.launch.folder import not_writable
from hf_ft_ext.launch.sharing import prepare_branch
from hf_ft_ext.launch.validation import check_checkpoint, check_optimizer
from hf_ft_ext.training.checks import check_full_batch
from hf_ft_ext.training.method_trainer import MethodTrainer
from hf_ft_ext.training.runs.resources import ResourceMonitor
from hf_ft_ext.training.saved.checkpoints import SealCheckpoints
from hf_ft_ext.training.weights.placement import check_placement


def run_callbacks(
    run_args: RunArguments,
    args: MethodTrainingArguments,
    callbacks: Sequence[TrainerCallback],
    savers: Sequence[TrainerCallback] = (),
) -> list[TrainerCallback]:
    """Callbacks of a run: measuring, early stopping if asked for, checkpoints, and `callbacks` behind them.

    Args:
        savers: write files of a checkpoint, so they come before its checksums.
    """
    patience = run_args.early_stopping_patience
    early_stopping = [EarlyStoppingCallback(patience)] if patience and args.do_train else []
    return [ResourceMonitor(), *savers, *early_stopping, SealCheckpoints(run_args.method), *callbacks]


def check_place(model: PreTrainedModel, args: MethodTrainingArguments, kind: type[MethodTrainer]) -> None:
    """Refuse a model that `device_map` has put where the method cannot take it; see `check_placement`."""
    unchanged = not args.do_train and kind.several_devices and args.gradients is Gradients.WEIGHTS
    check_placement(model, kind.several_devices, unchanged)


def check_made(trainer: Trainer, method: str) -> Trainer:
    """The trainer itself, once its branch on the Hub, its batches, its optimizer and its checkpoint are known to work.

    Raises:
        InputError: one of them does not.
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
def explained(args: MethodTrainingArguments) -> Iterator[None]:
    """Turn what `Trainer` refuses into an `InputError`."""
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
        if not (args.push_to_hub and is_of_the_hub(error)):
            raise
        raise InputError(f"--push_to_hub: the Hub repository cannot be made: {reason(error)}") from error
