"""The tasks that the launcher knows by name: GLUE, the few-shot suite, the demo. One table."""

import difflib
from dataclasses import dataclass, field

from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import CLASSIFICATION, REGRESSION


@dataclass(frozen=True)
class Task:
    """Where a task's data is and what it looks like.

    Copies of one data set differ in column names and label spelling, so columns are lists of
    candidates, the first that is there being taken, and labels may have aliases. The ids of the
    labels always follow `label_names`.
    """

    name: str
    text_columns: tuple[tuple[str, ...], ...]  # candidates, each of one or two columns
    label_names: tuple[str, ...] | None  # None: regression, or own data whose labels are read from it
    hub_id: str | None = None
    hub_config: str | None = None
    label_columns: tuple[str, ...] = ("label", "labels")  # candidates
    label_aliases: dict[str, str] = field(default_factory=dict)  # spelling elsewhere -> label name
    metric: str = "accuracy"
    problem_type: str = CLASSIFICATION
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    bounds: tuple[float, float] | None = None  # ends of a regression's scale
    positive_label: str | None = None  # the class that F1, precision and recall are about; None: not settled


GLUE_ID = "nyu-mll/glue"
_NLI = ("entailment", "neutral", "contradiction")
_POLARITY = ("negative", "positive")
_TEXT = (("text",), ("sentence",))
# Copies without ClassLabel features spell the labels out in a column of their own.
_SPELT = ("label_text", "label", "labels")


def _glue(name: str, columns: tuple[str, ...], label_names: tuple[str, ...] | None, **kwargs) -> Task:
    return Task(name, (columns,), label_names, hub_id=GLUE_ID, hub_config=name, **kwargs)


_PAIR = ("sentence1", "sentence2")
_TASKS = (
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), metric="matthews", positive_label="acceptable"),
    _glue(
        "mnli",
        ("premise", "hypothesis"),
        _NLI,
        validation_splits=("validation_matched", "validation_mismatched"),
        test_splits=("test_matched", "test_mismatched"),
    ),
    _glue("mrpc", _PAIR, ("not_equivalent", "equivalent"), metric="accuracy_f1", positive_label="equivalent"),
    _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment"), positive_label="entailment"),
    _glue(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        metric="accuracy_f1",
        positive_label="duplicate",
    ),
    _glue("rte", _PAIR, ("entailment", "not_entailment"), positive_label="entailment"),
    _glue("sst2", ("sentence",), _POLARITY, positive_label="positive"),
    _glue("stsb", _PAIR, None, metric="pearson_spearman", problem_type=REGRESSION, bounds=(0.0, 5.0)),
    _glue("wnli", _PAIR, ("not_entailment", "entailment"), positive_label="entailment"),
    Task(
        "mr",
        _TEXT,
        _POLARITY,
        hub_id="cornell-movie-review-data/rotten_tomatoes",
        label_aliases={"neg": "negative", "pos": "positive"},
        positive_label="positive",
    ),
    Task("cr", _TEXT, _POLARITY, hub_id="SetFit/SentEval-CR", label_columns=_SPELT, positive_label="positive"),
    Task("mpqa", _TEXT, _POLARITY, hub_id="jxm/mpqa", label_columns=_SPELT, positive_label="positive"),
    Task("subj", _TEXT, ("subjective", "objective"), hub_id="SetFit/subj", label_columns=_SPELT),
    Task(
        "trec",
        _TEXT,
        ("description", "entity", "abbreviation", "human", "location", "number"),
        hub_id="SetFit/TREC-QC",
        # The fine classes are in `label` there, the coarse ones in columns of their own.
        label_columns=("label_coarse_original", "coarse_label", "label-coarse", "label", "labels"),
        label_aliases={
            "DESC": "description",
            "ENTY": "entity",
            "ABBR": "abbreviation",
            "HUM": "human",
            "LOC": "location",
            "NUM": "number",
        },
    ),
    Task(
        "sst5",
        _TEXT,
        ("very negative", "negative", "neutral", "positive", "very positive"),
        hub_id="SetFit/sst5",
        label_columns=_SPELT,
    ),
    Task("snli", (("premise", "hypothesis"),), _NLI, hub_id="stanfordnlp/snli"),
    Task("ag_news", (("text",), ("description",)), ("World", "Sports", "Business", "Sci/Tech"), "fancyzhx/ag_news"),
    Task("demo", (("sentence",),), _POLARITY, positive_label="positive"),
)
TASKS = {task.name: task for task in _TASKS}


def get_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        InputError: unknown name; the message says which names come near.
    """
    key = name.lower().replace("-", "_")
    key = {"sst_2": "sst2", "sts_b": "stsb", "sst_5": "sst5", "agnews": "ag_news"}.get(key, key)
    if key not in TASKS:
        near = difflib.get_close_matches(key, TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(
            f"unknown task '{name}'; {hint}Known: {', '.join(TASKS)}. For other data leave --task_name out and pass "
            "--dataset_name or --train_file"
        )
    return TASKS[key]
