"""Engine `jacobian`: full Jacobians by `torch.func`, and one matrix product. The reference for other engines.

When to use it: to check the other engines, and for small modules of any kind. `structured` gives the same kernel and
is several times as fast.

Cost, for N1 and N2 rows of C scalars and P parameters: one forward and C backward passes with all weight gradients
for each row, repeated for the second side with every block of the first; the product takes `O(N1 N2 C^2 P)`. If
`vmap` supports the model (with eager attention), the rows of a batch run together, otherwise one by one.

Memory: C P values for each row of a block's two sides. The number of tokens matters only to the passes.

Error: rounding only; signs are taken in float64 by the rule of `formulas.ZERO`.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_ft_ext.kernel.engines.base import ExactEngine
from hf_ft_ext.kernel.formulas import sign_scale
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.per_example.state import batch_in, computing_in, evaluating, only_trainable
from hf_ft_ext.per_example.types import as_rows

logger = logging.getLogger(__name__)


@dataclass
class JacobianRows:
    """Jacobians of some examples: `[rows, entries]` by parameter; `order` and `scale` as for the structured engine."""

    order: list[int]
    scalars: int
    values: dict[str, torch.Tensor]
    scale: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of gradient rows: examples times scalars."""
        return len(self.order) * self.scalars

    def of_scalar(self, scalar: int) -> "JacobianRows":
        """The rows of one scalar."""
        values = {name: value[scalar :: self.scalars] for name, value in self.values.items()}
        return JacobianRows(self.order, 1, values, None if self.scale is None else self.scale[scalar :: self.scalars])

    def bytes(self) -> int:
        """Memory of the Jacobians."""
        return sum(value.nbytes for value in self.values.values())

    def constant_bytes(self, length: int) -> int:
        """The part that does not depend on the number of tokens: all of it."""
        return self.bytes()

    def names(self) -> set[str]:
        """Parameters with a gradient."""
        return set(self.values)

    def largest(self) -> int:
        """Entries of the largest parameter."""
        return max(value.shape[1] for value in self.values.values())


class JacobianEngine(ExactEngine[JacobianRows]):
    """Computes Jacobians in full, and their kernels. Arguments as for `ExactEngine`."""

    builds_batch_graph = False
    _vectorized = True  # until vmap fails for the model

    def gradient_rows(self, rows: ExampleRows, batches: Sequence[Sequence[int]]) -> JacobianRows:
        """The Jacobians of `batches` (positions in `rows`)."""
        parts = [self._jacobians(rows.batch(indices, self.device)) for indices in batches]
        values = {name: torch.cat([as_rows(part[name].flatten(0, 1)) for part in parts]) for name in self.parameters}
        order = [i for indices in batches for i in indices]
        side = JacobianRows(order, len(next(iter(values.values()))) // len(order), values)
        if self.formula.signs:
            side.scale = sign_scale(sum(value.square().sum(1) for value in values.values()))
        return side

    def _jacobians(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`[n, c, *shape]` by name."""
        wrapped = _Wrapped(self.model, self.function)
        with (
            evaluating(self.model),
            computing_in(self.model, self.dtype),
            only_trainable(self.model, ()),
            _eager_attention(self.model),
        ):
            values = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
            batch = batch_in(batch, self.dtype)

            def one(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
                example = {key: value[None] for key, value in example.items()}
                # J[c] = e_c^T df/dtheta: one vector-Jacobian product per scalar
                scalars, pull = torch.func.vjp(
                    lambda given: torch.func.functional_call(wrapped, given, (example,)).reshape(-1), values
                )
                rows = [pull(unit)[0] for unit in torch.eye(len(scalars), dtype=scalars.dtype, device=scalars.device)]
                return {name: torch.stack([row[f"model.{name}"] for row in rows]) for name in self.parameters}

            if self._vectorized:
                try:
                    return torch.func.vmap(one)(batch)
                except (RuntimeError, ValueError) as error:  # vmap does not support code that branches on data
                    logger.info("torch.func.vmap does not support this model (%s): one example at a time", error)
                    self._vectorized = False
            n = len(next(iter(batch.values())))
            rows = [one({key: value[i] for key, value in batch.items()}) for i in range(n)]
        return {name: torch.stack([row[name] for row in rows]) for name in self.parameters}

    def add(self, left: JacobianRows, right: JacobianRows, name: str, total: torch.Tensor) -> None:
        """Add `J_p J'_p^T` of the parameter p."""
        views = [self.contraction.views(side.values[name], side.scale) for side in (left, right)]
        total += torch.stack(self.contraction.multiply(*views))


class _Wrapped(nn.Module):
    """Wraps a function of a model as a module, so that `functional_call` can replace the model's parameters."""

    def __init__(self, model: nn.Module, function: Function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.function(self.model, batch)


@contextlib.contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Switch to eager attention if the model supports it: its mask code does not branch on data."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    if before in (None, "eager") or not hasattr(inner, "set_attn_implementation"):
        yield
        return
    try:
        inner.set_attn_implementation("eager")
    except (ValueError, ImportError):
        yield
        return
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
