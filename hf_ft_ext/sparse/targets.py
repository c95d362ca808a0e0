"""Which linear layers SparseGrad converts."""

import re
from collections.abc import Callable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.sparse_grad.targets import feed_forward_linears, linear_kinds
from hf_ft_ext.errors import InputError
from hf_ft_ext.structure.targets import is_plain_linear


def find_targets(
    model: nn.Module, pattern: str | None = None, fits: Callable[[nn.Module], bool] = is_plain_linear
) -> dict[str, nn.Linear | Conv1D]:
    """Return the layers to convert, by name.

    Args:
        model: a transformers model.
        pattern: regular expression searched in dotted module names; `None` = the linear layers of all feed-forward
            blocks, found by structure. If these have no linear layers (experts as three-dimensional tensors), the
            linear layers of the attention, with a warning.
        fits: whether a matched module can be converted.

    Raises:
        InputError: a malformed or unmatched pattern, a matched layer that is not linear, or a model with adapters or
            without linear layers in its repeated layers.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model carries PEFT adapters; pass the base model, or merge the adapters first")
    if pattern is None:
        names = feed_forward_linears(model, fits, "sparse_target_modules", "train as sparse_train_rest says")
        return {name: _linear(name, model) for name in names}
    known = ", ".join(linear_kinds(model))
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"sparse_target_modules={pattern!r} is no regular expression: {error}") from None
    matched = {name: module for name, module in model.named_modules() if expression.search(name)}
    # A pattern that names a block matches everything below it. Keep leaf modules only.
    leaves = {name: module for name, module in matched.items() if not any(True for _ in module.children())}
    if not leaves:
        raise InputError(f"sparse_target_modules={pattern!r} matches no layer; linear layers here: {known}")
    for name, module in leaves.items():
        if type(module).__name__ == "SparseGradLinear":
            raise _converted(name)
        if not fits(module):
            raise InputError(
                f"sparse_target_modules={pattern!r} matches {name}, a {type(module).__name__}; SparseGrad trains "
                f"linear layers only: narrow the pattern to some of: {known}"
            )
    return leaves


def _converted(name: str) -> InputError:
    return InputError(f"{name} is converted already; call merge_sparse(model) before converting again")


def _linear(name: str, model: nn.Module) -> nn.Linear | Conv1D:
    module = model.get_submodule(name)
    if type(module).__name__ == "SparseGradLinear":
        raise _converted(name)
    return module
