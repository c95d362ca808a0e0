"""What our tuners share beyond peft's `BaseTuner`: matching by layer, modules that are no linear layers, refusals."""

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hf_ft_ext.adapters.layers import matches, plain_name
from hf_ft_ext.errors import InputError


class LayerTuner(BaseTuner):
    """A tuner whose targets are modules of the model's layers, of any class.

    `cannot_merge` says, in words for the user, why its adapters cannot be merged; `None` = they can.
    """

    cannot_merge: str | None = None
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (peft's form; targets are found by structure)

    def _prepare_adapter_config(self, peft_config, model_config: dict):
        return peft_config  # `_prepare_model` has the model to look at

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool:
        return matches(peft_config, plain_name(key))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if hasattr(new_module, "base_layer"):
            reference = next(child.parameters(), None)
            if reference is not None and reference.device.type != "meta":
                for name, module in new_module.named_children():
                    if name != "base_layer":
                        module.to(reference.device)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if self.cannot_merge is not None:
            raise InputError(f"{self.cannot_merge}; keep it as an adapter, or take it off with unload()")


def refuse_unfit_layers(model: nn.Module, kind: str, layers: int | list[int] | None, known: list[int]) -> None:
    """Raise an `InputError` where `layers_to_transform` names layers that the model has not."""
    if layers is None:
        return
    wanted = [layers] if isinstance(layers, int) else layers
    missing = [layer for layer in wanted if layer not in known]
    if missing:
        shown = f"{known[0]} to {known[-1]}" if known else "none"
        raise InputError(
            f"{kind}: layers_to_transform={wanted} names layer {missing[0]}, and {type(model).__name__} has layers "
            f"{shown}; pass some of those"
        )


def like_base_layer(layer: BaseTunerLayer, adapter_name: str) -> None:
    """Move an adapter to the device and floating-point type of the module that it is at, whatever that module is."""
    reference = next(layer.get_base_layer().parameters(), None)
    if reference is None or reference.device.type == "meta":
        return
    dtype = reference.dtype if reference.is_floating_point() else None
    for name in layer.adapter_layer_names:
        parts = getattr(layer, name)
        if adapter_name in parts:
            parts[adapter_name].to(reference.device, dtype)
