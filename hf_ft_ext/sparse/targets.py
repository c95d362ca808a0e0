"""Which linear layers SparseGrad converts."""

import logging
import re

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.errors import InputError
from hf_ft_ext.structure.find import find_structure
from hf_ft_ext.structure.parts import Structure
from hf_ft_ext.structure.targets import is_plain_linear
from hf_ft_ext.training.plan import fold_layer_numbers

logger = logging.getLogger(__name__)

_LINEAR = (nn.Linear, Conv1D)


def find_targets(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Linear | Conv1D]:
    """Names and modules of the layers to convert.

    Args:
        model: a transformers model.
        pattern: regular expression searched in dotted module names; `None` = the linear layers of every layer's
            feed-forward, found by structure. Where no feed-forward has any (experts as three-dimensional tensors), the
            linear layers of the attentions, with a warning.

    Raises:
        InputError: a malformed or unmatched pattern, a matched layer that is not linear, or a model without linear
            layers in its repeated layers.
    """
    if pattern is None:
        return {name: _linear(name, model) for name in _by_structure(model)}
    linear_kinds = _linear_kinds(model)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"sparse_target_modules={pattern!r} is no regular expression: {error}") from None
    matched = {name: module for name, module in model.named_modules() if expression.search(name)}
    # A pattern that names a block matches everything below it: containers are passed over.
    leaves = {name: module for name, module in matched.items() if not any(True for _ in module.children())}
    if not leaves:
        raise InputError(
            f"sparse_target_modules={pattern!r} matches no layer; linear layers here: {', '.join(linear_kinds)}"
        )
    for name, module in leaves.items():
        if type(module).__name__ == "SparseGradLinear":
            raise _converted(name)
        if not is_plain_linear(module):
            raise InputError(
                f"sparse_target_modules={pattern!r} matches {name}, a {type(module).__name__}; SparseGrad trains "
                f"nn.Linear, Conv1D only: narrow the pattern to some of: {', '.join(linear_kinds)}"
            )
    return leaves


def _linear_kinds(model: nn.Module) -> list[str]:
    return sorted({fold_layer_numbers(name) for name, m in model.named_modules() if isinstance(m, _LINEAR)})


def _converted(name: str) -> InputError:
    return InputError(f"{name} is converted already; call merge_sparse(model) before converting again")


def _linear(name: str, model: nn.Module) -> nn.Linear | Conv1D:
    module = model.get_submodule(name)
    if type(module).__name__ == "SparseGradLinear":
        raise _converted(name)
    return module


def _by_structure(model: nn.Module) -> list[str]:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model carries PEFT adapters; pass the base model, or merge the adapters first")
    structure = find_structure(model)
    wanted = [name for block in structure.feed_forwards for name in block.projections]
    feed_forward = _convertible(wanted, model)
    left_out = _described([name for name in wanted if name not in feed_forward], structure, model)
    if feed_forward:
        if left_out:
            logger.warning(
                "SparseGrad converts linear layers. These parts of the feed-forwards are not linear layers and train "
                "as sparse_train_rest says: %s.",
                left_out,
            )
        return feed_forward
    attention = [name for block in structure.attentions for name in block.projections]
    instead = _convertible(attention, model)
    if not instead:
        reason = "no feed-forward was found in it"
        if left_out:
            reason = f"its feed-forwards ({left_out}) are not linear layers"
        shown = ", ".join(_linear_kinds(model)) or "none"
        raise InputError(
            f"{structure.model} has nothing that SparseGrad converts by default: {reason}, and its attentions have no "
            f"linear layers either; name layers with sparse_target_modules, a regular expression over: {shown}"
        )
    found = f"The feed-forwards of {structure.model} are {left_out}"
    if not left_out:
        found = f"No feed-forward was found in {structure.model}"
    logger.warning(
        "%s, and SparseGrad converts linear layers: it takes the attentions' %s instead. Name others with "
        "sparse_target_modules.",
        found,
        ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in instead)),
    )
    return instead


def _convertible(names: list[str], model: nn.Module) -> list[str]:
    modules = dict(model.named_modules())
    return [name for name in dict.fromkeys(names) if name in modules and is_plain_linear(modules[name])]


def _described(names: list[str], structure: Structure, model: nn.Module) -> str:
    """What these projections are, layer numbers folded: `mlp.experts.down_proj (tensor 8x64x32)`."""
    found = {}
    for name in names:
        kind = structure.kinds.get(name, "tensor")
        if kind == "tensor":
            kind = f"tensor {'x'.join(map(str, model.get_parameter(name).shape))}"
        found[f"{fold_layer_numbers(name)} ({kind})"] = None
    return ", ".join(found)
