"""The data of one run, as every later step takes it."""

from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset

from hf_ft_ext.data.origins import Origins
from hf_ft_ext.data.tasks import Task

LABEL = "label"  # the label column of every split that `load_data` returns


@dataclass
class TaskData:
    """The data of one run.

    Every split holds the columns `text_columns` and, unless it has no labels, `label`: class ids
    (a `ClassLabel` over `label_names`) or float32 scores.
    """

    task: Task  # for own data one made for the occasion
    train: Dataset | IterableDataset | None  # a stream if `streaming`
    validation: dict[str, Dataset]  # by split name, in order; may be empty
    test: dict[str, Dataset]  # by split name, in order; may be empty
    label_names: list[str] | None  # None: regression, or no split has labels
    problem_type: str  # "single_label_classification" or "regression"
    metric: str  # a name in `hf_ft_ext.metrics.METRICS`
    text_columns: tuple[str, ...]  # one or two
    origins: Origins = field(default_factory=dict)  # of every split, by role and name
