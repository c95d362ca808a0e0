"""Models that `device_map` has spread over devices: who can train them."""

from torch import nn

from hf_ft_ext.errors import InputError

_OFFLOADED = ("cpu", "disk")


def check_placement(model: nn.Module | None, several: bool, unchanged: bool = False) -> None:
    """Refuse to change a model whose weights are fetched for each forward pass, or spread where one device is wanted.

    A model on one device, the CPU among them, always passes.

    Args:
        model: `hf_device_map` says where its parts are.
        several: whether the method trains a model on several devices.
        unchanged: whether it is only evaluated, without adapters.

    Raises:
        InputError: it cannot be trained there.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    places = {str(device) for device in (getattr(inner, "hf_device_map", None) or {}).values()}
    if unchanged or (len(places) < 2 and "disk" not in places):
        return
    shown = ", ".join(sorted(places))
    if offloaded := sorted(places.intersection(_OFFLOADED)):
        raise InputError(
            f"device_map keeps parts of the model on {offloaded[-1]} and fetches them for each forward pass "
            f"({shown}), so they cannot train or get adapters; use more or larger accelerators, quantization, or "
            "evaluate only, with method full"
        )
    if not several:
        raise InputError(
            f"device_map spreads the model over {shown}, and this method keeps what it computes on one device; leave "
            "device_map out, or pass method full, lora or gradientless"
        )


def check_map(device_map: str | dict[str, object] | None, model: nn.Module, name: str) -> None:
    """Refuse a map that names what the model does not have.

    Args:
        device_map: of `from_pretrained`.
        name: of the model, for messages.

    Raises:
        InputError: it names something else.
    """
    if not isinstance(device_map, dict):
        return
    known = {part for part, _ in model.named_modules()} | {part for part, _ in model.named_parameters()}
    if unknown := [part for part in device_map if part not in known]:
        raise InputError(
            f"device_map names {unknown[0]!r}, and model {name!r} has no such part; its parts are "
            f"{', '.join(part for part, _ in model.named_children())} and what these hold"
        )
