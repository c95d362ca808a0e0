"""`--hp_search`: learning rate and batch size by Optuna, through `Trainer.hyperparameter_search`."""

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

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.files import write_json

logger = logging.getLogger(__name__)

RESULT_FILE = "hp_search.json"
LEARNING_RATES = (1e-6, 1e-1)  # the range in which SparseGrad's authors searched
BATCH_SIZES = (16, 32)


def require_optuna() -> None:
    """Raise an `InputError` if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError('--hp_search needs Optuna: pip install "hf_ft_ext[hp]", or leave --hp_search out')


def search_hyperparameters(
    build_trainer: Callable[[TrainingArguments], Trainer], args: TrainingArguments, n_trials: int
) -> dict[str, Any]:
    """Try `n_trials` pairs of learning rate and batch size, set the best in `args`, write `hp_search.json`.

    Trials run on `args` without checkpoints and are compared by `args.metric_for_best_model` at their end.
    The sampler is seeded from `args.seed`.

    Args:
        build_trainer: makes a trainer, with a `model_init`, from arguments.

    Returns:
        The best values by argument name.
    """
    require_optuna()
    import optuna

    trial_args = copy.copy(args)
    trial_args.save_strategy, trial_args.load_best_model_at_end = SaveStrategy.NO, False
    trial_args.push_to_hub = False
    if args.metric_for_best_model is None:  # --prediction_loss_only leaves nothing else to compare
        args.metric_for_best_model, args.greater_is_better = "loss", False
    key = "eval_" + args.metric_for_best_model.removeprefix("eval_")
    worst = -math.inf if args.greater_is_better else math.inf
    trials: dict[int, dict[str, Any]] = {}

    def space(trial) -> dict[str, Any]:
        values = {
            "learning_rate": trial.suggest_float("learning_rate", *LEARNING_RATES, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", BATCH_SIZES),
        }
        trials[trial.number] = dict(values)
        return values

    def objective(metrics: dict[str, float]) -> float:
        value = metrics[key] if math.isfinite(metrics[key]) else worst  # a diverged trial must lose, not end it all
        trials[max(trials)][key] = value
        return value

    trainer = build_trainer(trial_args)
    best = trainer.hyperparameter_search(
        hp_space=space,
        compute_objective=objective,
        n_trials=n_trials,
        direction="maximize" if args.greater_is_better else "minimize",
        backend="optuna",
        sampler=optuna.samplers.TPESampler(seed=args.seed),
        pruner=optuna.pruners.NopPruner(),
    )
    found = [best.hyperparameters if best is not None else None]  # only the first process knows
    broadcast_object_list(found)
    for name, value in found[0].items():
        setattr(args, name, value)
    if trainer.is_world_process_zero():
        record = {"metric": key, "best": found[0], "trials": [{"trial": n, **trials[n]} for n in sorted(trials)]}
        write_json(os.path.join(args.output_dir, RESULT_FILE), record)
    logger.info("Best of %d trials: %s", n_trials, found[0])
    return found[0]
