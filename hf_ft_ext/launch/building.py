"""Building data, model and trainer from the arguments: all that can fail on bad input, before any training."""

import copy
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import IterableDataset
from peft import PeftModel
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from hf_ft_ext.arguments import (
    FINETUNE,
    PROMPT_DEMO,
    DataArguments,
    MethodTrainingArguments,
    ModelArguments,
    RunArguments,
)
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.preprocess import tokenize
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.features.linear_probe import fit_linear_head, prepare_linear_head
from hf_ft_ext.launch.results import THRESHOLDS, store_thresholds
from hf_ft_ext.launch.search import require_optuna
from hf_ft_ext.launch.trainers import (
    check_model_placement,
    check_trainer,
    run_callbacks,
    trainer_class_for,
    trainer_errors_as_input_errors,
)
from hf_ft_ext.launch.validation import (
    check_probabilities,
    check_scoring,
    check_splits,
    choose_best_metric,
)
from hf_ft_ext.methods import find_method, hooks_of
from hf_ft_ext.metrics import default_metrics
from hf_ft_ext.metrics.thresholds import AUTO as AUTO_THRESHOLD
from hf_ft_ext.models import load_tokenizer_and_model, model_max_length
from hf_ft_ext.prompts.calibration import calibrate
from hf_ft_ext.prompts.collator import ContextCollator
from hf_ft_ext.prompts.loading import check_prompt_options
from hf_ft_ext.prompts.model import is_prompt_model
from hf_ft_ext.prompts.preprocess import tokenize_prompts
from hf_ft_ext.prompts.saving import SavePrompt
from hf_ft_ext.training.runs.record import recorded_method
from hf_ft_ext.training.saved.resumed_arguments import compared_arguments
from hf_ft_ext.training.weights.precision import autocast_of
from hf_ft_ext.training.weights.quantized import move

logger = logging.getLogger(__name__)

BuildTrainer = Callable[[MethodTrainingArguments], Trainer]


def load(
    run_args: RunArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MethodTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[BuildTrainer, TaskData]:
    """Load and check data and model.

    Args:
        callbacks: for the trainer, after the launcher's own.

    Returns:
        A function from training arguments to a trainer, and the tokenised data.

    Raises:
        InputError: something that the user passed cannot work.
    """
    if run_args.hp_search:
        require_optuna()
    check_prompt_options(data_args)
    with args.main_process_first(desc="loading data"):  # downloads happen once
        data = load_data(data_args, cache_dir=model_args.cache_dir, token=model_args.token, data_seed=args.data_seed)
    check_splits(run_args, args, data)
    if data_args.streaming:
        data.train = in_training_order(data.train, data_args.stream_buffer, args)
    choose_best_metric(run_args, args, data.metric_function(data_args.multi_label_threshold))
    trainer_class: Any = find_method(run_args.method).trainer_class()
    finished = _finished_run(run_args.method, model_args, args)

    load_model = functools.partial(_load_model, run_args, model_args, data_args, args, data)
    if finished is None:
        tokenizer, model = load_model()
    else:
        tokenizer, model = trainer_class.load_finished(finished, data.label_names, run_args.given, load_model)
    if finished is None:
        trainer_class = trainer_class_for(run_args.method, model, args)
    check_model_placement(model, args, trainer_class, bool(run_args.hp_search))
    kind = model.config.problem_type
    if data.label_names is None and data.problem_type != kind:  # no labels: take the problem type from the model
        data = replace(data, problem_type=kind, metric=data_args.metric or default_metrics(kind))
    thresholds = _saved_thresholds(model.config, data_args, args)
    check_scoring(run_args, data_args, args, data, kind, data.metric_function(data_args.multi_label_threshold))
    data = _tokenized(run_args, data_args, args, data, tokenizer, model)
    _start_from_linear_head(run_args, args, model, data, tokenizer)
    make_trainer: Callable[..., Trainer] = trainer_class
    if finished is not None:
        make_trainer = functools.partial(trainer_class.from_folder, finished, given=run_args.given)

    def build(args: MethodTrainingArguments) -> Trainer:
        metrics = data.metric_function(data_args.multi_label_threshold)
        if thresholds is not None:
            metrics.thresholds = thresholds
        metrics.keys(model.config.num_labels)  # raises now, not after training
        savers = [SavePrompt()] if is_prompt_model(model) else []
        with trainer_errors_as_input_errors(args):
            trainer = make_trainer(
                model=copy.deepcopy(model) if run_args.hp_search else model,  # each trial needs its own
                args=args,
                train_dataset=data.train if args.do_train else None,
                # Evaluation during training uses the first validation set, as the metric names expect.
                eval_dataset=next(iter(data.validation.values()), None),
                processing_class=tokenizer,
                data_collator=ContextCollator(tokenizer) if _needs_context_collator(model, data_args) else None,
                compute_metrics=metrics,
                callbacks=run_callbacks(run_args, args, callbacks, savers),
            )
        check_probabilities(run_args, trainer, metrics)
        trainer.launcher_settings = compared_arguments(run_args, model_args, data_args)
        return check_trainer(trainer, run_args.method)

    return build, data


def _load_model(
    run_args: RunArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MethodTrainingArguments,
    data: TaskData,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load tokenizer and model, and calibrate a prompt model if asked to."""
    tokenizer, model = load_tokenizer_and_model(model_args, data, seed=args.seed, data_args=data_args, args=args)
    if data_args.calibrate:
        _check_calibration(run_args, args)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise InputError(
                "--calibrate runs the language model without the virtual tokens of this adapter; calibrate when "
                "training it, or leave --calibrate out"
            )
        calibrate(model, tokenizer, data, data_args, model_max_length(model, tokenizer), args.data_seed)
    return tokenizer, model


def _tokenized(
    run_args: RunArguments,
    data_args: DataArguments,
    args: MethodTrainingArguments,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> TaskData:
    """The data as token ids: by the template of a prompt model, else as plain texts."""
    limit = model_max_length(model, tokenizer)
    if not is_prompt_model(model):
        return tokenize(data, tokenizer, data_args, label2id=model.config.label2id, model_max_length=limit)
    if run_args.given.get("few_shot_type") == FINETUNE:
        raise InputError(
            "--few_shot_type finetune: the model was saved with a prompt; leave it out, or pass another model"
        )
    return tokenize_prompts(data, tokenizer, data_args, model.config, limit, args.data_seed)


def in_training_order(stream: IterableDataset, buffer: int, args: MethodTrainingArguments) -> IterableDataset:
    """Shuffle a stream within a buffer of `buffer` rows, newly in every epoch, unless `args` ask for its own order.

    Every process reads the whole stream and takes its part of the rows of each step, so batches may differ in length.
    """
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False
    if args.train_sampling_strategy == "sequential":
        return stream
    return stream.shuffle(seed=args.seed if args.data_seed is None else args.data_seed, buffer_size=buffer)


def _finished_run(method: str, model_args: ModelArguments, args: MethodTrainingArguments) -> str | None:
    """The folder to predict from, if the run does not train and the method's result is more than a model.

    Raises:
        InputError: the folder holds such a result of another method, whose model file alone is untrained.
    """
    if args.do_train or model_args.model_name_or_path is None:
        return None
    folder = os.path.expanduser(model_args.model_name_or_path)
    if _holds_result(find_method(method).trainer_class(), folder):
        return folder
    other = recorded_method(folder)
    if other not in (None, method) and _holds_result(hooks_of(other), folder):
        raise InputError(
            f"model_name_or_path={folder!r} is the result of --method {other}, and the model in it is untrained; pass "
            f"--method {other} too, in place of {method}"
        )
    return None


def _holds_result(trainer_class: type | None, folder: str) -> bool:
    if trainer_class is None or not hasattr(trainer_class, "holds_result"):
        return False
    return trainer_class.holds_result(folder)


def _needs_context_collator(model: PreTrainedModel, data_args: DataArguments) -> bool:
    return data_args.few_shot_type == PROMPT_DEMO or (is_prompt_model(model) and model.config.words is None)


def _saved_thresholds(config: Any, data_args: DataArguments, args: MethodTrainingArguments) -> np.ndarray | None:
    """The thresholds saved with the model, if this run should use them; training discards them."""
    kept = getattr(config, THRESHOLDS, None)
    if args.do_train or kept is None:
        fixed = data_args.multi_label_threshold
        store_thresholds(config, None if fixed in (None, AUTO_THRESHOLD) else float(fixed))
        return None
    if data_args.multi_label_threshold is not None or len(kept) != config.num_labels:
        return None
    logger.info("The model's own thresholds are used: %s.", ", ".join(f"{value:.3g}" for value in kept[:10]))
    return np.array(kept)


def _check_calibration(run_args: RunArguments, args: MethodTrainingArguments) -> None:
    """Raise an `InputError` if the run replaces or does not read the logits that `calibrate` corrects."""
    if not args.do_train:
        return
    if run_args.from_linearhead or run_args.method == "linearhead":
        raise InputError(
            "--calibrate corrects the logits of the language model's own label words, and a linear head is fitted in "
            "their place; leave one of the two out"
        )
    if not getattr(args, "adjust_for_init", True):
        raise InputError(
            f"--calibrate shifts the model's own outputs, which method {run_args.method} does not read without "
            "adjust_for_init; pass --adjust_for_init too, or leave --calibrate out"
        )


def _start_from_linear_head(run_args: RunArguments, args: MethodTrainingArguments, model, data: TaskData, tokenizer):
    """Fit the head by linear probing before the method starts, if `from_linearhead` is set."""
    if not run_args.from_linearhead:
        return
    if run_args.method == "linearhead":
        raise InputError("--from_linearhead: method linearhead fits that head itself; leave it out")
    if not args.do_train:
        raise InputError("--from_linearhead fits a head on the training data, to train on from it; add --do_train")
    if args.resume_from_checkpoint is not None:
        prepare_linear_head(model)  # the checkpoint holds the weights
    else:
        fit_linear_head(
            move(model, args.device),
            data.train,
            DataCollatorWithPadding(tokenizer),
            batch_size=args.per_device_eval_batch_size,
            disable_tqdm=args.disable_tqdm or not args.should_log,
            autocast=autocast_of(args),
        )
