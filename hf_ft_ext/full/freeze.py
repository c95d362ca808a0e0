"""Freezing the lowest layers of an encoder."""

from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import encoder_path
from hf_ft_ext.structure.find import find_structure


def fix_layers(model: nn.Module, count: int) -> list[str]:
    """Freeze the `count` lowest layers and what comes before them; return the names of the parameters.

    Layers are found by structure, in the order in which they run; those of a model with stages (Swin) count through
    all stages. Before them are the input embeddings, or the convolutions that read sounds and images. Output
    embeddings that are tied to the input embeddings are frozen too.

    Raises:
        InputError: the model has fewer layers.
    """
    path = encoder_path(model)
    encoder = model if path is None else model.get_submodule(path)
    lists = _lists_of_layers(model, encoder, path)
    layers = [_beginnings(encoder, name, i) for name in lists for i in range(len(encoder.get_submodule(name)))]
    if count > len(layers):
        total = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
        raise InputError(
            f"fix_layers={count}, but {type(model).__name__} has {total} with separate weights; pass at most "
            f"{len(layers)}"
        )
    own = [name for name, _ in encoder.named_parameters()]
    lowest, others = (tuple(name for layer in part for name in layer) for part in (layers[:count], layers[count:]))
    end = max(i for i, name in enumerate(own) if name.startswith(lowest))
    frozen = [name for name in own[: end + 1] if not name.startswith(others)]
    for name in frozen:
        encoder.get_parameter(name).requires_grad_(False)
    return frozen


def _lists_of_layers(model: nn.Module, encoder: nn.Module, path: str | None) -> list[str]:
    """Names, within the encoder, of the lists of its layers, in execution order."""
    try:
        names = [layer.name for layer in find_structure(model).layers]
    except InputError:  # it does not run on trial rows, or its weights are sharded
        names = []
    inside = "" if path is None else f"{path}."
    lists = [name.removeprefix(inside).rpartition(".")[0] for name in names if name.startswith(inside)]
    if not lists:  # the longest list
        sizes = {name: len(module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)}
        lists = [max(sizes, key=sizes.__getitem__)] if sizes else []
    return list(dict.fromkeys(lists))


def _beginnings(encoder: nn.Module, name: str, number: int) -> list[str]:
    """Beginnings of the names of a layer's parameters: of its elements in the list `name` and parallel ones (XLM)."""
    holder, size = name.rpartition(".")[0], len(encoder.get_submodule(name))
    around = encoder.get_submodule(holder)
    if isinstance(around, nn.ModuleList):  # blocks of layers, one after the other (Funnel)
        return [f"{name}.{number}."]
    lists = [own for own, m in around.named_children() if isinstance(m, nn.ModuleList) and len(m) == size]
    return [f"{holder}.{own}.{number}.".removeprefix(".") for own in lists]
