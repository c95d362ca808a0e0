"""Defaults of the launcher for options that the user did not set, and refusal of options without effect."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from hf_ft_ext.arguments import (
    PROMPT_DEMO,
    SEQUENCE_CLASSIFICATION,
    DataArguments,
    MethodTrainingArguments,
    ModelArguments,
    RunArguments,
)
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.folder import (
    checkpoint_to_resume,
    folder_name,
    free_folder,
    refuse_foreign_run,
    refuse_lost_model,
    refuse_run_of_another_checkpoint,
)
from hf_ft_ext.launch.validation import (
    STEPS,
    check_ranges,
    check_streaming,
    check_together,
)
from hf_ft_ext.metrics.thresholds import AUTO as AUTO_THRESHOLD
from hf_ft_ext.training.first_process import on_first_process

logger = logging.getLogger(__name__)


DEMO = "demo"


def complete_arguments(
    run_args: RunArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: MethodTrainingArguments,
) -> None:
    """Fill in the defaults, in place: demo model and task, train and evaluate, and the output folder.

    The first process chooses the folder, and all processes use it.

    Raises:
        InputError: options that contradict each other, an invalid checkpoint, or a folder that already holds a run.
    """
    check_ranges(run_args.given)
    _fill_in(run_args, model_args, data_args, training_args)
    _adapt_to_machine(run_args, training_args)
    check_together(run_args, training_args)
    check_streaming(run_args, data_args, training_args)
    refuse_unused_options(Command(run_args, model_args, data_args, training_args))
    given = run_args.given.get("output_dir") or None
    resume = training_args.resume_from_checkpoint
    # Only the first process checks: when another one checked, the first might already have written files.
    training_args.output_dir, training_args.resume_from_checkpoint = on_first_process(
        lambda: _output_dir(given, resume, run_args, model_args, data_args, training_args)
    )


def task_label(data_args: DataArguments) -> str:
    """The task's name, or else the name of the data set or of the first data file of the user."""
    return data_args.task_name or folder_name(
        data_args.dataset_name or data_args.train_file or data_args.validation_file or data_args.test_file or DEMO
    )


def own_files(data_args: DataArguments) -> tuple[str, ...]:
    """The data files that the user passed."""
    return tuple(f for f in (data_args.train_file, data_args.validation_file, data_args.test_file) if f)


@dataclass(frozen=True)
class Command:
    """All arguments of a run."""

    run: RunArguments
    model: ModelArguments
    data: DataArguments
    training: MethodTrainingArguments

    @property
    def evaluates(self) -> bool:
        """Whether validation rows are read."""
        return self.training.do_eval or self.run.hp_search > 0 or self.training.needs_validation

    @property
    def evaluates_in_training(self) -> bool:
        """Whether training, or a search, compares evaluations."""
        return self.training.eval_strategy != IntervalStrategy.NO or self.run.hp_search > 0


@dataclass(frozen=True)
class Rule:
    """The condition under which an option has no effect, and the message: its purpose, and what to do."""

    unused: Callable[[Command], bool]
    message: str


RULES: dict[str, Rule] = {
    "max_train_samples": Rule(
        lambda c: not c.training.do_train and c.data.few_shot_type != PROMPT_DEMO,
        "cuts the training rows, and this run does not train; add --do_train",
    ),
    "max_eval_samples": Rule(
        lambda c: not c.evaluates and c.data.multi_label_threshold != AUTO_THRESHOLD,
        "cuts the validation rows, and this run does not evaluate; add --do_eval",
    ),
    "max_predict_samples": Rule(
        lambda c: not c.training.do_predict,
        "cuts the test rows, and this run does not predict; add --do_predict",
    ),
    "prediction_probabilities": Rule(
        lambda c: not c.training.do_predict,
        "adds columns to predictions.tsv, and this run does not predict; add --do_predict",
    ),
    "max_new_tokens": Rule(
        lambda c: not c.data.predict_with_generate and not c.training.do_predict,
        "is about generated texts, and this run writes none; add --predict_with_generate or --do_predict",
    ),
    "num_beams": Rule(
        lambda c: not c.data.predict_with_generate and not c.training.do_predict,
        "is about generated texts, and this run writes none; add --predict_with_generate or --do_predict",
    ),
    "predict_with_generate": Rule(
        lambda c: not c.training.do_eval,
        "is about evaluation, and this run does not evaluate; add --do_eval",
    ),
    "packing": Rule(
        lambda c: not c.training.do_train,
        "puts training rows together, and this run does not train; add --do_train",
    ),
    **dict.fromkeys(
        ("completion_only_loss", "assistant_only_loss"),
        Rule(
            lambda c: not c.training.do_train and not c.evaluates,
            "is about the loss, and this run computes none; add --do_train or --do_eval",
        ),
    ),
    "metric": Rule(
        lambda c: not c.evaluates and not c.training.do_predict,
        "is about evaluation, and this run does not evaluate; add --do_eval",
    ),
    "num_sample": Rule(
        lambda c: not c.evaluates and not c.training.do_predict and not c.data.calibrate,
        "is about evaluation, and this run does not evaluate; add --do_eval",
    ),
    "stream_buffer": Rule(
        lambda c: not c.data.streaming or c.training.train_sampling_strategy == "sequential",
        "shuffles a stream, and rows keep their order here; pass --streaming without "
        "--train_sampling_strategy sequential",
    ),
    "early_stopping_patience": Rule(
        lambda c: not c.training.do_train, "ends training, and this run does not train; add --do_train"
    ),
    "save_strategy": Rule(
        lambda c: c.training.save_strategy == SaveStrategy.BEST and c.training.eval_strategy == IntervalStrategy.NO,
        "saves at the best evaluation in training, and there is none; pass --eval_strategy steps or epoch",
    ),
    "metric_for_best_model": Rule(
        lambda c: not c.evaluates_in_training,
        "compares evaluations in training, and there are none; pass --eval_strategy steps or epoch",
    ),
    "greater_is_better": Rule(
        lambda c: not c.evaluates_in_training,
        "compares evaluations in training, and there are none; pass --eval_strategy steps or epoch",
    ),
}


def refuse_unused_options(command: Command) -> None:
    """Refuse options that the user set but this run would not use; log values that other options override.

    Raises:
        InputError: an option that was set has no effect.
    """
    given = command.run.given
    for name, rule in RULES.items():
        value = given.get(name)
        if value not in (None, False, 0) and rule.unused(command):
            raise InputError(f"--{name} {value} {rule.message}, or leave it out")
    training = command.training
    if given.get("warmup_steps") and training.lr_scheduler_type == SchedulerType.CONSTANT:
        logger.warning(
            "--warmup_steps %s is not used: lr_scheduler_type=constant has no warm-up; constant_with_warmup has one.",
            given["warmup_steps"],
        )
    if "num_train_epochs" in given and training.max_steps > 0 and not training.needs_all_rows:
        logger.warning(
            "--num_train_epochs %g is not used: max_steps=%d says when training ends.",
            given["num_train_epochs"],
            training.max_steps,
        )
    for kind in ("eval", "save", "logging"):
        name, strategy = f"{kind}_steps", getattr(training, f"{kind}_strategy").value
        if given.get(name) and strategy != "steps":
            logger.warning(
                "--%s %g is not used: %s_strategy=%s; --%s_strategy steps uses it.",
                name,
                given[name],
                kind,
                strategy,
                kind,
            )
    if command.run.hp_search:
        for name in ("learning_rate", "per_device_train_batch_size"):
            if name in given:
                logger.warning("--hp_search chooses %s: the value %s is not used.", name, given[name])


def _fill_in(run_args, model_args, data_args, training_args) -> None:
    filled_in = []
    classifies = run_args.task_type == SEQUENCE_CLASSIFICATION  # the demo model and task are for classification
    if model_args.model_name_or_path is None and classifies:
        filled_in.append("the demo encoder")
    if classifies and not any((data_args.task_name, data_args.dataset_name, *own_files(data_args))):
        data_args.task_name = DEMO
        filled_in.append("the demo task")
    if not any(step in run_args.given for step in STEPS):
        training_args.do_train = training_args.do_eval = True
        filled_in.append("train and evaluate")
    if filled_in:
        logger.info("Using defaults: %s.", ", ".join(filled_in))


def _adapt_to_machine(run_args: RunArguments, training_args: MethodTrainingArguments) -> None:
    """Without an accelerator, switch off pinned memory and log it if CPU cores stay idle."""
    if torch.accelerator.is_available() and not training_args.use_cpu:
        return
    if "dataloader_pin_memory" not in run_args.given:
        training_args.dataloader_pin_memory = False
    launched, cores = "ACCELERATE_MIXED_PRECISION" in os.environ, os.cpu_count() or 1
    if launched and torch.get_num_threads() == 1 and cores > 1 and training_args.world_size == 1:
        logger.info(
            "Training on 1 of %d cores, as `accelerate launch` sets it; `--num_cpu_threads_per_process %d` uses all.",
            cores,
            cores,
        )


def _output_dir(given, resume, run_args, model_args, data_args, training_args) -> tuple[str, str | None]:
    """The run folder, and the checkpoint to resume from if there is one."""
    if given is None and resume is not None and resume.lower() != "true":
        checkpoint = checkpoint_to_resume(resume, "")
        folder = Path(checkpoint)
        return str((folder if folder.name.strip(".") else folder.resolve()).parent), checkpoint  # "." has no parent
    if given is None:
        base = os.path.join("runs", f"{run_args.method}-{task_label(data_args)}-seed{training_args.seed}")
        # Without --output_dir, --overwrite_output_dir means the folder with the default name.
        given = base if run_args.overwrite_output_dir else free_folder(base, resume=resume is not None)
    given = os.path.expanduser(given)
    if resume is not None:
        checkpoint = checkpoint_to_resume(resume, given)
        if not run_args.dry_run:
            refuse_run_of_another_checkpoint(given, checkpoint)
        return given, checkpoint
    if run_args.overwrite_output_dir:
        refuse_lost_model(given, model_args.model_name_or_path)
    elif not run_args.dry_run:  # a dry run writes nothing
        refuse_foreign_run(given)
    return given, None
