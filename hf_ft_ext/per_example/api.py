"""`example_gradients` and `example_norms`: per-example gradients of any transformers model, for your own code."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.per_example.gradients import ExampleGradients
from hf_ft_ext.per_example.state import Batch, batch_size
from hf_ft_ext.per_example.types import Gradient, dense, squared_norms


@dataclass(frozen=True)
class BatchGradients:
    """Gradients of the examples of one batch.

    Attributes:
        scalars: the differentiated scalars: `[n, c]`.
        gradients: parameter name -> `[n, *shape]`, or `[n, c, *shape]` if there are several scalars.
    """

    scalars: torch.Tensor
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class FactoredGradients:
    """Gradients of some examples of a batch, as factors.

    A batch yields one object, or one object per example where some parameter has no rule.

    Attributes:
        first: position in the batch of the first of these examples.
        scalars: the differentiated scalars: `[n, c]`.
        gradients: for each of the c scalars, parameter name -> one `LinearGradient`, `EmbeddingGradient` or
            `DenseGradient` per use of the parameter. The gradient is their sum. An absent parameter has gradient 0.
    """

    first: int
    scalars: torch.Tensor
    gradients: list[dict[str, list[Gradient]]]


def example_gradients(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    function: Function | None = None,
    parameters: Iterable[str] | None = None,
    *,
    factored: bool = False,
    dtype: torch.dtype | None = None,
) -> Iterator[BatchGradients | FactoredGradients]:
    """Yield the gradients of each example, batch by batch.

    The result equals `vmap(grad)`, at about the cost of one backward pass over the batch. The gradient of a linear
    layer is computed from its activations and output gradients (Goodfellow 2015, arXiv 1510.01799). The first batch
    compares the rule of each module with autograd; if no rule covers a parameter, the examples run one by one.
    Dropout is off, and the model's state is restored afterwards. Half-precision models give float32 gradients.

    Args:
        model: any transformers model, with or without adapters, or a module that takes the batches.
        batches: mappings from input names to tensors with a row per example, or one such mapping.
        function: `function(model, batch)` -> one scalar per example `[n]`, or several `[n, c]`; each may depend only
            on its own example. Default: the logits, without passing labels to the model.
        parameters: names; `None` = all that require gradients.
        factored: yield the factors (`FactoredGradients`) instead of full gradients, which take n * p values for p
            parameters.
        dtype: type to compute in; `None` = the model's own.

    Yields:
        One `BatchGradients` for each batch; with `factored`, one or more `FactoredGradients`.

    Raises:
        InputError: an unknown parameter, or a model or function whose per-example gradients are not defined.
    """
    engine = _engine(model, function, parameters, dtype)
    for batch in _batches(batches, engine):
        parts = engine(batch)
        if factored:
            for part in parts:
                yield FactoredGradients(part.first, part.scalars, part.gradients)
        else:
            yield _dense_batch(engine, parts, batch_size(batch))


def example_norms(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    function: Function | None = None,
    parameters: Iterable[str] | None = None,
    *,
    by_parameter: bool = False,
    dtype: torch.dtype | None = None,
) -> Iterator[torch.Tensor | dict[str, torch.Tensor]]:
    """Yield the Euclidean norm of each example's gradient, batch by batch, without materializing the gradients.

    The norm of a linear layer's gradient is computed over pairs of tokens where that is cheaper,
    `|sum_t g_t a_t^T|^2 = sum_ts <g_t, g_s> <a_t, a_s>` (the "ghost norm", Li et al. 2022, arXiv 2110.05679). The
    backward pass frees each parameter's gradient before it reaches the next one.

    Args:
        model, batches, function, parameters, dtype: as for `example_gradients`.
        by_parameter: yield one norm per parameter instead of one over all parameters.

    Yields:
        For each batch `[n]`, or `[n, c]` if there are several scalars; with `by_parameter`, name -> such a tensor.

    Raises:
        InputError: as for `example_gradients`.
    """
    engine = _engine(model, function, parameters, dtype)
    for batch in _batches(batches, engine):
        n = batch_size(batch)
        columns: list[int] = []
        squares: dict[tuple[str, int], torch.Tensor] = {}

        def receive(name, gradients, scalar, first):
            found = squared_norms(gradients).clamp_min(0)  # negative only by rounding
            total = squares.setdefault((name, scalar), found.new_zeros(n))  # noqa: B023
            total[first : first + len(found)] += found

        counted = engine.function
        engine.function = _counting(counted, columns)
        try:
            engine.stream(batch, receive)
        finally:
            engine.function = counted
        norms = _norms(engine, squares, n, columns[-1])
        # |G|^2 = sum over parameters p of |G_p|^2
        yield norms if by_parameter else torch.stack(list(norms.values())).square().sum(0).sqrt()


def _counting(function: Function, columns: list[int]) -> Function:
    """`function`, which also appends the number of scalars per example to `columns`."""

    def counting(model: nn.Module, batch: Batch) -> torch.Tensor:
        scalars = function(model, batch)
        columns.append(scalars.shape[1] if scalars.ndim == 2 else 1)
        return scalars

    return counting


def _norms(
    engine: ExampleGradients, squares: dict[tuple[str, int], torch.Tensor], n: int, c: int
) -> dict[str, torch.Tensor]:
    some = next(iter(squares.values()), None)
    norms = {}
    for name, parameter in engine.parameters.items():
        zero = torch.zeros(n, device=parameter.device) if some is None else torch.zeros_like(some)
        columns = [squares.get((name, scalar), zero).sqrt() for scalar in range(c)]
        norms[name] = columns[0] if c == 1 else torch.stack(columns, 1)
    return norms


def _engine(
    model: nn.Module, function: Function | None, parameters: Iterable[str] | None, dtype: torch.dtype | None
) -> ExampleGradients:
    own = dict(model.named_parameters())
    chosen = None
    if parameters is not None:
        chosen = {}
        for name in parameters:
            if name not in own:
                raise InputError(
                    f"the model has no parameter {name!r}{did_you_mean(name, own)}; pass names of "
                    "model.named_parameters()"
                )
            chosen[name] = own[name]
        if not chosen:
            raise InputError("parameters is empty; name at least one, or leave it out for all that require gradients")
    return ExampleGradients(model, function, chosen, dtype, wide_trial=False)


def _batches(batches: Batch | Iterable[Batch], engine: ExampleGradients) -> Iterator[Batch]:
    device = next(iter(engine.parameters.values())).device
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        yield {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _dense_batch(engine: ExampleGradients, parts: Iterator, n: int) -> BatchGradients:
    """The full gradients of a batch, assembled from its parts."""
    scalars: list[torch.Tensor] = []
    values: dict[str, torch.Tensor] = {}
    for part in parts:
        scalars.append(part.scalars)
        c = part.scalars.shape[1]
        rows = slice(part.first, part.first + len(part.scalars))
        for scalar, gradients in enumerate(part.gradients):
            for name, uses in gradients.items():
                found = dense(uses)
                if name not in values:
                    values[name] = found.new_zeros(n, c, *engine.parameters[name].shape)
                values[name][rows, scalar] = found
    for name, parameter in engine.parameters.items():
        if name not in values:
            kind = torch.promote_types(engine.dtype or parameter.dtype, torch.float32)
            values[name] = parameter.new_zeros(n, c, *parameter.shape, dtype=kind)
    ordered = {name: values[name] if c > 1 else values[name][:, 0] for name in engine.parameters}
    return BatchGradients(torch.cat(scalars), ordered)
