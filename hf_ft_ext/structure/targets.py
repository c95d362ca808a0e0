"""Default target modules (LoRA, IA3), by structure."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.structure.find import find_structure
from hf_ft_ext.structure.parts import Structure, unwrapped_name

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # of the largest output, or of 1


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes exactly `x W^T + b` from floating-point parameters `weight` and `bias`.

    A subclass of `nn.Linear` is tested on random rows: some compute the same product in another way (Falcon).
    """
    if type(module) in (nn.Linear, Conv1D):
        return module.weight.is_floating_point()
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return False
    if weight.shape != (module.out_features, module.in_features) or any(True for _ in module.children()):
        return False
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, module.in_features, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            own = module(x)
        except (RuntimeError, TypeError, ValueError):
            return False
        plain = nn.functional.linear(x, weight, module.bias)
    if not isinstance(own, torch.Tensor) or own.shape != plain.shape:
        return False
    # a bias that is added to the rounded product: two roundings of 16 bits
    tolerance = max(_TOLERANCE, 2 * torch.finfo(weight.dtype).eps)
    return bool((own - plain).abs().max() <= tolerance * max(1.0, float(plain.abs().max())))


def query_and_value(structure: Structure) -> list[str]:
    """Query and value projections of the attentions, the default targets of LoRA.

    For a model without such modules (FNet has no attention, XLNet's projections are plain tensors), the projections of
    the feed-forwards.
    """
    attention = [name for block in structure.attentions for name in (*block.query, *block.value)]
    feed_forward = [name for block in structure.feed_forwards for name in block.projections]
    return _modules(attention, structure) or _modules(feed_forward, structure)


def key_value_and_down(structure: Structure) -> tuple[list[str], list[str]]:
    """Key and value projections of the attentions, and down projections of the feed-forwards: the targets of IA3."""
    attention = [name for block in structure.attentions for name in (*block.key, *block.value)]
    down = [name for block in structure.feed_forwards for name in block.down]
    return _modules(attention, structure), _modules(down, structure)


def default_targets(
    model: nn.Module, table: Mapping[str, list[str] | str], kind: str | None
) -> list[str] | str | None:
    """Default targets: those of peft's `table` for a model of type `kind`, else query and value by structure.

    An entry of the table that matches no module of this model is ignored.

    Returns:
        Names as peft expects them: the last parts of dotted names, as short as possible; `None` if there are none.
    """
    known = table.get(kind) if kind else None
    names = [unwrapped_name(name) for name, _ in model.named_modules()]
    if isinstance(known, str) or (known and any(_ends(name, known) for name in names)):
        return known
    found = query_and_value(find_structure(model))
    return endings(names, found) or None


def endings(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The shortest last parts of dotted names that select exactly `wanted` from `names`."""
    names, wanted = list(names), list(wanted)
    longest = max((name.count(".") + 1 for name in wanted), default=0)
    for parts in range(1, longest + 1):
        found = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in wanted))
        if {name for name in names if _ends(name, found)} == set(wanted):
            return found
    return wanted


def _modules(names: Iterable[str], structure: Structure) -> list[str]:
    """Those of `names` that are modules (not plain tensors), once each."""
    return [name for name in dict.fromkeys(names) if structure.kinds.get(name, "tensor") != "tensor"]


def _ends(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.endswith(f".{part}") for part in parts)
