"""Evaluate all candidates of a head's tensor in one pass through the head.

The candidates become rows: the module that owns the searched tensor returns `candidates x rows` rows instead of
`rows`. Modules before it in the head keep their recorded outputs, and modules after it run on the larger batch; after
the last layer, whose output the model returns as it is, nothing has to run. If only few entries of a linear layer
change, only the changes are multiplied with its input.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional

from hf_ft_ext.features import HeadReader
from hf_ft_ext.gradientless.optimizers.base import keep_freed_memory
from hf_ft_ext.gradientless.optimizers.candidates import Candidates, IndexView

_MAX_OUTPUT_ENTRIES = 2**22  # of the widest layer in one evaluation: 16 MiB in float32
_SPARSE = 8  # use the sparse product if fewer than 1/8 of the entries of a linear layer change


class HeadCannotBatch(Exception):
    """This head, or this parameter of it, has to be evaluated one candidate at a time."""


class Call:
    """Input and output of one module of the head in the pass at the current weights."""

    def __init__(self, position: int, x: torch.Tensor, out: torch.Tensor):
        self.position, self.x, self.out = position, x, out
        self.columns: torch.Tensor | None = None  # x transposed, computed when first needed
        self.version = None if out.is_inference() else out._version

    def returned(self, logits: torch.Tensor) -> bool:
        """Whether the head returned this output as it is."""
        return self.out is logits and self.version is not None and self.version == logits._version


class BatchedHead:
    """Evaluates candidates of a head's tensors on the features of one micro-batch.

    Args:
        reader: runs the head.
        names: name of each searched parameter, by `id`.
    """

    def __init__(self, reader: HeadReader, names: dict[int, str]):
        keep_freed_memory()
        self.reader = reader
        model = reader.model
        owners = {name.rpartition(".")[0] for name in dict(reader.head_parameters())}
        self.modules = {name: model.get_submodule(name) for name in sorted(owners)}
        self.owner = {
            key: (self.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for key, name in names.items()
        }

    # --- passes ------------------------------------------------------------------------------------

    def begin(self, features: torch.Tensor) -> torch.Tensor:
        """Run the head at the current weights and record each module's call; return the logits `[rows, classes]`."""
        self.features, self.calls = features, {}

        def record(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if id(module) in self.calls:
                raise HeadCannotBatch("a module of the head runs twice")
            out = self._plain(module, x)
            self.calls[id(module)] = Call(len(self.calls), x, out)
            return out

        logits = self._run(record, features.shape[0])
        self.final = {key for key, call in self.calls.items() if call.returned(logits)}
        return logits

    def logits(self, views: Sequence[IndexView], candidates: Candidates, rows: Sequence[int]) -> torch.Tensor:
        """Logits of the candidates `rows`: `[len(rows), batch rows, classes]`."""
        n, changed = len(rows), self._changes(views, candidates, rows)
        first = min(self.calls[key].position for key in changed)

        def changed_output(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
            call = self.calls[id(module)]
            if id(module) not in changed:
                return None
            if call.position == first:
                return self._on_known_input(module, call, changed[id(module)], n)
            return on_rows(module, x.view(n, -1, *x.shape[1:]), changed[id(module)].full())

        return self._replay(changed_output, first, n)

    def logits_from(self, module: nn.Module, out: torch.Tensor, n: int) -> torch.Tensor:
        """Logits `[n, batch rows, classes]` if `module` returns `out` (`[n * batch rows, ...]`)."""
        return self._replay(lambda other, x: out if other is module else None, self.calls[id(module)].position, n)

    def _replay(self, changed_output: Callable, first: int, n: int) -> torch.Tensor:
        """Run the head; modules before position `first` return their recorded outputs."""
        self.latest: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        batch = self.features.shape[0]
        for module in self.modules.values():  # the output of the last layer: nothing else has to run
            if id(module) in self.final and self.calls[id(module)].position == first:
                call = self.calls[id(module)]
                out = changed_output(module, call.x)
                self.latest[id(module)] = (None, out)
                return out.view(n, batch, -1)

        def replay(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            call = self.calls[id(module)]
            if call.position < first:
                return call.out
            out = changed_output(module, x)
            if out is None:
                out = self._plain(module, x)
            self.latest[id(module)] = (None if call.position == first else x, out)
            return out

        return self._run(replay, n * batch).view(n, batch, -1)

    def accept(self, row: int) -> None:
        """Update the recorded calls: the weights are now those of candidate `row` of the last evaluation."""
        batch = self.features.shape[0]
        part = slice(row * batch, (row + 1) * batch)
        for key, (x, out) in self.latest.items():
            call = self.calls[key]
            x = call.x if x is None else x[part].contiguous()
            self.calls[key] = Call(call.position, x, out[part].contiguous())

    def _run(self, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor], rows: int) -> torch.Tensor:
        modules = self.modules.values()
        self._replaced = {id(m): m.__dict__["forward"] for m in modules if "forward" in m.__dict__}
        for module in modules:
            # an instance attribute takes precedence over the class's method, and is removed afterwards
            module.__dict__["forward"] = lambda x, module=module: forward(module, x)
        try:
            return self.reader.logits(self.features, rows)
        finally:
            for module in modules:
                del module.__dict__["forward"]
                if id(module) in self._replaced:
                    module.__dict__["forward"] = self._replaced[id(module)]

    def _plain(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Output of the module by its class's forward, or by the forward that `PerturbedForward` installed."""
        forward = self._replaced.get(id(module))
        return type(module).forward(module, x) if forward is None else forward(x)

    # --- one module --------------------------------------------------------------------------------

    def _changes(
        self, views: Sequence[IndexView], candidates: Candidates, rows: Sequence[int]
    ) -> dict[int, "_Changed"]:
        values = candidates.block() if len(rows) == len(candidates) else candidates.block()[list(rows)]
        changed: dict[int, _Changed] = {}
        parts = values.split([view.size for view in views], dim=1) if len(views) > 1 else [values]
        for view, part in zip(views, parts, strict=True):
            owner, name = self.owner[id(view.parameter)]
            if id(owner) not in self.calls:
                raise HeadCannotBatch("a searched tensor is not part of the head's forward")
            changed.setdefault(id(owner), _Changed()).parts[name] = (view, part)
        return changed

    def _on_known_input(self, module: nn.Module, call: Call, changed: "_Changed", n: int) -> torch.Tensor:
        """Output of `module` for its recorded input, `[n * rows, ...]`."""
        out = call.out
        if type(module) is nn.Linear and len(changed.parts) == 1 and out.numel() == len(out) * out.shape[-1]:
            ((name, (view, values)),) = changed.parts.items()
            flat = out.reshape(len(out), -1)
            if name == "bias":
                # y - b + b', for each candidate's bias b'
                biases = changed.full()["bias"]
                return (flat - module.bias + biases[:, None]).view(-1, *out.shape[1:])
            if (
                view.indices is not None
                and view.size * _SPARSE < view.parameter.numel()
                and flat.dtype in (torch.float32, torch.float64)
            ):
                # y + x (W' - W)^T
                product = _sparse_product(call, view.parameter.detach(), view.indices, values, n).add_(
                    flat.t()[:, None]
                )
                return product.flatten(1).t().view(-1, *out.shape[1:])
            # x W'^T + b for all candidates as one product: their weights stacked along the outputs
            x = call.x.reshape(len(out), -1)
            weights = changed.full()["weight"]
            product = functional.linear(x, weights.flatten(0, 1)).view(len(x), n, -1).transpose(0, 1)
            if module.bias is not None:
                product = product + module.bias
            return product.reshape(-1, *out.shape[1:])
        return on_rows(module, call.x.expand(n, *call.x.shape), changed.full())


def on_rows(module: nn.Module, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Output of `module` with the `n` sets of parameters on `x` (`[n, rows, ...]`): `[n * rows, ...]`."""
    forward = module.__dict__.pop("forward", None)  # functional_call has to use the forward of the class

    def call(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(module, parameters, (x,))

    try:
        return vmap(call)(parameters, x).flatten(0, 1)
    finally:
        if forward is not None:
            module.__dict__["forward"] = forward


def chunks(rows: Sequence[int], batch: int, width: int) -> list[Sequence[int]]:
    """Split `rows` so that one evaluation stays within `_MAX_OUTPUT_ENTRIES`."""
    size = max(1, _MAX_OUTPUT_ENTRIES // max(1, batch * width))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class _Changed:
    """The changed parameters of one module: name -> (view, values `[n, u]`)."""

    def __init__(self):
        self.parts: dict[str, tuple[IndexView, torch.Tensor]] = {}

    def full(self) -> dict[str, torch.Tensor]:
        """Each changed parameter with all its entries: `[n, *shape]`."""
        result = {}
        for name, (view, values) in self.parts.items():
            parameter = view.parameter.detach()
            if view.indices is None:
                result[name] = values.view(-1, *parameter.shape)
                continue
            full = parameter.view(1, -1).repeat(len(values), 1)
            full[:, view.indices] = values
            result[name] = full.view(-1, *parameter.shape)
        return result


def _sparse_product(
    call: Call, weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, n: int
) -> torch.Tensor:
    """`x @ (changed weight - weight)^T` for each candidate, `[out, n, rows]`.

    Computed by `embedding_bag` with one bag per output `o` and candidate `i`: the sum over the changed entries
    `(o, j)` of `change_i[o, j] * x^T[j]`. Entries are sorted by output, and within an output by candidate, so that
    each bag is contiguous and the result has the batch rows last.
    """
    outputs, inputs = weight.shape
    if call.columns is None:
        call.columns = call.x.reshape(len(call.out), -1).t().contiguous()
    change = values - weight.view(-1)[indices]
    device = indices.device
    # start and number of the changed entries of each output
    edges = torch.searchsorted(indices, torch.arange(0, weight.numel() + 1, inputs, device=device))
    start, length = edges[:-1], edges.diff()
    candidate = torch.arange(n, device=device)
    output = indices // inputs
    # entry e of candidate i goes to position n * start + i * length + (e - start)
    first = (n - 1) * start[output] + torch.arange(len(indices), device=device)
    order = (first + candidate[:, None] * length[output]).flatten()
    product = functional.embedding_bag(
        torch.empty_like(order).index_copy_(0, order, (indices % inputs).repeat(n)),
        call.columns,
        (n * start[:, None] + candidate * length[:, None]).flatten(),
        mode="sum",
        per_sample_weights=torch.empty_like(change.view(-1)).index_copy_(0, order, change.view(-1)),
    )
    return product.view(outputs, n, -1)
