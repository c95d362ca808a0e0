"""The training side of a solved kernel: what has to be kept of the training data so that others can be predicted."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.rows import ExampleRows

_VALUES, _SHAPES = "values", "shapes"


class TrainingRows:
    """The inputs of the training rows, from which an exact kernel's other side is computed again.

    It stands in the place of a trainer's training data set: it has a length, and its `rows` are ready.

    Args:
        rows: the training data's.
    """

    kind: ClassVar[str] = "rows"

    def __init__(self, rows: ExampleRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """For each input the values of all rows, one after the other in their own type, and each row's shape.

        Padding at the right is left out.
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
        """The rows that `tensors` took apart.

        Raises:
            InputError: the tensors are of something else.
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
    """The projected gradients of the training rows, for engine `projected`: new rows are multiplied with them.

    It stands in the place of a trainer's training data set.

    Args:
        features: `[N, C, k]`.
    """

    kind: ClassVar[str] = "features"

    def __init__(self, features: torch.Tensor):
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The features as they are."""
        return {"features": self.features}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], pad_token_id: int | None) -> "TrainingFeatures":
        """The features that `tensors` named.

        Raises:
            InputError: the tensors are of something else.
        """
        features = tensors.get("features")
        if features is None or features.ndim != 3:
            raise InputError("the saved training features are incomplete; save the solved kernel again")
        return cls(features)


# What a solved kernel keeps of its training data; one class for each way to compute a kernel with new rows.
TrainingSide = TrainingRows | TrainingFeatures
KINDS: dict[str, type[TrainingSide]] = {kind.kind: kind for kind in (TrainingRows, TrainingFeatures)}
