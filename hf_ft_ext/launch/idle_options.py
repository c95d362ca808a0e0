"""Options that would have no effect beside the rest of the command: one table, each refused with one line."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_ft_ext.arguments import PROMPT_DEMO, DataArguments, MethodTrainingArguments, ModelArguments, RunArguments
from hf_ft_ext.errors import InputError

logger = logging.getLogger(__name__)


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
    """When an option has no effect, and the message: what it is about, and what to do."""

    idle: Callable[[Command], bool]
    message: str


RULES: dict[str, Rule] = {
    "max_train_samples": Rule(
        lambda c: not c.training.do_train and c.data.few_shot_type != PROMPT_DEMO,
        "cuts the training rows, and this run does not train; add --do_train",
    ),
    "max_eval_samples": Rule(
        lambda c: not c.evaluates,
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
    "metric": Rule(
        lambda c: not c.evaluates and not c.training.do_predict,
        "is about evaluation, and this run does not evaluate; add --do_eval",
    ),
    "num_sample": Rule(
        lambda c: not c.evaluates and not c.training.do_predict,
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


def refuse_idle_options(command: Command) -> None:
    """Refuse what the user set and this run would not look at; log what a search overrides.

    Raises:
        InputError: there is such an option.
    """
    given = command.run.given
    for name, rule in RULES.items():
        value = given.get(name)
        if value not in (None, False, 0) and rule.idle(command):
            raise InputError(f"--{name} {value} {rule.message}, or leave it out")
    if command.run.hp_search:
        for name in ("learning_rate", "per_device_train_batch_size"):
            if name in given:
                logger.warning("--hp_search chooses %s: the value %s is not used.", name, given[name])
