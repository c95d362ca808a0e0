"""What is searched: names of parameters, from `search_target`."""

import re

import torch
from peft import PeftModel
from torch import nn

from hf_ft_ext.entries.delta import read_choice
from hf_ft_ext.errors import InputError
from hf_ft_ext.features import head_parameters
from hf_ft_ext.training.runs.plan import fold_layer_numbers
from hf_ft_ext.training.weights.quantized import is_quantized


def searched_parameters(model: nn.Module, target: str | None) -> dict[str, nn.Parameter]:
    """The searched parameters by name, in the model's order; shared ones once.

    Args:
        target: `head`, `all`, `trainable`, or a regular expression; `None` = the head, or what is trainable in a PEFT
            model.

    Raises:
        InputError: there are none.
    """
    named = dict(model.named_parameters())
    if target is None:
        target = "trainable" if isinstance(model, PeftModel) else "head"
    if target == "all":
        found = named
    elif target == "trainable":
        found = {name: p for name, p in named.items() if p.requires_grad}
    elif target == "head":
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        head = {id(p) for p in head_parameters(inner).values()} if hasattr(inner, "base_model_prefix") else set()
        found = {name: p for name, p in named.items() if id(p) in head and (p.requires_grad or inner is model)}
    else:
        found = {name: p for name, p in named.items() if re.search(target, name)}
    packed = [name for name, p in found.items() if _is_packed(p, is_quantized(model))]
    if not packed and target == "all" and is_quantized(model):
        packed = _packed_buffers(model)
    if packed:
        raise InputError(
            f"search_target={target!r} takes in {packed[0]}, which is quantized and cannot be searched; search the "
            "head, or the parameters of an adapter (search_peft)"
        )
    found = {name: p for name, p in found.items() if p.numel()}
    if not found:
        kinds = dict.fromkeys(fold_layer_numbers(name) for name in named)
        shown = ", ".join(list(kinds)[-12:])
        raise InputError(f"search_target={target!r} leaves nothing to search; parameters here: {shown}")
    return found


def masks_of_run(model: nn.Module, folder: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What a run with chosen entries trained: names of parameters, in the model's order, and masks of some of them.

    Args:
        folder: of a finished run of `--method fisher --fisher_mode mask`, or one that `save_entries` wrote to.

    Raises:
        InputError: the folder holds no masks, or those of another model.
    """
    indices, in_full = read_choice(folder)
    named = dict(model.named_parameters())
    for name in (*indices, *in_full):
        if name not in named:
            raise InputError(f"search_masks={folder!r} is of another model: {type(model).__name__} has no {name}")
    masks = {}
    for name, entries in indices.items():
        if len(entries) and int(entries.max()) >= named[name].numel():
            raise InputError(f"search_masks={folder!r} is of another model: {name} has fewer entries here")
        masks[name] = torch.zeros(named[name].shape, dtype=torch.bool)
        masks[name].view(-1)[entries.long()] = True
    return [name for name in named if name in indices or name in in_full], masks


def _is_packed(parameter: nn.Parameter, quantized: bool) -> bool:
    """Whether a parameter holds no weights that can be added to: integers, 8-bit floats, a quantizer's own class."""
    plain = parameter.is_floating_point() and parameter.element_size() >= 2
    return not plain or (quantized and type(parameter) is not nn.Parameter)


def _packed_buffers(model: nn.Module) -> list[str]:
    """Names of integer matrices that some quantizers keep as buffers in place of weights."""
    return [
        name for name, b in model.named_buffers() if b.ndim == 2 and b.dtype in (torch.int32, torch.int8, torch.uint8)
    ]
