"""Arguments of a run as a whole: method, task type, output folder, early stopping, trials."""

from dataclasses import dataclass, field
from typing import Any

TASK_TYPES = SEQUENCE_CLASSIFICATION, CAUSAL_LM, SEQ2SEQ_LM = ("sequence_classification", "causal_lm", "seq2seq_lm")


@dataclass
class RunArguments:
    """What the launcher does with the run as a whole."""

    _argument_group_name = "run"

    method: str = field(default="sparse", metadata={"help": "Fine-tuning method (see `--help` without a method)."})
    recipe_row: str | None = field(
        default=None,
        metadata={"help": "Row of a table recipe, instead of `recipe.yaml#ROW`; `hf-ft-ext recipes` lists them."},
    )
    task_type: str = field(
        default=SEQUENCE_CLASSIFICATION,
        metadata={
            "help": "Task of the model. causal_lm: continue a text (language modelling, instruction tuning), needs "
            "the `trl` extra; seq2seq_lm: generate a completion from a prompt with an encoder-decoder.",
            "choices": TASK_TYPES,
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the run that `output_dir` holds: its checkpoints and run.json are deleted."},
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={
            "help": "Stop after this many evaluations in a row without a better `metric_for_best_model`; 0 = never. "
            "Needs `load_best_model_at_end`."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Load and convert; print the trained weights, the memory estimate and the steps; and stop."},
    )
    hp_search: int = field(
        default=0,
        metadata={
            "help": "Number of Optuna trials over learning rate (1e-6 to 1e-1, log) and batch size (16, 32) before "
            "the final training with the best values; 0 = none. Needs the `hp` extra."
        },
    )
    prediction_probabilities: bool = field(
        default=False,
        metadata={"help": "Add a column `probability_<label>` for each label to predictions.tsv."},
    )
    from_linearhead: bool = field(
        default=False,
        metadata={
            "help": "Start from a head fitted by linear probing on the training data (see method linearhead); a "
            "resumed run takes its checkpoint instead."
        },
    )
    given: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # options that the user set
