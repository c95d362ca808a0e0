"""The training data of a solved kernel, in the form that is needed to predict new rows."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.rows import ExampleRows

_VALUES, _SHAPES = "values", "shapes"


class TrainingRows:
    """The inputs of the training rows, from which exact kernels with new rows are computed.

    A trainer from a folder has this object as its `train_dataset`: it has a length and collated `rows`.

    Args:
        rows: the rows of the training data.
    """

    kind: ClassVar[str] = "rows"

    def __init__(self, rows: ExampleRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """For each input, the concatenated values of all rows in their own type, and each row's shape.

        Padding at the right is removed.
        """
        rows = [self.rows.batch([i]) for i in range(len(self.rows))]
        tensors = {}
        for key in rows[0]:
            values = [row[key][0] for row in rows]
            tensors[f"{key}.{_VALUES}"] = torch.cat([value.reshape(-1) for value in values])
            tensors[f"{key}.{_SHAPES}"] = torch.tensor([list(value.shape) for value in values], dtype=torch.int64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], pad_token_id: int | None) -> "TrainingRows":
        """Make the rows from the result of `tensors`.

        Raises:
            InputError: the tensors do not describe training rows.
        """
        names = sorted(key.removesuffix(f".{_SHAPES}") for key in tensors if key.endswith(f".{_SHAPES}"))
        columns: dict[str, list[torch.Tensor]] = {}
        for name in names:
            shapes = [tuple(shape) for shape in tensors[f"{name}.{_SHAPES}"].tolist()]
            sizes = [torch.Size(shape).numel() for shape in shapes]
            values = tensors.get(f"{name}.{_VALUES}")
            if values is None or len(values) != sum(sizes):
                raise InputError(f"the saved training rows lack values of {name!r}; save the solved kernel again")
            columns[name] = [part.reshape(shape) for part, shape in zip(values.split(sizes), shapes, strict=True)]
        if not names or len({len(column) for column in columns.values()}) != 1:
            raise InputError("the saved training rows are incomplete; save the solved kernel again")
        count = len(columns[names[0]])
        batches = ({name: columns[name][i][None] for name in names} for i in range(count))
        return cls(ExampleRows(batches, pad_token_id))


class TrainingFeatures:
    """The projected gradients of the training rows, from which engine `projected` computes kernels with new rows.

    A trainer from a folder has this object as its `train_dataset`.

    Args:
        features: `[N, C, k]`.
    """

    kind: ClassVar[str] = "features"

    def __init__(self, features: torch.Tensor):
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The features, by name."""
        return {"features": self.features}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], pad_token_id: int | None) -> "TrainingFeatures":
        """Make the features from the result of `tensors`.

        Raises:
            InputError: the tensors do not hold features.
        """
        features = tensors.get("features")
        if features is None or features.ndim != 3:
            raise InputError("the saved training features are incomplete; save the solved kernel again")
        return cls(features)


# The forms of the training data: one for the exact engines, one for engine `projected`.
TrainingData = TrainingRows | TrainingFeatures
KINDS: dict[str, type[TrainingData]] = {kind.kind: kind for kind in (TrainingRows, TrainingFeatures)}
