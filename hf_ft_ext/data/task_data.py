"""The data of one run, in the form that all later steps use."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, IterableDataset

from hf_ft_ext.data.origins import Origins
from hf_ft_ext.data.tasks import Task
from hf_ft_ext.metrics import MetricFunction, metric_function

LABEL = "label"  # the label column of every split that `load_data` returns


@dataclass
class TaskData:
    """The data of one run.

    Every split holds the columns `text_columns` and, unless it has no labels, `label`: class ids
    (a `ClassLabel` over `label_names`), float32 scores, or, with several labels per row, 0 and 1 for each label
    (float32 `[labels]`).
    """

    task: Task  # created from the arguments for own data
    train: Dataset | IterableDataset | None  # a stream if `streaming`
    validation: dict[str, Dataset]  # by split name, in order; may be empty
    test: dict[str, Dataset]  # by split name, in order; may be empty
    label_names: list[str] | None  # None: regression, or no split has labels
    problem_type: str  # "single_label_classification", "multi_label_classification" or "regression"
    metric: str | Sequence[str]  # what `metric_function` takes
    text_columns: tuple[str, ...]  # one or two
    origins: Origins = field(default_factory=dict)  # of every split, by role and name
    positive_label: str | None = None  # name of the positive class, if a metric needs one
    # By role and split name, where rows are left out: the number of each row in its source, from 0.
    row_numbers: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def metric_function(self, threshold: str | float | None = None) -> MetricFunction:
        """Return `compute_metrics` of the data for the current order of labels (see `hf_ft_ext.metric_function`)."""
        names = self.label_names
        if names is not None and len(names) == 1:
            names = None  # rows to evaluate, which lack most of the model's labels; it names them later
        return metric_function(
            self.metric,
            names,
            positive_label=self.positive_label if names is not None else None,
            problem_type=self.problem_type,
            threshold=0.5 if threshold is None else threshold,
            label_order=self.task.label_names,
        )
