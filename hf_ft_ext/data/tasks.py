"""The table of tasks known by name: GLUE, SuperGLUE, the few-shot suite and the demo."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset

from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import CLASSIFICATION, REGRESSION


@dataclass(frozen=True)
class Task:
    """The location and format of a task's data.

    Copies of a data set differ in column names and label spelling. Columns are therefore lists of candidates, of which
    the first existing one is taken, and labels may have aliases. Label ids always follow `label_names`.
    """

    name: str
    text_columns: tuple[tuple[str, ...], ...]  # candidates, each of one column or several
    label_names: tuple[str, ...] | None  # None: regression, or own data whose labels are read from it
    hub_id: str | None = None
    hub_config: str | None = None
    label_columns: tuple[str, ...] = ("label", "labels")  # candidates
    label_aliases: dict[str, str] = field(default_factory=dict)  # spelling elsewhere -> label name
    metric: str = "accuracy"
    problem_type: str = CLASSIFICATION
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    bounds: tuple[float, float] | None = None  # lower and upper end of a regression's scale
    positive_label: str | None = None  # the positive class of F1, precision and recall; None: undefined
    options: tuple[str, ...] = ()  # text columns that hold the answers of each row, one per label
    prepare: Callable[[Dataset], Dataset] | None = None  # merges the content of other columns into the text columns


GLUE_ID = "nyu-mll/glue"
SUPERGLUE_ID = "aps/super_glue"
_FALSE_TRUE = ("False", "True")
_NLI = ("entailment", "neutral", "contradiction")
_POLARITY = ("negative", "positive")
_TEXT = (("text",), ("sentence",))
# Copies without ClassLabel features have the label names in a separate column.
_COLUMNS = ("label_text", "label", "labels")


def _glue(name: str, columns: tuple[str, ...], label_names: tuple[str, ...] | None, **kwargs) -> Task:
    return Task(name, (columns,), label_names, hub_id=GLUE_ID, hub_config=name, **kwargs)


def _superglue(name: str, columns: tuple[str, ...], label_names: tuple[str, ...], **kwargs) -> Task:
    return Task(name, (columns,), label_names, hub_id=SUPERGLUE_ID, hub_config=name, **kwargs)


def _copa_premise(data: Dataset) -> Dataset:
    """Replace the full stop of each premise by "because" (the answer is a cause) or "so" (it is an effect).

    The options continue this sentence, so their first words become lower case, except "I", as in MeZO.
    """
    if not {"premise", "question", "choice1", "choice2"} <= set(data.column_names):
        return data

    def convert(batch: dict[str, list]) -> dict[str, list]:
        links = {"cause": " because", "effect": " so"}
        unknown = set(batch["question"]) - set(links)
        if unknown:
            raise InputError(f"column 'question' of copa holds {unknown.pop()!r}; it is either 'cause' or 'effect'")
        lower = [[_continuing(text) for text in batch[column]] for column in ("choice1", "choice2")]
        premises = [
            text.rstrip().removesuffix(".") + links[kind]
            for text, kind in zip(batch["premise"], batch["question"], strict=True)
        ]
        return {"premise": premises, "choice1": lower[0], "choice2": lower[1]}

    return data.map(convert, batched=True, keep_in_memory=True)


def _continuing(text: str) -> str:
    first, space, rest = text.partition(" ")
    return text if first == "I" else f"{first.lower()}{space}{rest}"


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
    Task("cr", _TEXT, _POLARITY, hub_id="SetFit/SentEval-CR", label_columns=_COLUMNS, positive_label="positive"),
    Task("mpqa", _TEXT, _POLARITY, hub_id="jxm/mpqa", label_columns=_COLUMNS, positive_label="positive"),
    Task("subj", _TEXT, ("subjective", "objective"), hub_id="SetFit/subj", label_columns=_COLUMNS),
    Task(
        "trec",
        _TEXT,
        ("description", "entity", "abbreviation", "human", "location", "number"),
        hub_id="SetFit/TREC-QC",
        # `label` may hold the fine classes; the coarse ones are then in a separate column.
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
        label_columns=_COLUMNS,
    ),
    Task("snli", (("premise", "hypothesis"),), _NLI, hub_id="stanfordnlp/snli"),
    Task("ag_news", (("text",), ("description",)), ("World", "Sports", "Business", "Sci/Tech"), "fancyzhx/ag_news"),
    _superglue(
        "boolq",
        ("passage", "question"),
        _FALSE_TRUE,
        positive_label="True",
        label_aliases={"no": "False", "yes": "True"},
    ),
    _superglue("cb", ("premise", "hypothesis"), ("entailment", "contradiction", "neutral")),
    _superglue(
        "copa",
        ("premise", "choice1", "choice2"),
        ("choice1", "choice2"),
        options=("choice1", "choice2"),
        prepare=_copa_premise,
    ),
    _superglue(
        "multirc", ("paragraph", "question", "answer"), _FALSE_TRUE, metric="accuracy_f1", positive_label="True"
    ),
    _superglue("wic", ("sentence1", "sentence2", "word"), _FALSE_TRUE, positive_label="True"),
    _superglue("wsc", ("text", "span1_text", "span2_text"), _FALSE_TRUE, positive_label="True"),
    Task("demo", (("sentence",),), _POLARITY, positive_label="positive"),
)
TASKS = {task.name: task for task in _TASKS}


def get_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        InputError: the name is unknown; the message suggests similar ones.
    """
    key = name.lower().replace("-", "_")
    key = {
        "sst_2": "sst2", "sts_b": "stsb", "sst_5": "sst5", "agnews": "ag_news", "commitmentbank": "cb",
    }.get(key, key)  # fmt: skip
    if key not in TASKS:
        near = difflib.get_close_matches(key, TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(
            f"unknown task '{name}'; {hint}Known: {', '.join(TASKS)}. For other data leave --task_name out and pass "
            "--dataset_name or --train_file"
        )
    return TASKS[key]
