"""Checks of transformers' own arguments for every method: values that would be ignored or end in a traceback."""

import multiprocessing
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_liger_kernel_available

from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION
from hf_ft_ext.training.weights.sharding import refuse_sharding_on_cpu

_PACKAGES = {"azure_ml": "azureml-core mlflow", "comet_ml": "comet_ml", "flyte": "flytekit"}
_NOT_LISTED = ("flyte",)  # transformers does not look for it


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse arguments that no trainer can honour.

    Raises:
        InputError: sharding without an accelerator, `report_to` or `use_liger_kernel` without the library,
            checkpoints of the best model without evaluations, or settings of worker processes that cannot start.
    """
    refuse_sharding_on_cpu(args)
    _check_report_to(args)
    _check_workers(args)
    if args.use_liger_kernel and not is_liger_kernel_available():  # transformers looks for it when training starts
        raise InputError("use_liger_kernel needs a library: pip install liger-kernel; or leave it out")
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        raise InputError(
            "save_strategy=best saves after the best evaluation, and there is none in training; pass eval_strategy "
            "too, such as epoch"
        )


def check_loss(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse label smoothing for tasks other than single-label classification.

    Raises:
        InputError: the model is a regression, or has several labels per row.
    """
    if not args.label_smoothing_factor:
        return
    if is_regression(model):
        kind = "this task is a regression"
    elif getattr(getattr(model, "config", None), "problem_type", None) == MULTI_LABEL:
        kind = "the rows of this task have several labels"
    else:
        return
    raise InputError(
        f"label_smoothing_factor={args.label_smoothing_factor} moves probability between classes, and {kind}; leave "
        "it out"
    )


def is_regression(model: nn.Module) -> bool:
    """Whether a model is a regression: by its configuration or, as in transformers, by having one output."""
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem is not None:
        return problem == REGRESSION
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    return name.endswith(_OF_ROWS) and getattr(config, "num_labels", None) == 1


_OF_ROWS = ("SequenceClassification", "ImageClassification")  # classes whose loss is a regression's for one output


def refuse_compiled(model: nn.Module) -> None:
    """Refuse what `torch.compile(model)` returns; a model compiled in place (`model.compile()`) is accepted.

    Raises:
        InputError: the model is such a wrapper.
    """
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "the model is wrapped by torch.compile, which hides its arguments, so that a Trainer drops all columns of "
            "the data and finds no loss; pass the plain model and torch_compile=True, or call model.compile()"
        )


def refuse_label_names(args: TrainingArguments) -> None:
    """Refuse `label_names` for methods that read the labels themselves, from the column `labels`.

    Raises:
        InputError: `label_names` has another name.
    """
    if args.label_names not in (None, ["labels"]):
        raise InputError(
            f"label_names={args.label_names}: this method reads the labels as `labels`; rename the column, and leave "
            "label_names out"
        )


def check_full_batch(args: TrainingArguments, dataset: Any) -> None:
    """Raise `InputError` if `dataloader_drop_last` drops every batch; training would do nothing and look finished.

    Args:
        args: the batch size, the number of processes and `dataloader_drop_last` are read.
        dataset: the training data; a data set of unknown length is accepted.
    """
    if not args.dataloader_drop_last or not hasattr(dataset, "__len__"):
        return
    rows, batch = len(dataset), args.train_batch_size * args.world_size
    if 0 < rows < batch:
        size = f"a batch of {batch}" + (f" over {args.world_size} processes" if args.world_size > 1 else "")
        raise InputError(
            f"dataloader_drop_last drops every batch: the training data has {rows} rows, fewer than {size}; pass a "
            f"per_device_train_batch_size of {max(1, rows // args.world_size)} or less, or leave it out"
        )


def _check_workers(args: TrainingArguments) -> None:
    """Refuse what torch's data loader refuses, which is created when training starts."""
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if (value := getattr(args, name)) and not args.dataloader_num_workers:
            raise InputError(
                f"{name}={value} is about worker processes, and dataloader_num_workers=0 starts none; pass "
                "dataloader_num_workers=1 or more, or leave it out"
            )
    context, known = args.dataloader_multiprocessing_context, multiprocessing.get_all_start_methods()
    if isinstance(context, str) and context not in known:
        raise InputError(
            f"dataloader_multiprocessing_context={context!r} is unknown here{did_you_mean(context, known)}; choose "
            f"from: {', '.join(known)}"
        )


def _check_report_to(args: TrainingArguments) -> None:
    available = get_available_reporting_integrations()
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for name in names if names not in (["all"], ["none"]) else []:
        if name in available or name in _NOT_LISTED:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = (*INTEGRATION_TO_CALLBACK, "all", "none")
            raise InputError(
                f"report_to={name} is unknown{did_you_mean(name, known)}; choose from: {', '.join(known)}"
            )
        raise InputError(
            f"report_to={name}: its library is not installed; run pip install {_PACKAGES.get(name, name)}, or pass "
            "report_to=none"
        )
