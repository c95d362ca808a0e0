"""Freezing the lowest layers of an encoder."""

from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import encoder_path


def fix_layers(model: nn.Module, count: int) -> list[str]:
    """Freeze the `count` lowest layers and the input embeddings; return the names of the parameters.

    The layers are the longest list of modules in the encoder; the embeddings are the parameters before it. Output
    embeddings that are tied to the input embeddings are frozen too.

    Raises:
        InputError: no such list, or one with fewer layers.
    """
    path = encoder_path(model)
    encoder = model if path is None else model.get_submodule(path)
    lists = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)}
    name = max(lists, key=lambda name: len(lists[name]), default=None)
    total = 0 if name is None else len(lists[name])
    if count > total:
        layers = "1 layer" if total == 1 else f"{total} layers"
        raise InputError(
            f"fix_layers={count}, but {type(model).__name__} has {layers} with separate weights; pass at most {total}"
        )
    own = [parameter for parameter, _ in encoder.named_parameters()]
    first = next(i for i, parameter in enumerate(own) if parameter.startswith(f"{name}."))
    lowest = tuple(f"{name}.{i}." for i in range(count))
    frozen = [p for i, p in enumerate(own) if i < first or p.startswith(lowest)]
    parameters = dict(encoder.named_parameters())
    for parameter in frozen:
        parameters[parameter].requires_grad_(False)
    return frozen
