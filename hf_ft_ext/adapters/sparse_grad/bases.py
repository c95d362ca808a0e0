"""The gradient pre-pass: the leading HOSVD directions of the gradients of some batches, within training memory.

For gradients `G_1 ... G_n` (out x in) of a layer, or of all layers of a kind, the HOSVD factors are the eigenvectors
of `sum G G^T` and `sum G^T G`. Only the leading r and c of them are needed, so only the sketch `sum G (G^T Omega)`
with r + 10 columns is accumulated (`subspace`). A layer's gradient is computed from its inputs and output gradients
during the backward pass; at most one is in memory at a time. Base weights need no gradient, so they may be quantized.

The gradient `G = sum_i G_i` of several micro-batches is never formed. They pass twice: the first time for
`P = sum_i G_i^T Omega`, the second time for `G (G^T Omega) = sum_i G_i P`.
"""

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_ft_ext.adapters.layers import plain_name, shown_name
from hf_ft_ext.adapters.sparse_grad.config import DEFAULT_GRADIENTS
from hf_ft_ext.adapters.sparse_grad.model import layers_by_columns, sparse_grad_layers
from hf_ft_ext.adapters.sparse_grad.sketches import Sketches, processes
from hf_ft_ext.adapters.sparse_grad.subspace import Sketch, random_test_matrix, seed_of
from hf_ft_ext.errors import InputError
from hf_ft_ext.label_tokens import predicts_next_tokens, zero_without_tokens
from hf_ft_ext.per_example.state import only_trainable, refuse_single_batch

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Any], torch.Tensor]


def compute_bases(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    gradients: int = DEFAULT_GRADIENTS,
    adapter_name: str | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> None:
    """Compute the columns of a SparseGrad adapter from the gradients of some batches, at the current weights.

    Weights, gradients, and the state of torch's generators do not change; dropout is off. Gradient checkpointing and
    mixed precision work as in training.

    Args:
        model: from `get_peft_model(model, SparseGradConfig(...))`, or with such adapters injected.
        batches: batches for `loss`, one gradient each; mappings of tensors are moved to the model's device. With
            several processes (`torch.distributed`), each passes its own batches, the same number, and a gradient is
            the mean over the processes, as in a training step; all get the same columns.
        loss: `loss(model, batch)`, a scalar tensor; `None` = `model(**batch).loss`.
        gradients: largest number of batches to read, on each process, 1 or more (30 in the source).
        adapter_name: name of the adapter; `None` = the active one.
        seed: of the random sketches; `None` = the adapter's.
        progress: show a progress bar.

    Raises:
        InputError: no such adapter, or one that has been trained; no batch, no loss, a gradient that is not finite,
            or no gradient in these layers.

    Source: Chekalina et al., EMNLP 2024, arXiv 2410.07383, section 3.
    """
    refuse_single_batch(batches, "batches")
    bases_from_steps(
        model, ([batch] for batch in batches), loss, False, gradients=gradients, adapter_name=adapter_name, seed=seed,
        progress=progress,
    )  # fmt: skip


def bases_from_steps(
    model: nn.Module,
    steps: Iterable[Sequence[Any]],
    loss: Loss | None,
    accumulated: bool,
    *,
    gradients: int = DEFAULT_GRADIENTS,
    adapter_name: str | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> None:
    """As `compute_bases`, each gradient from the micro-batches of an optimizer step, whose losses are added up.

    Args:
        steps: micro-batches of one step each; over several processes a gradient is the mean of theirs.
        accumulated: whether any step of any process has several; they pass twice.
    """
    if gradients < 1:
        raise InputError(f"gradients must be 1 or more, got {gradients}")
    adapter_name = _active_adapter(model) if adapter_name is None else adapter_name
    seed = _own_seed(model, adapter_name) if seed is None else seed
    groups = layers_by_columns(model, adapter_name)
    _check_adapter(model, adapter_name, groups)
    # Processes add their products up layer by layer. An expert that no token of a process reaches would be missed in
    # the order of a backward pass, so all layers take part after the pass, as with micro-batches.
    accumulated = accumulated or (processes() > 1 and _has_experts(groups))
    loss = _own_loss if loss is None else loss
    steps = iter(steps)
    first = next(steps, None)
    if first is None:
        raise InputError("compute_bases got no batch, and it needs one for each gradient; pass some training batches")
    steps = itertools.islice(itertools.chain([first], steps), gradients)
    device = next(model.parameters()).device
    values = [layer.sparse_grad_values[adapter_name] for _, layers in groups for _, layer in layers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_accelerators(model)))
        stack.enter_context(_without_dropout(model))
        stack.enter_context(only_trainable(model, values))
        sums = _sketches(groups, seed)

        def pass_on(batch: Any) -> None:
            with torch.enable_grad(), _observing(sums, adapter_name):
                with _counting_runs(sums):
                    value = loss(model, _to_device(batch, device))
                if not isinstance(value, torch.Tensor) or value.numel() != 1:
                    found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                    raise InputError(f"loss(model, batch) must return a tensor with one number, got {found}")
                if not value.requires_grad:
                    raise InputError(
                        f"the loss of {type(model).__name__} has no gradient with dropout off, so none reaches the "
                        "layers with SparseGrad adapters; choose init='random' (--sparse_basis random)"
                    )
                value.backward()

        for step in tqdm(steps, total=gradients, desc="gradient basis", disable=not progress):
            for sketches in sums:
                sketches.begin_step(accumulated)
            for batch in step:
                pass_on(batch)
            if accumulated:
                for sketches in sums:
                    sketches.begin_second_pass()
                for batch in step:
                    pass_on(batch)
            for sketches in sums:
                sketches.end_step()
    _fill(sums, seed)


def _sketches(groups: list, seed: int) -> list[Sketches]:
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
        found.append(Sketches(columns, layers, *(Sketch(omega(side), side.shape[1]) for side in sides)))
    return found


@contextlib.contextmanager
def _observing(sums: list[Sketches], adapter_name: str) -> Iterator[None]:
    layers = [(name, layer, sketches) for sketches in sums for name, layer in sketches.layers]
    try:
        for name, layer, sketches in layers:
            layer.observe(adapter_name, sketches.observer(name))
        yield
    finally:
        for _, layer, _ in layers:
            layer.observe(adapter_name, None)


def _fill(sums: list[Sketches], seed: int) -> None:
    """Set the columns to the leading eigenvectors of the accumulated sketches, one set after the other."""
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
        sketches = sums.pop(0)  # frees its sketches before the next ones are decomposed
        first = plain_name(sketches.layers[0][0])
        sides = [
            sketch.leading(seed_of(seed, first, side))
            for sketch, side in ((sketches.out, "out"), (sketches.inp, "in"))
        ]
        sketches.columns.fill(*sides)
        if processes() > 1:  # all decompose the same sums; broadcasting makes the columns bit-identical
            torch.distributed.broadcast(sketches.columns.out_columns, 0)
            torch.distributed.broadcast(sketches.columns.in_columns, 0)


@contextlib.contextmanager
def _counting_runs(sums: list[Sketches]) -> Iterator[None]:
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
    """Evaluation mode, except for modules with activation checkpointing, which recompute in training mode only.

    Those get dropout rates of 0, where the rates are attributes of the module or of its configuration (BART, Falcon).
    """
    modes = [(module, module.training) for module in model.modules()]
    checkpointed = [module for module, _ in modes if getattr(module, "gradient_checkpointing", False)]
    owners = {id(owner): owner for m in checkpointed for owner in (m, getattr(m, "config", None)) if owner is not None}
    rates = [
        (owner, name, value)
        for owner in owners.values()
        for name, value in vars(owner).items()
        if "drop" in name and isinstance(value, float)
    ]
    try:
        for module, _ in modes:
            module.training = False
        for module in checkpointed:
            module.training = True
        for owner, name, _ in rates:
            setattr(owner, name, 0.0)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for owner, name, value in rates:
            setattr(owner, name, value)


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    def loss(batch: Mapping[str, Any]) -> torch.Tensor:
        value = model(**batch).loss
        if value is None:
            raise InputError(
                f"{type(model).__name__} returns no loss for these batches; add labels to them, or pass "
                "loss(model, batch)"
            )
        return value

    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch is a {type(batch).__name__}, not keyword arguments of the model; pass loss(model, batch)"
        )
    return zero_without_tokens(loss, batch, predicts_next_tokens(model))


def _to_device(batch: Any, device: torch.device) -> Any:
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


def _own_seed(model: nn.Module, adapter_name: str) -> int:
    """The seed in the configuration of the adapter; 0 if the model has no configurations."""
    owners = (m for m in model.modules() if adapter_name in (getattr(m, "peft_config", None) or {}))
    return next((getattr(m.peft_config[adapter_name], "seed", 0) for m in owners), 0)


def _has_experts(groups: list) -> bool:
    return any("expert" in name for _, layers in groups for name, _ in layers)


def _check_adapter(model: nn.Module, adapter_name: str, groups: list) -> None:
    known = sorted({name for _, layer in sparse_grad_layers(model) for name in layer.sparse_grad_values})
    if not groups:
        raise InputError(f"there is no SparseGrad adapter {adapter_name!r}; this model has: {', '.join(known)}")
    for name, layer in (named for _, layers in groups for named in layers):
        if layer.disable_adapters or layer.merged or adapter_name not in layer.active_adapters:
            raise InputError(
                f"the adapter {adapter_name!r} is not in use in {shown_name(name)} (disabled, merged, or another "
                f"one is active); call model.set_adapter({adapter_name!r}) first"
            )
        values = layer.sparse_grad_values[adapter_name]
        if layer.sparse_grad_columns[adapter_name].ready and not values.is_meta and values.any():
            raise InputError(
                f"the adapter {adapter_name!r} already changes {shown_name(name)}, and with other columns it would "
                "change something else; merge it (merge_and_unload) and add a new adapter"
            )
