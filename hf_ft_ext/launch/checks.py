"""Checks that need the data or the trainer, all of them before any training."""

import logging
import os

import numpy as np
import torch
from peft import PeftModel
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SaveStrategy, SchedulerType

from hf_ft_ext.arguments import RunArguments
from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.metrics import CLASSIFICATION, METRICS, metric_function, primary_key
from hf_ft_ext.training.checkpoints import check_fits

logger = logging.getLogger(__name__)


def check_splits(run_args: RunArguments, args: TrainingArguments, data) -> None:
    """Raise an `InputError` if a step was asked for whose data is missing."""
    name = repr(data.task.name)
    if args.do_train and data.train is None:
        raise InputError(f"--do_train: {name} has no training split; pass --train_file, or drop --do_train")
    if args.do_eval and not data.validation:
        reason = "" if "do_eval" in run_args.given else " (on by default, and by any --eval_strategy)"
        raise InputError(
            f"--do_eval{reason}: {name} has no validation split; pass --validation_file, or only --do_train"
        )
    if run_args.hp_search and not data.validation:
        raise InputError(f"--hp_search compares trials on a validation split, and {name} has none")
    if args.do_predict and not data.test:
        raise InputError(f"--do_predict: {name} has no test split; pass --test_file, or drop --do_predict")


def choose_best_metric(run_args: RunArguments, args: TrainingArguments, metric: str) -> None:
    """Where a best model is wanted, let the task's primary metric choose it unless the user said otherwise.

    Raises:
        InputError: the user named a metric that the task does not have.
    """
    sample = np.eye(2) if METRICS[metric].problem_type == CLASSIFICATION else np.arange(2.0)
    keys = ["loss", *metric_function(metric)(EvalPrediction(sample, np.arange(2)))]
    chosen = run_args.given.get("metric_for_best_model")
    compares = (
        args.load_best_model_at_end
        or args.save_strategy == SaveStrategy.BEST
        or args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        or run_args.hp_search > 0
    )
    if chosen is None:
        if not compares or args.prediction_loss_only:
            return
        args.metric_for_best_model = primary_key(metric)
        if "greater_is_better" not in run_args.given:
            args.greater_is_better = True
    elif chosen.removeprefix("eval_") not in keys:
        raise InputError(
            f"metric_for_best_model cannot be {chosen!r}{did_you_mean(chosen.removeprefix('eval_'), keys)}; "
            f"this task has: {', '.join(keys)}"
        )


def check_optimizer(trainer: Trainer) -> None:
    """Make optimizer and schedule once, for a parameter of no use, so that what they refuse is known before training.

    Raises:
        InputError: they refuse their arguments, or need a package that is not there.
    """
    args = trainer.args
    try:
        if trainer.optimizer_cls_and_kwargs is None:
            kind, settings = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        else:
            kind, settings = trainer.optimizer_cls_and_kwargs
        if not {"params", "model", "optimizer_dict"} & settings.keys():  # those want the model itself
            optimizer = kind([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
            get_scheduler(
                args.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=1,
                num_training_steps=10,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, AttributeError, RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"optimizer or schedule cannot be made ({reason}); check optim={args.optim.value}, "
            f"optim_args={args.optim_args}, lr_scheduler_type={args.lr_scheduler_type.value}, "
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs}"
        ) from error


def check_checkpoint(trainer: Trainer, method: str) -> None:
    """Raise an `InputError` if the checkpoint to resume from is not one that `trainer` can go on from."""
    folder = trainer.args.resume_from_checkpoint
    if folder is None:
        return
    is_adapter = any(os.path.isfile(os.path.join(folder, f"adapter_model.{e}")) for e in ("safetensors", "bin"))
    if is_adapter != isinstance(trainer.model, PeftModel):
        holds = "an adapter" if is_adapter else "a whole model"
        trains = "a whole model" if is_adapter else "an adapter"
        raise InputError(
            f"--resume_from_checkpoint: {folder!r} holds {holds}, but method {method!r} trains {trains}; "
            "resume with the method that wrote it"
        )
    check_fits(folder, trainer.model, method)
    load = trainer._load_optimizer_and_scheduler

    def load_or_refuse(checkpoint: str) -> None:
        own = [set(group) for group in trainer.optimizer.param_groups]
        try:
            load(checkpoint)
            if own != [set(group) for group in trainer.optimizer.param_groups]:
                raise ValueError("it is another optimizer's")  # torch takes its settings for its own
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"--resume_from_checkpoint: the optimizer's state in {checkpoint!r} does not fit "
                f"({str(error).strip().splitlines()[0]}); pass the arguments that the run started with"
            ) from error

    trainer._load_optimizer_and_scheduler = load_or_refuse
