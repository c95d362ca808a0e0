"""The gradient pre-pass: the leading HOSVD directions of some batches' gradients, within the memory of training.

For gradients `G_1 ... G_n` (out x in) of a layer, or of all layers of a kind, the HOSVD factors are the eigenvectors
of `sum G G^T` and `sum G^T G`. Only the leading r and c of them are kept, so only `sum G (G^T Omega)` is summed up,
with r + 10 columns (`subspace`). A layer's gradient comes from its inputs and output gradients in the middle of the
backward pass; at most one exists at a time. Base weights need no gradient, so they may be quantized.
"""

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_ft_ext.adapters.layers import plain_name, shown_name
from hf_ft_ext.adapters.sparse_grad.config import DEFAULT_GRADIENTS
from hf_ft_ext.adapters.sparse_grad.functions import narrowed
from hf_ft_ext.adapters.sparse_grad.layer import SparseGradColumns, SparseGradLayer
from hf_ft_ext.adapters.sparse_grad.model import layers_by_columns, sparse_grad_layers
from hf_ft_ext.adapters.sparse_grad.subspace import Sketch, random_test_matrix, seed_of
from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.state import only_trainable

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Any], torch.Tensor]


def compute_bases(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    gradients: int = DEFAULT_GRADIENTS,
    adapter_name: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Choose the columns of a SparseGrad adapter from the gradients of some batches, at the present weights.

    Weights, gradients, and the state of torch's generators stay as they are; dropout is off. Gradient checkpointing
    and mixed precision work as in training.

    Args:
        model: from `get_peft_model(model, SparseGradConfig(...))`, or with such adapters injected.
        batches: what `loss` takes, each of which gives one gradient; mappings of tensors are moved to the model's
            device. Over several processes (`torch.distributed`), each brings its own batches, equally many, and a
            gradient is the mean over the processes, as in a training step; all get the same columns.
        loss: `loss(model, batch)`, a scalar tensor; `None` = `model(**batch).loss`.
        gradients: how many batches are read at most, on each process; the source takes 30.
        adapter_name: which adapter; `None` = the active one.
        seed: of the random sketches.
        progress: show a progress bar.

    Raises:
        InputError: no such adapter, no batch, no loss, a gradient that is not finite, or none that reaches the layers.

    Source: Chekalina et al., EMNLP 2024, arXiv 2410.07383, section 3.
    """
    adapter_name = _active_adapter(model) if adapter_name is None else adapter_name
    groups = layers_by_columns(model, adapter_name)
    _check_adapter(model, adapter_name, groups)
    loss = _own_loss if loss is None else loss
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise InputError("compute_bases got no batch, and every gradient needs one; pass some training batches")
    batches = itertools.islice(itertools.chain([first], batches), gradients)
    device = next(model.parameters()).device
    values = [layer.sparse_grad_values[adapter_name] for _, layers in groups for _, layer in layers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_accelerators(model)))
        stack.enter_context(_without_dropout(model))
        stack.enter_context(only_trainable(model, values))
        sums = _sketches(groups, seed)
        for batch in tqdm(batches, total=gradients, desc="gradient basis", disable=not progress):
            for sketches in sums:
                sketches.batch += 1
            with torch.enable_grad(), _observed(sums, adapter_name):
                with _runs_counted(sums):
                    value = loss(model, _moved(batch, device))
                if not value.requires_grad:
                    raise InputError(
                        f"the loss of {type(model).__name__} has no gradient with dropout off, so none reaches the "
                        "layers with SparseGrad adapters; choose init='random' (--sparse_basis random)"
                    )
                value.backward()
            for sketches in sums:
                sketches.end_batch()
    _fill(sums, seed)


class _Sketches:
    """The two sketches of a set of columns, over all gradients of the layers that have it."""

    def __init__(
        self, columns: SparseGradColumns, layers: list[tuple[str, SparseGradLayer]], out: Sketch, inp: Sketch
    ):
        self.columns, self.layers, self.out, self.inp = columns, layers, out, inp
        self.batch = -1
        self.runs: Counter[str] = Counter()  # of each layer in the forward pass of this batch
        self._pending: dict[str, torch.Tensor] = {}

    def observer(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """What takes inputs (tokens, in) and output gradients (tokens, out) of the layer `name`."""

        def observe(x: torch.Tensor, g: torch.Tensor) -> None:
            if self.runs[name] > 1:  # a layer that runs several times has one gradient, the sum of its runs'
                gradient = (g.T @ x.to(g.dtype)).to(self.out.sum.dtype)
                self._pending[name] = self._pending[name] + gradient if name in self._pending else gradient
            elif self._rows_are_cheaper(len(x)):
                self._add_rows(name, x.to(self.out.sum.dtype), g.to(self.out.sum.dtype))
            else:
                self._add(name, (g.T @ x.to(g.dtype)).to(self.out.sum.dtype))

        return observe

    def end_batch(self) -> None:
        for name in list(self._pending):
            self._add(name, self._pending.pop(name))
        self.runs.clear()

    def _rows_are_cheaper(self, tokens: int) -> bool:
        """Whether products of all rows with the test matrices take fewer multiplications than forming `G = g^T x`."""
        n_out, n_in = len(self.out.omega), len(self.inp.omega)
        width = self.out.omega.shape[1] + self.inp.omega.shape[1]
        return 2 * tokens * (n_out + n_in) * width < tokens * n_out * n_in + 2 * n_out * n_in * width

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        # G G^T Omega and G^T G Omega, G the mean over processes. The exchanges are those of `_add_rows`, in its order:
        # processes with other numbers of tokens may take the other way.
        out = _over_processes(narrowed(gradient.T, self.out.omega))
        inp = _over_processes(narrowed(gradient, self.inp.omega))
        self._take(name, self.out, _over_processes(narrowed(gradient, out)))
        self._take(name, self.inp, _over_processes(narrowed(gradient.T, inp)))

    def _add_rows(self, name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        # G = g^T x, so G G^T Omega = g^T (x (x^T (g Omega))).
        out = _over_processes(narrowed(x.T, narrowed(g, self.out.omega)))
        inp = _over_processes(narrowed(g.T, narrowed(x, self.inp.omega)))
        self._take(name, self.out, _over_processes(narrowed(g.T, narrowed(x, out))))
        self._take(name, self.inp, _over_processes(narrowed(x.T, narrowed(g, inp))))

    def _take(self, name: str, sketch: Sketch, product: torch.Tensor) -> None:
        if not torch.isfinite(product).all():
            raise InputError(
                f"the gradient of {shown_name(name)} is not finite in batch {self.batch} of the pre-pass; look for "
                "bad rows or labels in the training data, or load the model in float32"
            )
        sketch.add(product)


def _sketches(groups: list, seed: int) -> list[_Sketches]:
    test_matrices: dict[tuple, torch.Tensor] = {}  # shared by all layers of a size

    def omega(columns: torch.Tensor) -> torch.Tensor:
        key = (*columns.shape, columns.dtype, columns.device)
        if key not in test_matrices:
            n, k = columns.shape
            test_matrices[key] = random_test_matrix(n, k, seed_of(seed, n, k), columns.dtype, columns.device)
        return test_matrices[key]

    found = []
    for columns, layers in groups:
        sides = (columns.out_columns, columns.in_columns)
        found.append(_Sketches(columns, layers, *(Sketch(omega(side), side.shape[1]) for side in sides)))
    return found


@contextlib.contextmanager
def _observed(sums: list[_Sketches], adapter_name: str) -> Iterator[None]:
    layers = [(name, layer, sketches) for sketches in sums for name, layer in sketches.layers]
    try:
        for name, layer, sketches in layers:
            layer.observe(adapter_name, sketches.observer(name))
        yield
    finally:
        for _, layer, _ in layers:
            layer.observe(adapter_name, None)


def _fill(sums: list[_Sketches], seed: int) -> None:
    """The leading eigenvectors of the summed sketches become the columns, one set after the other."""
    without = [sketches.layers for sketches in sums if not sketches.out.sum.any()]
    if len(without) == len(sums):
        raise InputError(
            "no gradient reaches the layers with SparseGrad adapters; check that the loss depends on them, or choose "
            "init='random'"
        )
    if without:
        names = [shown_name(name) for layers in without for name, _ in layers]
        logger.warning(
            "No gradient reached %d layers in the pre-pass (%s, ...); their columns are random.", len(names), names[0]
        )
    while sums:
        sketches = sums.pop(0)  # its sketches go before the next ones are decomposed
        first = plain_name(sketches.layers[0][0])
        sides = [
            sketch.leading(seed_of(seed, first, side))
            for sketch, side in ((sketches.out, "out"), (sketches.inp, "in"))
        ]
        sketches.columns.fill(*sides)
        if _processes() > 1:  # all decompose the same sums; this keeps the columns equal to the last bit
            torch.distributed.broadcast(sketches.columns.out_columns, 0)
            torch.distributed.broadcast(sketches.columns.in_columns, 0)


def _processes() -> int:
    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if here else 1


def _over_processes(part: torch.Tensor) -> torch.Tensor:
    """The mean of all processes' parts: products with the mean gradient are means of products."""
    if _processes() == 1:
        return part
    part = part.contiguous()
    torch.distributed.all_reduce(part)
    return part / _processes()


@contextlib.contextmanager
def _runs_counted(sums: list[_Sketches]) -> Iterator[None]:
    """Count how often each layer runs within: in a forward pass, not in what a backward pass recomputes."""
    hooks = []
    for sketches in sums:
        for name, layer in sketches.layers:
            count = functools.partial(_count_run, sketches.runs, name)
            hooks.append(layer.register_forward_pre_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _count_run(runs: Counter[str], name: str, *_: Any) -> None:
    runs[name] += 1


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for modules that recompute their activations: they do so in training mode alone."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    value = model(**batch).loss
    if value is None:
        raise InputError(
            f"{type(model).__name__} gives no loss for these batches; put labels into them, or pass loss(model, batch)"
        )
    return value


def _moved(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _accelerators(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _active_adapter(model: nn.Module) -> str:
    layer = next((layer for _, layer in sparse_grad_layers(model)), None)
    if layer is None:
        raise InputError(
            "the model has no SparseGrad adapters; make it with get_peft_model(model, SparseGradConfig(...))"
        )
    return layer.active_adapters[0] if layer.active_adapters else ""


def _check_adapter(model: nn.Module, adapter_name: str, groups: list) -> None:
    known = sorted({name for _, layer in sparse_grad_layers(model) for name in layer.sparse_grad_values})
    if not groups:
        raise InputError(f"there is no SparseGrad adapter {adapter_name!r}; this model has: {', '.join(known)}")
    for name, layer in (named for _, layers in groups for named in layers):
        if layer.disable_adapters or layer.merged or adapter_name not in layer.active_adapters:
            raise InputError(
                f"the adapter {adapter_name!r} is not in use in {shown_name(name)} (switched off, merged, or another "
                f"one is active); call model.set_adapter({adapter_name!r}) first"
            )
