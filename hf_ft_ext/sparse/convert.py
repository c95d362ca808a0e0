"""Turning a model's MLP layers into SparseGrad layers, and back."""

from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.sparse.arguments import DEFAULT_DENSITY
from hf_ft_ext.sparse.basis import Basis
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.targets import find_targets
from hf_ft_ext.training.plan import fold_layer_numbers


def convert_to_sparse(
    model: nn.Module,
    n_params: int | None = None,
    density: float | None = None,
    target_modules: str | None = None,
) -> dict[str, SparseGradLinear]:
    """Replace the MLP layers of `model` by `SparseGradLinear`, in place; weights and outputs stay the same.

    Layers of one kind (equal names but for layer numbers, equal shapes) share a basis, which is empty until
    the gradient pre-pass.

    Args:
        n_params: entries of each weight that one step updates.
        density: the same as a share of the weight, in (0, 1]; default 0.012.
        target_modules: regular expression over module names; default: the MLP layers of known model types.

    Returns:
        The converted layers by name.

    Raises:
        InputError: nothing to convert, layers that are not linear or converted already, or more entries asked
            for than a weight has. The model is left as it was.
    """
    targets = find_targets(model, target_modules)
    counts = {name: entries_of(linear, name, n_params, density) for name, linear in targets.items()}
    bases: dict[tuple, Basis] = {}
    converted = {}
    for name, linear in targets.items():
        kind = f"{fold_layer_numbers(name)} {linear.out_features}x{linear.in_features}"
        basis = bases.setdefault(kind, Basis())
        converted[name] = SparseGradLinear.from_linear(linear, basis, counts[name], kind)
        model.set_submodule(name, converted[name])
    return converted


def entries_of(linear: nn.Linear, name: str, n_params: int | None, density: float | None) -> int:
    """Entries that one step updates in `linear`, from a count or a share."""
    size = linear.weight.numel()
    count = n_params if n_params is not None else round((DEFAULT_DENSITY if density is None else density) * size)
    if count < 1:
        raise InputError(f"density={density} leaves no trainable entry in {name}, a weight of {size}; raise it")
    if count > size:
        raise InputError(f"n_params={count} is more than the {size} entries of {name}; lower it")
    return count


def merge_sparse(model: nn.Module) -> nn.Module:
    """Replace every `SparseGradLinear` of `model` by the plain `nn.Linear` with the trained weight, in place.

    The weight of a converted layer is up to date at all times, so this only changes the type of the layers;
    half-precision models get these weights back in the model's own dtype.
    """
    for name, layer in sparse_layers(model).items():
        model.set_submodule(name, layer.to_linear())
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    """The converted layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseGradLinear)}
