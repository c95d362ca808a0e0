"""Convert a model's MLP layers into SparseGrad layers, and back."""

import logging
import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.layers import other_holder
from hf_ft_ext.entries.choice import without_frozen
from hf_ft_ext.errors import InputError
from hf_ft_ext.sparse.arguments import (
    DEFAULT_DENSITY,
    DYNAMIC,
    HOSVD,
    NONE,
    PER_KIND,
    PER_LAYER,
    RANDOM,
    SCOPES,
    STRUCTURED,
    SUPPORTS,
)
from hf_ft_ext.sparse.basis import Basis
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.targets import find_targets
from hf_ft_ext.structure.heads import names_in_head
from hf_ft_ext.training.runs.plan import fold_layer_numbers

logger = logging.getLogger(__name__)


def convert_to_sparse(
    model: nn.Module,
    n_params: int | None = None,
    density: float | None = None,
    target_modules: str | None = None,
    support: str = DYNAMIC,
    basis: str = HOSVD,
    basis_scope: str = PER_KIND,
    threshold: float | None = None,
) -> dict[str, SparseGradLinear]:
    """Replace the MLP layers of `model` by `SparseGradLinear`, in place; weights and outputs stay the same.

    Bases and fixed supports are empty until `prepare_layers` or a loaded optimizer state fills them.

    Args:
        n_params: entries of each weight that train (dynamic support: in one step). Structured support rounds up
            to a block of rows and columns (`block_shape`).
        density: the same as a fraction of the weight, in (0, 1]; default 0.012.
        target_modules: regular expression over module names; default: the linear layers of all feed-forwards, found by
            structure (`find_targets`), without those that were frozen (if not all of them are).
        support: `"dynamic"`, `"static"` or `"structured"` (see `SparseTrainingArguments`).
        basis: `"hosvd"`, `"random"` or `"none"`.
        basis_scope: `"kind"`: layers of one kind (equal shapes, and equal names apart from layer numbers) share a
            basis; `"layer"`: each has its own.
        threshold: with dynamic support, update all entries whose gradient has at least this magnitude (above 0),
            instead of a fixed number of entries.

    Returns:
        The converted layers by name.

    Raises:
        InputError: an unknown option, or two that contradict each other; no layer to convert, a layer that is not
            linear or already converted, or more entries than a weight has. The model is unchanged in that case.

    Source: Chekalina et al., EMNLP 2024, arXiv 2410.07383. Without a basis it is MeProp (Sun et al., ICML 2017,
    arXiv 1706.06197) as these authors use it, on entries of the weight's gradient; MeProp itself selects entries of
    the output gradients.
    """
    _check_options(n_params, density, support, basis, basis_scope, threshold)
    targets = find_targets(model, target_modules)
    if target_modules is None:
        kept, frozen = without_frozen({name: linear.weight for name, linear in targets.items()})
        if frozen:
            logger.info("%d frozen layers (%s, ...) are not converted", len(frozen), frozen[0])
        targets = {name: targets[name] for name in kept}
    _refuse_shared(model, targets, support)
    counts = {name: entries_of(linear, name, n_params, density) for name, linear in targets.items()}
    bases: dict[str, Basis] = {}
    converted = {}
    for name, linear in targets.items():
        kind = kind_of(name, linear, basis_scope)
        shared = bases.setdefault(kind, Basis(identity=basis == NONE))
        layer = SparseGradLinear.from_linear(linear, shared, counts[name], kind)
        layer.shared = other_holder(model, linear) is not None
        if threshold is not None:
            layer.threshold, layer.n_params = threshold, linear.weight.numel()  # n_params is an upper bound here
        if support != DYNAMIC:
            layer.expect_fixed_support(block=support == STRUCTURED)
        model.set_submodule(name, layer)
        converted[name] = layer
    return converted


def kind_of(name: str, linear: nn.Module, basis_scope: str) -> str:
    """Return the kind of a layer: layers of one kind share a basis."""
    folded = name if basis_scope == PER_LAYER else fold_layer_numbers(name)
    return f"{folded} {'x'.join(map(str, linear.weight.shape))}"


def entries_of(linear: nn.Module, name: str, n_params: int | None, density: float | None) -> int:
    """Return how many entries of `linear` one step updates, from a count or a fraction in (0, 1].

    Raises:
        InputError: none, or more than the weight has.
    """
    size = linear.weight.numel()
    density = DEFAULT_DENSITY if density is None else density
    count = n_params if n_params is not None else round(density * size)
    if count < 1:
        raise InputError(f"density={density} leaves no trainable entry in {name}, a weight of {size}; raise it")
    if count > size:
        raise InputError(f"n_params={count} is more than the {size} entries of {name}; lower it")
    return count


def merge_sparse(model: nn.Module) -> nn.Module:
    """Replace every `SparseGradLinear` of `model` by the plain layer with the trained weight, in place.

    The weight of a converted layer is always up to date, so only the type of the layers changes. In half-precision
    models the weights are cast back to the model's own dtype.
    """
    for name, layer in sparse_layers(model).items():
        model.set_submodule(name, layer.to_linear())
    return model


def freeze_rest(model: nn.Module, train_rest: str) -> None:
    """Choose which parameters train besides the entries of the converted layers.

    Args:
        train_rest: `"all"`, `"none"`, `"head"` (parameters outside the encoder, `model.base_model_prefix`), or a
            regular expression searched in parameter names (the head trains too).

    Raises:
        InputError: a malformed expression or one that matches no parameter, or a model without a head.
    """
    if train_rest == "all":
        return
    own = {id(p) for layer in sparse_layers(model).values() for p in (layer.weight, getattr(layer, "values", None))}
    rest = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in own}
    if train_rest == "none":
        for parameter in rest.values():
            parameter.requires_grad_(False)
        return
    head = names_in_head(model, rest)
    if len(head) == len(rest) or not head:
        raise InputError(
            f"sparse_train_rest={train_rest!r} needs a model with an encoder (base_model_prefix) and a head, which "
            f"{type(model).__name__} lacks; pass all or none"
        )
    chosen = set()
    if train_rest != "head":
        try:
            chosen = {name for name in rest if re.search(train_rest, name)}
        except re.error as error:
            raise InputError(f"sparse_train_rest={train_rest!r} is no regular expression: {error}") from None
        if not chosen:
            raise InputError(
                f"sparse_train_rest={train_rest!r} matches no parameter; pass all, head, none, or an expression over "
                f"names such as {next(iter(rest))}"
            )
    for name, parameter in rest.items():
        if name not in head | chosen:
            parameter.requires_grad_(False)


def sparse_layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    """Return the converted layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseGradLinear)}


def _check_options(
    n_params: int | None, density: float | None, support: str, basis: str, basis_scope: str, threshold: float | None
) -> None:
    for name, value, known in (
        ("support", support, SUPPORTS),
        ("basis", basis, (HOSVD, NONE, RANDOM)),
        ("basis_scope", basis_scope, SCOPES),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown; choose from: {', '.join(known)}")
    counts = {"n_params": n_params, "density": density, "threshold": threshold}
    given = [f"{name}={value}" for name, value in counts.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} both say which entries train; pass one of them")
    if n_params is not None and n_params < 1:
        raise InputError(f"n_params must be 1 or more, got {n_params}")
    if density is not None and not 0 < density <= 1:
        raise InputError(f"density must be in (0, 1], got {density}")
    if threshold is not None and (not threshold > 0 or support != DYNAMIC):
        raise InputError(f"{given[0]} with support={support!r}: pass a number above 0, and only with dynamic support")


def _refuse_shared(model: nn.Module, targets: dict[str, nn.Module], support: str) -> None:
    """Refuse a target whose weight other modules hold too, unless gradients of all of them reach its entries.

    Dynamic support selects entries of the weight's gradient, to which all modules contribute. A fixed support computes
    the gradients of one layer's entries only, and 16-bit and transposed weights are trained as a copy.
    """
    for name, linear in targets.items():
        other = other_holder(model, linear)
        copied = linear.weight.element_size() < 4 or isinstance(linear, Conv1D)
        if other is not None and (support != DYNAMIC or other in targets or copied):
            raise InputError(
                f"{name} shares its weight with {other}, so its entries cannot train for this layer alone; leave it "
                "out of target_modules, train a SparseGradConfig adapter, or load the model with "
                "tie_word_embeddings=False"
            )
