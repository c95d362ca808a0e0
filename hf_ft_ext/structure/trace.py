"""Trace one forward pass: the inputs of each projection, and the products of projections' outputs.

A projection is a linear layer, or a weight that is multiplied with activations in another way (the three-dimensional
weights of experts, XLNet's `einsum`s). For each tensor of the pass, the tracer records the last projections on each
path to it, and the operations in between: `Path`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.structure.parts import unwrapped_name

# Products of two matrices: the operator -> the positions of the two.
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "_grouped_mm": (0, 1), "linear": (0, 1)}
_NONLINEAR = frozenset(
    "softmax _softmax _safe_softmax log_softmax _log_softmax logsumexp exp exp2 expm1 acos sigmoid silu gelu relu "
    "relu6 tanh erf softplus elu celu selu leaky_relu mish hardswish hardtanh hardsigmoid threshold "
    "log_sigmoid_forward".split()
)
_EMPTY = ("zeros", "ones", "empty", "full", "rand", "randn", "zero_", "fill_")
_MIXES_POSITIONS = ("convolution", "fft", "cumsum", "logcumsumexp", "cumprod")


@dataclass(frozen=True)
class Path:
    """How a tensor is computed from a projection's output, over all paths between them.

    Attributes:
        direct: some path has no activation function.
        curved: some path has one.
        products, most: smallest and largest number of products with other activations on a path.
        mixed: some path mixes positions in another way than by products.
    """

    direct: bool = True
    curved: bool = False
    products: int = 0
    most: int = 0
    mixed: bool = False

    def multiplied(self, times: int = 1) -> "Path":
        """The path continued through products with other activations."""
        return replace(self, products=self.products + times, most=self.most + times)

    def either(self, other: "Path") -> "Path":
        """The union of two sets of paths."""
        return Path(
            self.direct or other.direct,
            self.curved or other.curved,
            min(self.products, other.products),
            max(self.most, other.most),
            self.mixed or other.mixed,
        )


Paths = dict[str, Path]


@dataclass
class _Flow:
    """Where the data of a storage comes from: projections, or (before it is combined with inputs) parameters."""

    paths: Paths
    data: bool = False
    parameters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Call:
    """One call of a projection.

    Attributes:
        name: of the module, or of the weight if it is not in a linear layer.
        reads: id of the storage that it reads; equal ids = the same input.
        paths: the projections that its input is computed from.
        width_in, width_out: number of input and output features.
        order: position in the forward pass.
    """

    name: str
    reads: int
    paths: Paths
    width_in: int
    width_out: int
    order: int


@dataclass(frozen=True)
class Product:
    """A product of activations: the paths of its two operands (of query and key, for a fused attention operator)."""

    left: Paths
    right: Paths


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: paths of its first input tensor and its first output tensor."""

    name: str
    reads: int | None
    inputs: Paths
    outputs: Paths
    width: int | None
    start: int
    end: int


@dataclass
class Trace:
    """The record of a trial pass.

    Attributes:
        kinds: projection -> the module class, or `None` for a plain tensor.
        embeddings: names of the embedding tables in use.
    """

    calls: list[Call] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    kinds: dict[str, type[nn.Module] | None] = field(default_factory=dict)


def is_projection(module: nn.Module) -> bool:
    """Whether a module maps features to features, position by position: a linear layer or a convolution of width 1.

    Quantized and other linear layers are recognized by their `in_features` and `out_features`.
    """
    if isinstance(module, BaseTunerLayer):
        return is_projection(module.get_base_layer())
    if isinstance(module, nn.Linear | Conv1D):
        return True
    if isinstance(module, nn.Conv1d):
        return module.kernel_size == (1,)
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    inner = (part for part in module.modules() if part is not module)
    return all(isinstance(size, int) for size in sizes) and not any(isinstance(p, nn.Linear | Conv1D) for p in inner)


def widths(module: nn.Module) -> tuple[int, int]:
    """Number of input and output features of a projection."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    if isinstance(base, nn.Conv1d):
        return base.in_channels, base.out_channels
    return base.in_features, base.out_features


class Tracer(TorchDispatchMode):
    """Follows the data of one forward pass through `model`, operator by operator, and records it in `trace`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.trace = Trace()
        self._flows: dict[int, _Flow] = {}
        self._alive: list[torch.UntypedStorage] = []  # kept alive so that no address is reused for another storage
        self._inside = 0  # projections that are running
        self._order = 0
        for name, parameter in model.named_parameters():
            if (key := self._key(parameter)) is not None and key not in self._flows:
                self._flows[key] = _Flow({}, parameters=frozenset([unwrapped_name(name)]))

    # --- storages -----------------------------------------------------------------------------------

    def _key(self, tensor: torch.Tensor) -> int | None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor subclass without a storage
            return None
        self._alive.append(storage)
        return storage._cdata

    def _flow(self, tensor: torch.Tensor) -> _Flow:
        if not tensor.is_floating_point() and not tensor.is_complex():
            return _Flow({}, data=True) if self._known(tensor).data else _Flow({})
        return self._known(tensor)

    def _known(self, tensor: torch.Tensor) -> _Flow:
        key = self._key(tensor)
        return _Flow({}) if key is None else self._flows.get(key, _Flow({}))

    def _set(self, tensor: torch.Tensor, flow: _Flow) -> None:
        if (key := self._key(tensor)) is not None:
            self._flows[key] = flow

    def feed(self, batch: dict[str, torch.Tensor]) -> None:
        """Mark the inputs of the pass."""
        for tensor in batch.values():
            self._set(tensor, _Flow({}, data=True))

    # --- operators ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if inputs and outputs:
            name = func._schema.name.partition("::")[2]
            flow = self._result(name, args, inputs)
            for output in outputs:
                key = self._key(output)
                known = self._flows.get(key) if key is not None else None
                if known is not None and known.parameters and not flow.data:
                    continue  # a view of a weight
                self._set(output, flow)
        return result

    def _result(self, name: str, args: tuple, inputs: list[torch.Tensor]) -> _Flow:
        self._order += 1
        plain = name.rstrip("_") if not name.startswith("_") else name
        if plain in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[plain])
            return self._product(left, right, [self._flow(t) for t in inputs if t is not left and t is not right])
        flows = [self._flow(t) for t in inputs]
        if "attention" in name or "attn" in name:
            return self._attention(flows)
        if name == "embedding":
            tables = flows[0].parameters
            self.trace.embeddings.extend(sorted(tables - set(self.trace.embeddings)))
            return _Flow({**flows[0].paths, **{table: Path() for table in tables}}, data=True)
        if name in _EMPTY or name.removesuffix("_like") in _EMPTY or name.startswith("new_"):
            return _Flow({})
        paths = _merged([flow.paths for flow in flows])
        data = any(flow.data for flow in flows)
        if name.removesuffix("_") in _NONLINEAR:
            paths = {unit: replace(path, direct=False, curved=True) for unit, path in paths.items()}
        elif any(part in name for part in _MIXES_POSITIONS):
            paths = {unit: replace(path, mixed=True) for unit, path in paths.items()}
        parameters = frozenset() if data else frozenset().union(*(flow.parameters for flow in flows))
        return _Flow(paths, data, parameters)

    def _product(self, left: torch.Tensor, right: torch.Tensor, others: list[_Flow]) -> _Flow:
        flows = self._flow(left), self._flow(right)
        for activations, weight, tensor, matrix in ((*flows, left, right), (*flows[::-1], right, left)):
            if weight.parameters and not activations.parameters:
                return self._own_weight(activations, weight.parameters, tensor, matrix)
        if flows[0].paths and flows[1].paths:
            if not self._inside:
                self.trace.products.append(Product(flows[0].paths, flows[1].paths))
            paths = _merged([flow.paths for flow in flows])
            paths = {unit: path.multiplied() for unit, path in paths.items()}
            return _Flow(_merged([paths, *(flow.paths for flow in others)]), data=True)
        merged = [*flows, *others]
        return _Flow(_merged([f.paths for f in merged]), any(f.data for f in merged))

    def _own_weight(
        self, activations: _Flow, parameters: frozenset[str], tensor: torch.Tensor, matrix: torch.Tensor
    ) -> _Flow:
        """Record the product with a weight that is not in a linear layer."""
        if self._inside:
            return _Flow({}, data=True)
        name = min(parameters)
        self.trace.kinds.setdefault(name, None)
        shared = tensor.shape[-1] if tensor.shape[-1] in matrix.shape[-2:] else matrix.shape[-2]
        sides = list(matrix.shape[-2:])
        sides.remove(shared)
        self.trace.calls.append(Call(name, self._key(tensor) or 0, activations.paths, shared, sides[0], self._order))
        return _Flow({name: Path()}, data=True)

    def _attention(self, flows: list[_Flow]) -> _Flow:
        """Attention as one operator, `(query, key, value, ...)`."""
        query, key, value, *others = [flow.paths for flow in flows][:3] + [{}] * (3 - len(flows[:3])) + [
            flow.paths for flow in flows[3:]
        ]  # fmt: skip
        if query and key:
            self.trace.products.append(Product(query, key))
        scores = {
            unit: replace(path.multiplied(2), direct=False, curved=True)
            for unit, path in _merged([query, key, *others]).items()
        }
        values = {unit: path.multiplied() for unit, path in value.items()}
        return _Flow(_merged([values, scores]), data=True)

    # --- modules ------------------------------------------------------------------------------------

    def watch(self, model: nn.Module) -> None:
        """Register hooks on all modules of `model`; they are never removed, so pass a temporary copy."""
        inner: set[nn.Module] = set()
        for name, module in model.named_modules():
            if module in inner:
                continue
            if isinstance(module, BaseTunerLayer):  # its adapters are disabled
                inner.update({*module.modules()} - {module, *module.get_base_layer().modules()})
            if is_projection(module):
                inner.update(m for m in module.modules() if m is not module)
                self._watch_projection(unwrapped_name(name), module)
            self._watch_module(unwrapped_name(name), module)

    def _watch_projection(self, name: str, module: nn.Module) -> None:
        self.trace.kinds[name] = type(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        width_in, width_out = widths(module)

        def before(_, args, kwargs):
            self._inside += 1
            tensor = _first_tensor((args, kwargs))
            flow = self._flow(tensor)
            self._order += 1
            self.trace.calls.append(Call(name, self._key(tensor) or 0, flow.paths, width_in, width_out, self._order))

        def after(_, args, kwargs, output):
            self._inside -= 1
            for tensor in _tensors(output):
                if tensor.is_floating_point():
                    self._set(tensor, _Flow({name: Path()}, data=True))

        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        module.register_forward_hook(after, with_kwargs=True)

    def _watch_module(self, name: str, module: nn.Module) -> None:
        started: list[tuple[int | None, Paths, int]] = []

        def before(_, args, kwargs):
            tensor = _first_tensor((args, kwargs))
            self._order += 1
            if tensor is None:
                started.append((None, {}, self._order))
            else:
                started.append((self._key(tensor), self._flow(tensor).paths, self._order))

        def after(_, args, kwargs, output):
            reads, inputs, start = started.pop()
            tensor = _first_tensor(output)
            outputs = {} if tensor is None else self._flow(tensor).paths
            width = None if tensor is None or not tensor.dim() else tensor.shape[-1]
            self._order += 1
            self.trace.modules.append(ModuleCall(name, reads, inputs, outputs, width, start, self._order))

        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        module.register_forward_hook(after, with_kwargs=True)


def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> Trace:
    """Trace one pass of `batch` through `model`, which must be a copy: it keeps the hooks."""
    tracer = Tracer(model)
    tracer.watch(model)
    with torch.no_grad(), _own_random_state(model), tracer:
        tracer.feed(batch)
        model(**batch)
    return tracer.trace


def _merged(paths: list[Paths]) -> Paths:
    paths = [p for p in paths if p]
    if len(paths) < 2:
        return paths[0] if paths else {}
    result = dict(paths[0])
    for other in paths[1:]:
        for unit, path in other.items():
            own = result.get(unit)
            if own is not None and own != path:
                path = own.either(path)
            result[unit] = path
    return result


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _first_tensor(value: Any) -> torch.Tensor | None:
    tensors = [t for t in _tensors(value) if t.is_floating_point()] or _tensors(value)
    return tensors[0] if tensors else None


@contextlib.contextmanager
def _own_random_state(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
        torch.manual_seed(0)
        yield
