"""`ExactEngine`: base class of the exact engines. A kernel is a sum over parameters of products of gradient rows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from hf_ft_ext.kernel.engines.contraction import Contraction
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.per_example.capture import Function

GradientRows = TypeVar("GradientRows", bound=Any)  # `JacobianRows` or `StructuredRows`


class ExactEngine(ABC, Generic[GradientRows]):
    """Computes the gradient rows of examples, and the kernels between two sets of gradient rows.

    A gradient row is the gradient of one scalar of one example.

    Args:
        model: it runs in evaluation mode, and its state is restored.
        function: maps model and batch to scalars `[n]` or `[n, c]`, each depending only on its own example.
        parameters: the chosen ones by name.
        formula: the kernel's formula.
        dtype: type to compute gradients in.

    Attributes:
        builds_batch_graph: whether `gradient_rows` builds an autograd graph for a whole batch.
        uncovered: names of the parameters that no rule covers, after `prepare`.
    """

    builds_batch_graph: ClassVar[bool]

    def __init__(
        self,
        model: nn.Module,
        function: Function,
        parameters: dict[str, nn.Parameter],
        formula: Formula,
        dtype: torch.dtype,
    ):
        self.model, self.function, self.parameters = model, function, parameters
        self.formula, self.dtype = formula, dtype
        self.contraction = Contraction(formula)
        self.device = next(iter(parameters.values())).device

    @property
    def uncovered(self) -> Sequence[str]:
        """Names of the parameters that no rule covers."""
        return ()

    def prepare(self, rows: ExampleRows) -> None:
        """Verify on `rows` how the model can be run."""

    @abstractmethod
    def gradient_rows(self, rows: ExampleRows, batches: Sequence[Sequence[int]]) -> GradientRows:
        """The gradient rows of `batches` (positions in `rows`)."""

    @abstractmethod
    def add(self, left: GradientRows, right: GradientRows, name: str, total: torch.Tensor) -> None:
        """Add the contribution of the parameter `name` to `total` `[kernels, rows, rows']`."""

    def kernels(self, left: GradientRows, right: GradientRows) -> torch.Tensor:
        """The kernels `[kernels, n, c, n', c]` in float64, examples in the order of the rows; may hold NaN."""
        total = self._zeros(left, right)
        # K = sum over parameters p of <df/dp, df'/dp>; a parameter that is missing on one side has gradient 0
        for name in sorted(left.names() & right.names()):
            self.add(left, right, name, total)
        c = left.scalars
        return total.view(len(total), left.rows // c, c, right.rows // c, c).cpu()

    def of_parameter(self, left: GradientRows, right: GradientRows, name: str) -> torch.Tensor:
        """The contribution of one parameter: `[kernels, rows, rows']`."""
        total = self._zeros(left, right)
        self.add(left, right, name, total)
        return total

    def _zeros(self, left: GradientRows, right: GradientRows) -> torch.Tensor:
        shape = (self.formula.kernels, left.rows, right.rows)
        return torch.zeros(shape, dtype=torch.float64, device=self.device)
