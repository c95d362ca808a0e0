"""`--hp_search`: choosing learning rate and batch size with Optuna before the final training."""

import copy
import importlib.util
import logging
import math
import os
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_ft_ext.errors import DivergedError, InputError
from hf_ft_ext.files import write_json

logger = logging.getLogger(__name__)

RESULT_FILE = "hp_search.json"
LEARNING_RATES = (1e-6, 1e-1)  # the search range of the SparseGrad authors
BATCH_SIZES = (16, 32)


def require_optuna() -> None:
    """Raise an `InputError` if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError('--hp_search needs Optuna: pip install "hf_ft_ext[hp]", or leave --hp_search out')


def search_hyperparameters(
    build_trainer: Callable[[TrainingArguments], Trainer], args: TrainingArguments, n_trials: int
) -> dict[str, Any]:
    """Try `n_trials` pairs of learning rate and batch size, set the best in `args`, write `hp_search.json`.

    Trials run with `args` but without checkpoints, and are compared by their final `args.metric_for_best_model`.
    The sampler is seeded from `args.seed`; every process draws the same pairs.

    Args:
        build_trainer: makes a trainer from arguments, with a fresh copy of the model.

    Returns:
        The best values by argument name.
    """
    require_optuna()
    import optuna

    if args.metric_for_best_model is None:  # with --prediction_loss_only there is no other metric
        args.metric_for_best_model, args.greater_is_better = "loss", False
    key = "eval_" + args.metric_for_best_model.removeprefix("eval_")
    worst = -math.inf if args.greater_is_better else math.inf
    direction = "maximize" if args.greater_is_better else "minimize"
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=args.seed))
    trials: list[dict[str, Any]] = []
    for number in range(n_trials):
        trial = study.ask()
        values = {
            "learning_rate": trial.suggest_float("learning_rate", *LEARNING_RATES, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", BATCH_SIZES),
        }
        value = _value_of(build_trainer(_trial_arguments(args, values)), key)
        value = value if math.isfinite(value) else worst
        study.tell(trial, value)
        trials.append({"trial": number, **values, key: value})
        logger.info("Trial %d of %d: %s", number + 1, n_trials, trials[-1])
    best = study.best_params
    for name, value in best.items():
        setattr(args, name, value)
    if args.process_index == 0:
        write_json(os.path.join(args.output_dir, RESULT_FILE), {"metric": key, "best": best, "trials": trials})
    logger.info("Best of %d trials: %s", n_trials, best)
    return best


def _value_of(trainer: Trainer, key: str) -> float:
    """The metric `key` after training; all processes use the first process's value.

    NaN if training diverges: such a trial must lose, not abort the search. Several processes need not notice it in the
    same step, so there the error ends the search.
    """
    try:
        trainer.train()
    except DivergedError as error:
        if trainer.args.world_size > 1:
            raise
        logger.warning("The trial diverged: %s", error)
        return math.nan
    (value,) = broadcast_object_list([trainer.evaluate()[key]])
    return value


def _trial_arguments(args: TrainingArguments, values: dict[str, Any]) -> TrainingArguments:
    """A copy of `args` for one trial, which writes no files."""
    own = copy.copy(args)
    own.save_strategy, own.load_best_model_at_end, own.push_to_hub = SaveStrategy.NO, False, False
    for name, value in values.items():
        setattr(own, name, value)
    return own
