"""Checks before training: of the arguments alone, of arguments and data together, of the trainer."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SaveStrategy, SchedulerType

from hf_ft_ext.arguments import PROMPT_DEMO, DataArguments, MethodTrainingArguments, RunArguments
from hf_ft_ext.data.multi_label import SEPARATOR
from hf_ft_ext.errors import InputError, did_you_mean, first_line
from hf_ft_ext.metrics import MetricFunction
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION
from hf_ft_ext.training.saved.checkpoints import check_fits, steps_done
from hf_ft_ext.training.weights.devices import refuse_data_parallel
from hf_ft_ext.training.weights.sharding import refuse_sharding_on_cpu

logger = logging.getLogger(__name__)

STEPS = ("do_train", "do_eval", "do_predict")
_IN_ORDER = ("random", "sequential")  # values of train_sampling_strategy that a stream allows
_OPTIMIZER_STATES = ("optimizer*", "global_step*")  # transformers' and FSDP's, DeepSpeed's
_MANY = math.inf
_SEEDS = 2**32 - 1  # the largest seed that numpy accepts
# name -> lowest, highest, whether the highest itself is allowed
_RANGES: dict[str, tuple[float, float, bool]] = {
    "learning_rate": (0, _MANY, False),
    "weight_decay": (0, _MANY, False),
    "adam_beta1": (0, 1, False),
    "adam_beta2": (0, 1, False),
    "adam_epsilon": (0, _MANY, False),
    "max_grad_norm": (0, _MANY, False),
    "num_train_epochs": (0, _MANY, False),
    "warmup_steps": (0, _MANY, False),
    "label_smoothing_factor": (0, 1, False),
    "neftune_noise_alpha": (0, _MANY, False),
    "eval_delay": (0, _MANY, False),
    "logging_steps": (0, _MANY, False),
    "save_steps": (0, _MANY, False),
    "eval_steps": (0, _MANY, False),
    "per_device_train_batch_size": (1, _MANY, False),
    "per_device_eval_batch_size": (1, _MANY, False),
    "gradient_accumulation_steps": (1, _MANY, False),
    "eval_accumulation_steps": (1, _MANY, False),
    "save_total_limit": (1, _MANY, False),
    "torch_empty_cache_steps": (1, _MANY, False),
    "dataloader_prefetch_factor": (1, _MANY, False),
    "dataloader_num_workers": (0, _MANY, False),
    "seed": (0, _SEEDS, True),
    "data_seed": (0, _SEEDS, True),
}


def check_ranges(given: dict[str, Any]) -> None:
    """Raise an `InputError` if a number among the user's options `given` is out of range."""
    for name, (low, high, closed) in _RANGES.items():
        value = given.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not (low <= value < high or (closed and value == high)):
            edge = "finite" if high == _MANY else f"{'at most' if closed else 'below'} {high:,}"
            raise InputError(f"{name}={value} cannot work: pass a number that is {low} or more and {edge}")
    steps = given.get("max_steps")
    if isinstance(steps, int) and steps < 1 and steps != -1:
        raise InputError(f"max_steps={steps} cannot work: pass 1 or more, or leave it out and set num_train_epochs")


def check_together(run_args: RunArguments, training_args: MethodTrainingArguments) -> None:
    """Refuse options of the run and of training that contradict each other; `false` and `none` resume nothing.

    Raises:
        InputError: there are such options.
    """
    refuse_sharding_on_cpu(training_args)
    refuse_data_parallel(training_args)
    if not any(getattr(training_args, step) for step in STEPS):
        raise InputError("nothing to do: pass --do_train, --do_eval or --do_predict, or leave them all out")
    if training_args.label_names not in (None, ["labels"]):
        raise InputError(
            f"label_names={training_args.label_names}: the launcher hands labels to the model as `labels`; leave it "
            "out (label_column names a column of your data)"
        )
    if training_args.prediction_loss_only and training_args.do_predict:
        raise InputError("--prediction_loss_only leaves no predictions to write; drop it or --do_predict")
    if not training_args.eval_do_concat_batches:
        raise InputError(
            "--eval_do_concat_batches false leaves predictions batch by batch, and metrics and predictions.tsv are of "
            "all rows; leave it out"
        )
    resume = training_args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("false", "none", ""):
        resume = training_args.resume_from_checkpoint = None
    if run_args.hp_search < 0:
        raise InputError(f"hp_search must be 1 or more (or 0 for none), got {run_args.hp_search}")
    if run_args.early_stopping_patience < 0:
        raise InputError(
            f"early_stopping_patience must be 1 or more (or 0 for none), got {run_args.early_stopping_patience}"
        )
    if run_args.early_stopping_patience and not training_args.load_best_model_at_end:
        raise InputError(
            "--early_stopping_patience compares evaluations in training; add --load_best_model_at_end with "
            "--eval_strategy and --save_strategy"
        )
    if resume is not None:
        if run_args.overwrite_output_dir:
            raise InputError("--resume_from_checkpoint continues a run, --overwrite_output_dir deletes it; pass one")
        if run_args.hp_search:
            raise InputError("--hp_search starts every trial from scratch and cannot resume; drop one of the two")
        if not training_args.do_train:
            raise InputError(
                "--resume_from_checkpoint is for training; add --do_train, or to evaluate a checkpoint pass it as "
                "--model_name_or_path"
            )
    if training_args.push_to_hub and not training_args.do_train:
        raise InputError(
            "--push_to_hub shares what training leaves; add --do_train, or push a finished run with hf-ft-ext push"
        )
    if run_args.hp_search and not training_args.do_train:
        raise InputError("--hp_search trains; add --do_train")


def check_streaming(run_args: RunArguments, data_args: DataArguments, args: MethodTrainingArguments) -> None:
    """Check that a run can read its training rows as a stream.

    Raises:
        InputError: `streaming` together with an option that needs all rows, or an option of streams without it.
    """
    if not data_args.streaming:
        if "stream_buffer" in run_args.given:
            raise InputError(
                f"--stream_buffer {data_args.stream_buffer} shuffles a stream; pass --streaming with it, "
                "or leave it out"
            )
        return
    if not args.do_train:
        raise InputError("--streaming reads the training split; add --do_train, or leave it out")
    if args.needs_all_rows:
        raise InputError(
            f"--streaming: method {run_args.method} solves the task at once and needs all rows for it; leave it out"
        )
    if run_args.from_linearhead:
        raise InputError("--streaming: --from_linearhead fits a head on all rows at once; leave out one of the two")
    if data_args.few_shot_type == PROMPT_DEMO:
        raise InputError("--streaming: demonstrations are drawn from all training rows; leave out one of the two")
    if args.max_steps < 1:
        raise InputError("--streaming: how many rows there are is not known, so neither is an epoch; pass --max_steps")
    if args.train_sampling_strategy not in _IN_ORDER:
        raise InputError(
            f"--streaming takes rows as they come and cannot sort them: train_sampling_strategy="
            f"{args.train_sampling_strategy} has to be one of {', '.join(_IN_ORDER)}"
        )
    if data_args.stream_buffer < 1:
        raise InputError(f"stream_buffer={data_args.stream_buffer} holds no row; pass 1 or more")


def check_splits(run_args: RunArguments, args: TrainingArguments, data) -> None:
    """Raise an `InputError` if the data lacks the split of a requested step."""
    name = repr(data.task.name)
    if args.do_train and data.train is None:
        raise InputError(f"--do_train: {name} has no training split; pass --train_file, or drop --do_train")
    if args.do_eval and not data.validation and run_args.given.get("num_k"):
        raise InputError(
            f"--do_eval: --num_k {run_args.given['num_k']} trains on all rows of {name} and leaves none to evaluate "
            "on; pass a smaller --num_k, or only --do_train"
        )
    if args.do_eval and not data.validation:
        reason = "" if "do_eval" in run_args.given else " (on by default, and by any --eval_strategy)"
        raise InputError(
            f"--do_eval{reason}: {name} has no validation split; pass --validation_file, or only --do_train"
        )
    if run_args.hp_search and not data.validation:
        raise InputError(f"--hp_search compares trials on a validation split, and {name} has none")
    if args.do_predict and not data.test:
        raise InputError(f"--do_predict: {name} has no test split; pass --test_file, or drop --do_predict")


def choose_best_metric(run_args: RunArguments, args: TrainingArguments, metrics: MetricFunction) -> None:
    """If a best model is to be chosen, choose it by the task's primary metric unless the user named another.

    Raises:
        InputError: the user named a metric that the task does not have, or a metric fails on a small sample.
    """
    primary, *others = metrics.keys()
    keys = ["loss", primary, *others]
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
        args.metric_for_best_model = primary
        if "greater_is_better" not in run_args.given:
            args.greater_is_better = True
    elif chosen.removeprefix("eval_") not in keys:
        raise InputError(
            f"metric_for_best_model cannot be {chosen!r}{did_you_mean(chosen.removeprefix('eval_'), keys)}; "
            f"this task has: {', '.join(keys)}"
        )
    elif args.prediction_loss_only and compares and chosen.removeprefix("eval_") != "loss":
        raise InputError(
            f"metric_for_best_model={chosen} is computed from predictions, and --prediction_loss_only leaves none; "
            "leave one of the two out"
        )
    best = str(args.metric_for_best_model).removeprefix("eval_")
    if compares and metrics.is_from_elsewhere(best) and "greater_is_better" not in run_args.given:
        which, other = ("highest", "false") if args.greater_is_better else ("lowest", "true")
        logger.info("The best model has the %s %s; pass --greater_is_better %s for the other way.", which, best, other)


def check_scoring(
    run_args: RunArguments,
    data_args: DataArguments,
    args: MethodTrainingArguments,
    data,
    problem_type: str,
    metrics: MetricFunction,
) -> None:
    """Check the options for metrics and predictions against the model's problem type.

    Passes the positive class to a method that uses it.

    Raises:
        InputError: an option has no effect, or a setting does not fit several labels per row.
    """
    if run_args.prediction_probabilities and not args.do_predict:
        raise InputError(
            "--prediction_probabilities adds columns to predictions.tsv; add --do_predict, or leave it out"
        )
    if run_args.prediction_probabilities and problem_type == REGRESSION:
        raise InputError("--prediction_probabilities is for classes, and this is a regression; leave it out")
    taken = args.take_positive_label(data.positive_label)
    if data_args.positive_label is not None and not (metrics.reads_positive or taken):
        raise InputError(
            f"--positive_label {data_args.positive_label}: no metric of this run ({', '.join(metrics.names)}) is "
            "about one class; add --metric f1, or leave it out"
        )
    if problem_type != MULTI_LABEL:
        if "multi_label_threshold" in run_args.given:
            raise InputError(
                f"--multi_label_threshold {data_args.multi_label_threshold} is for several labels per row, but here "
                "each row has one; leave it out"
            )
        return
    if metrics.thresholds is None and not data.validation:
        raise InputError(
            "--multi_label_threshold auto chooses on a validation split, and there is none; pass --validation_file, "
            "or a number"
        )
    if args.label_smoothing_factor:
        raise InputError(
            f"label_smoothing_factor={args.label_smoothing_factor} smooths one class per row, but here rows have "
            "several labels; leave it out"
        )
    if args.do_predict and (bad := [name for name in data.label_names or () if SEPARATOR in name]):
        raise InputError(
            f"label '{bad[0]}' holds '{SEPARATOR}', which separates labels in predictions.tsv; rename it in the data"
        )


def check_probabilities(run_args: RunArguments, trainer: Trainer, metrics: MetricFunction) -> None:
    """Raise an `InputError` if probabilities are requested from a trainer whose outputs are scores."""
    if getattr(trainer, "gives_probabilities", True):
        return
    if run_args.prediction_probabilities:
        raise InputError(
            f"--prediction_probabilities: the predictions of method {run_args.method} are scores here, not logits of "
            "probabilities; leave it out"
        )
    # An array holds thresholds that were chosen for the scores of the saved result.
    one_for_all = isinstance(metrics.thresholds, float)
    if metrics.problem_type == MULTI_LABEL and one_for_all and metrics.thresholds != 0.5:
        raise InputError(
            f"--multi_label_threshold {metrics.thresholds}: the predictions of method {run_args.method} are scores "
            "around 0, not probabilities; pass auto, or leave it out"
        )


def check_optimizer(trainer: Trainer) -> None:
    """Create optimizer and schedule once, for a dummy parameter, so that bad arguments fail before training.

    Raises:
        InputError: they reject their arguments, or need a package that is not installed.
    """
    args = trainer.args
    try:
        if trainer.optimizer_cls_and_kwargs is None:
            kind, settings = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        else:
            kind, settings = trainer.optimizer_cls_and_kwargs
        if not {"params", "model", "optimizer_dict"} & settings.keys():  # these optimizers need the model itself
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
        raise InputError(
            f"optimizer or schedule cannot be made ({first_line(error)}); check optim={args.optim.value}, "
            f"optim_args={args.optim_args}, lr_scheduler_type={args.lr_scheduler_type.value}, "
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs}"
        ) from error


def check_checkpoint(trainer: Trainer, method: str) -> None:
    """Raise an `InputError` if `trainer` cannot resume from the given checkpoint."""
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
    if not any(next(Path(folder).glob(pattern), None) for pattern in _OPTIMIZER_STATES):
        logger.warning(
            "%s holds no optimizer state (save_only_model): moments and learning rate begin anew, so the run differs "
            "from an uninterrupted one.",
            folder,
        )
    args, step = trainer.args, steps_done(folder)
    name, value = "max_steps", args.max_steps
    last = args.max_steps
    if args.max_steps < 1 and args.auto_find_batch_size:  # the checkpoint's batch size counts the steps
        last = step
    elif args.max_steps < 1:
        name, value = "num_train_epochs", args.num_train_epochs
        last = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    if last < step:
        raise InputError(
            f"--resume_from_checkpoint: {folder!r} is at step {step}, beyond --{name} {value:g}, so nothing would be "
            f"trained; pass a larger --{name}, or evaluate it as --model_name_or_path"
        )
