"""What the exact engines have in common: gradient rows of some examples, and their products by parameter."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from hf_ft_ext.kernel.engines.contraction import Contraction
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.per_example.capture import Function

Side = TypeVar("Side", bound=Any)  # gradient rows of some examples: `JacobianSide` or `StructuredSide`


class ExactEngine(ABC, Generic[Side]):
    """Computes sides, the gradient rows of some examples, and the kernels of two sides.

    Args:
        model: it is run in evaluation mode and left as it was.
        function: from model and batch to scalars `[n]` or `[n, c]`, each depending on its own example only.
        parameters: the chosen ones by name.
        formula: which kernel.
        dtype: type to compute gradients in.

    Attributes:
        keeps_graph: whether a side takes a graph of several examples at a time.
        uncovered: names of the parameters without a rule, after `prepare`.
    """

    keeps_graph: ClassVar[bool]

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
        return ()

    def prepare(self, rows: ExampleRows) -> None:
        """Find out from `rows` how the model is run."""

    @abstractmethod
    def side(self, rows: ExampleRows, batches: Sequence[Sequence[int]]) -> Side:
        """The gradient rows of `batches` (positions in `rows`)."""

    @abstractmethod
    def add(self, left: Side, right: Side, name: str, total: torch.Tensor) -> None:
        """Add what the parameter `name` gives to `total` `[kernels, rows, rows']`."""

    def kernels(self, left: Side, right: Side) -> torch.Tensor:
        """`[kernels, n, c, n', c]` in float64, examples in the sides' orders; it may hold NaN."""
        total = self._zeros(left, right)
        # K = sum over parameters p of <d f / d p, d f' / d p>; a parameter that one side lacks has gradient 0
        for name in sorted(left.names() & right.names()):
            self.add(left, right, name, total)
        c = left.scalars
        return total.view(len(total), left.rows // c, c, right.rows // c, c).cpu()

    def of_parameter(self, left: Side, right: Side, name: str) -> torch.Tensor:
        """What one parameter adds: `[kernels, rows, rows']`."""
        total = self._zeros(left, right)
        self.add(left, right, name, total)
        return total

    def _zeros(self, left: Side, right: Side) -> torch.Tensor:
        shape = (self.formula.kernels, left.rows, right.rows)
        return torch.zeros(shape, dtype=torch.float64, device=self.device)
