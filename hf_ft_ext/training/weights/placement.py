"""Checking whether a method can train a model that `device_map` spreads over devices."""

from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.offload import has_offloaded, hold_offloaded

_OFFLOADED = ("cpu", "disk")


def declare_offloaded(model: nn.Module | None) -> None:
    """Give an offloaded model a device map of several entries, and its parameters a lasting identity.

    `Trainer` and accelerate would move a model with no map, or with one entry, to one device, which fails for
    offloaded weights. `cpu_offload` and `disk_offload` set none, and `save_pretrained` needs one.
    """
    if not isinstance(model, nn.Module) or not has_offloaded(model):
        return
    hold_offloaded(model, check_ties=False)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if len(getattr(inner, "hf_device_map", None) or {}) < 2:
        inner.hf_device_map = {"": "disk", **{name: "disk" for name, _ in inner.named_children()}}


def check_placement(
    model: nn.Module | None, several: bool, unchanged: bool = False, offloaded_too: bool = False
) -> None:
    """Refuse to train a model with offloaded weights, or one on several devices if the method needs one device.

    A model on a single device, including the CPU, is always accepted.

    Args:
        model: the model; its `hf_device_map` holds the placement.
        several: whether the method can train a model on several devices.
        unchanged: whether the model is only evaluated, without adapters.
        offloaded_too: whether the method can train a model with offloaded weights.

    Raises:
        InputError: the method cannot train the model with this placement.
    """
    inner = model.get_base_model() if model is not None and hasattr(model, "get_base_model") else model
    devices = {str(device) for device in (getattr(inner, "hf_device_map", None) or {}).values()}
    if unchanged or (len(devices) < 2 and "disk" not in devices):
        return
    shown = ", ".join(sorted(devices))
    offloaded = sorted(devices.intersection(_OFFLOADED))
    if offloaded and offloaded_too:
        return
    if offloaded:
        raise InputError(
            f"device_map keeps parts of the model on {offloaded[-1]} and fetches them for each forward pass "
            f"({shown}), so they cannot train or get adapters; use more or larger accelerators, quantization, a "
            "search (method gradientless), or evaluate only, with method full"
        )
    if not several:
        raise InputError(
            f"device_map spreads the model over {shown}, and this method keeps what it computes on one device; leave "
            "device_map out, or pass method full, lora or gradientless"
        )


def check_map(device_map: str | dict[str, object] | None, model: nn.Module, name: str) -> None:
    """Refuse a device map that names modules or parameters that the model does not have.

    Args:
        device_map: the argument of `from_pretrained`.
        name: name of the model, for error messages.

    Raises:
        InputError: the map names an unknown part.
    """
    if not isinstance(device_map, dict):
        return
    known = {part for part, _ in model.named_modules()} | {part for part, _ in model.named_parameters()}
    if unknown := [part for part in device_map if part not in known]:
        raise InputError(
            f"device_map names {unknown[0]!r}, and model {name!r} has no such part; its parts are "
            f"{', '.join(part for part, _ in model.named_children())} and their submodules"
        )
