"""Find the parameters to search, from `search_target` or the masks of a finished run."""

import logging
import re
from collections.abc import Collection

import torch
from peft import PeftModel
from torch import nn

from hf_ft_ext.entries.choice import without_frozen
from hf_ft_ext.entries.delta import read_choice
from hf_ft_ext.errors import InputError
from hf_ft_ext.features import head_parameters
from hf_ft_ext.gradientless.arguments import GradientlessTrainingArguments
from hf_ft_ext.gradientless.search_arguments import SPSA_METHOD
from hf_ft_ext.offload import has_offloaded, keep_loaded
from hf_ft_ext.training.runs.plan import fold_layer_numbers
from hf_ft_ext.training.weights.quantized import is_quantized

logger = logging.getLogger(__name__)


def searched_parameters(model: nn.Module, target: str | None) -> dict[str, nn.Parameter]:
    """Return the searched parameters by name, in the model's order; a shared parameter appears once.

    Args:
        target: `head`, `all`, `trainable`, or a regular expression; `None` = the head, or the trainable parameters of
            a PEFT model. `head` and `all` leave out frozen parameters, unless all of them are frozen.

    Raises:
        InputError: no parameter matches, or one that does is quantized, or would not be saved with the adapter.
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
            f"search_target={target!r} includes {packed[0]}, which is quantized and cannot be searched; search the "
            "head, or the parameters of an adapter (search_peft)"
        )
    found = {name: p for name, p in found.items() if p.numel()}
    if target in ("all", "head") and not isinstance(model, PeftModel):
        kept, frozen = without_frozen(found)
        if frozen:
            logger.warning(
                "search_target=%s: %d frozen parameters (%s, ...) are not searched; a regular expression that matches "
                "their names includes them",
                target,
                len(frozen),
                frozen[0],
            )
        found = {name: found[name] for name in kept}
    if isinstance(model, PeftModel):
        # peft keeps the untrained copy of a module that trains in full; no forward pass reads it
        found = {name: p for name, p in found.items() if ".original_module." not in name}
        frozen = [name for name, p in found.items() if not p.requires_grad]
        if frozen:
            raise InputError(
                f"search_target={target!r} includes {frozen[0]}, a weight of the base model, which a saved adapter "
                "does not contain; pass search_target=trainable, or a pattern such as 'lora_|modules_to_save'"
            )
    if not found:
        kinds = dict.fromkeys(fold_layer_numbers(name) for name in named)
        shown = ", ".join(list(kinds)[-12:])
        advice = "pass a pattern that matches one of them, or all"
        if target == "head":  # as in language models that share their output rows with the input embeddings
            advice = "pass all, a pattern that matches one of them, or for a prompt of a causal model also untie_words"
        raise InputError(f"search_target={target!r} matches no parameter; {advice}; parameters of this model: {shown}")
    return found


def prepare_offloaded(args: GradientlessTrainingArguments, model: nn.Module, searched: Collection[str]) -> None:
    """Prepare a model that accelerate offloads: SPSA streams searched tensors, unless these are all in the head.

    The head, which runs on features, and what other searches change in place stay loaded.

    Raises:
        InputError: several processes, which would write the same files.
    """
    if not has_offloaded(model):
        return
    if args.world_size > 1:
        raise InputError(
            f"the model is offloaded, and {args.world_size} processes would change the same stored weights; start one "
            "process, or load the model without device_map"
        )
    offloaded = [parameter for name, parameter in model.named_parameters() if name in searched and parameter.is_meta]
    head = head_parameters(model) if hasattr(model, "base_model_prefix") else {}
    if offloaded and (args.search_method != SPSA_METHOD or set(searched) <= set(head)):
        size = keep_loaded(model, offloaded)
        logger.info("search_method=%s keeps the searched layers loaded: %.3g MB", args.search_method, size / 1e6)


def masks_of_run(model: nn.Module, folder: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return what a run with selected entries trained.

    Args:
        folder: of a finished run of `--method fisher --fisher_mode mask`, or one that `save_entries` wrote to.

    Returns:
        Names of the trained parameters, in the model's order, and the masks of those that were not trained in full.

    Raises:
        InputError: the folder holds no masks, or the masks of another model.
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
    """Whether a parameter is quantized storage: integers, 8-bit floats, or a class of the quantizer."""
    plain = parameter.is_floating_point() and parameter.element_size() >= 2
    return not plain or (quantized and type(parameter) is not nn.Parameter)


def _packed_buffers(model: nn.Module) -> list[str]:
    """Names of integer matrices that some quantizers store as buffers instead of weights."""
    return [
        name for name, b in model.named_buffers() if b.ndim == 2 and b.dtype in (torch.int32, torch.int8, torch.uint8)
    ]
