"""Base class of our tuners, on top of peft's `BaseTuner`: targets by layer and of any class, checks."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_adapters_not_merged,
    _delete_auxiliary_adapter,
    onload_layer,
)
from peft.utils import TaskType
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.layers import inside_adapter, matches, names_by_layer, plain_name, split_layer
from hf_ft_ext.errors import InputError

logger = logging.getLogger(__name__)


class LayerTuner(BaseTuner):
    """A tuner whose targets are modules of any class in the model's layers.

    Attributes:
        cannot_merge: for error messages: why its adapters cannot be merged; `None` = they can.
        reaches_wrapped: whether it adapts modules inside of modules that adapters have wrapped; peft skips them.
    """

    cannot_merge: str | None = None
    reaches_wrapped = False
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (peft's form; targets are found by structure)

    def _prepare_adapter_config(self, peft_config, model_config: dict):
        return peft_config  # `_choose_targets` sets the defaults: it has the model

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter `adapter_name` to `model`, as in peft."""
        config = self.peft_config[adapter_name]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            if isinstance(config.target_modules, tuple):
                config.target_modules = list(config.target_modules)

    def _prepare_model(self, peft_config, model: nn.Module) -> None:
        refuse_unknown_pattern(model, peft_config)
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config.target_modules = self._all_linear(peft_config, model)
        self._choose_targets(peft_config, model)
        refuse_unknown_names(model, peft_config)
        if not self.reaches_wrapped:
            refuse_wrapped_targets(model, peft_config)
        if isinstance(peft_config.target_modules, list):
            # peft shortens lists of 20 names or more to common endings. A name of ours is complete, within its layer
            # or in the model, so shortened names would match fewer modules. peft leaves tuples as they are.
            peft_config.target_modules = tuple(peft_config.target_modules)

    def _choose_targets(self, peft_config, model: nn.Module) -> None:
        """Set default targets, and refuse unsuitable ones."""
        raise NotImplementedError

    def _supports(self, module: nn.Module) -> bool:
        """Whether a linear layer gets an adapter with `target_modules="all-linear"`."""
        return True

    def _all_linear(self, config, model: nn.Module) -> list[str]:
        """Plain names of the layers that `target_modules="all-linear"` means: as in peft, without the head.

        peft's own list lacks layers that a tuner of ours has wrapped.
        """
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        found, left_out, inside = [], [], tuple[str, ...]()
        for name, module in model.named_modules():
            if name.startswith(inside):
                continue
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                inside = (*inside, f"{name}.")
            if not isinstance(base, nn.Linear | Conv1D) or head in (module, base):
                continue
            if head is None and config.task_type == TaskType.SEQ_CLS and name in SEQ_CLS_HEAD_NAMES:
                continue
            (found if self._supports(module) else left_out).append(plain_name(name))
        if left_out:
            logger.warning(
                "all-linear: %d layers get no adapter, as they do not compute a plain linear product (%s, ...)",
                len(left_out),
                left_out[0],
            )
        return found

    def _wrap(
        self, adapter_name: str, parent: nn.Module, target_name: str, target: nn.Module, config: Any, *own: Any
    ) -> None:
        """Put the tuner's layer in place of `target`, or add the adapter to the layer that is there.

        Args:
            own: what the layer's class takes beside the configuration.
        """
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config, *own)
            return
        layer = self.tuner_layer_cls(target, adapter_name, config, *own)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool:
        return matches(peft_config, plain_name(key))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if hasattr(new_module, "base_layer"):
            reference = next(child.parameters(), None)
            if reference is not None and reference.device.type != "meta":
                for name, module in new_module.named_children():
                    if name != "base_layer" and not _on_meta(module):
                        module.to(reference.device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, the first of the others becomes active.

        peft takes the new active adapter from the first layer only, which may have none of the others.
        """
        if adapter_name not in self.peft_config:
            raise InputError(f"there is no adapter {adapter_name!r}; this model has: {', '.join(self.peft_config)}")
        was_active = adapter_name in self.active_adapters
        active = [name for name in self.active_adapters if name != adapter_name]
        _check_adapters_not_merged(self.model, adapter_name)
        for module in self.model.modules():
            if isinstance(module, self.tuner_layer_cls):
                module._active_adapter = [name for name in module.active_adapters if name != adapter_name]
                module.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        if was_active:
            active = active or list(self.peft_config)[:1]
        _delete_auxiliary_adapter(self.model, adapter_name, new_active_adapters=active)
        if was_active and active:
            self.set_adapter(active)  # they train from now on, as in peft
        self.active_adapter = active

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: raise an `InputError`."""
        raise InputError(
            f"{type(self).__name__} cannot combine adapters into a new one; activate several with "
            "model.base_model.set_adapter([...]), which adds their changes"
        )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise InputError(
                f"adapter_names={kwargs['adapter_names']} chooses an adapter for each row, which "
                f"{type(self).__name__} does not support; call set_adapter, and pass the rows of one adapter at a time"
            )
        yield

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if self.cannot_merge is not None:
            raise InputError(f"{self.cannot_merge}; keep it as an adapter, or remove it with unload()")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft, but inner adapters first: an outer one (IA3) scales the weight that the inner ones changed."""
        self._check_merge_allowed()
        done: set[nn.Module] = set()
        for outer in self.model.modules():
            if not isinstance(outer, BaseTunerLayer) or outer in done:
                continue
            inside = [module for module in outer.modules() if isinstance(module, BaseTunerLayer)]
            for module in reversed(inside):
                with onload_layer(module):
                    module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            done.update(inside)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:  # all adapters around a module: peft merges the outermost only
            self.merge_adapter(adapter_names, safe_merge)
        while True:  # adapters inside of a wrapped block are found only after its wrapper is removed
            super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
            if not has_adapters(self.model):
                return self.model

    # --- files ------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        found = cls._to_save(model, config, adapter_name, found)
        return {_name_without_others(model, key, adapter_name): tensor for key, tensor in found.items()}

    @classmethod
    def _to_save(cls, model: nn.Module, config, adapter_name: str, state_dict: dict) -> dict:
        """The tensors of an adapter that are saved, by their names in `model`."""
        return state_dict

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        here = {}
        for key in model.state_dict():
            if ".base_layer." in key and f".{adapter_name}." in f"{key}.":
                name = cls._remove_adapter_name_from_key(key, adapter_name)
                alone = _name_without_others(model, key, adapter_name)
                alone = cls._remove_adapter_name_from_key(alone, adapter_name)
                here |= {alone: name, _PEFT + alone: _PEFT + name}  # files have peft's prefix, the model may not
        state_dict = {here.get(key, key): tensor for key, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


_PEFT = "base_model.model."


class FollowsBaseLayer(nn.Module):
    """Base of our layers: attributes are also those of the wrapped module, whose device and dtype the adapter gets.

    The model around a module reads its parts: RWKV's rescaling takes `feed_forward.value`. peft's own method for
    device and dtype needs a `weight` or `qweight` of the wrapped module, which an attention or a block lacks.
    """

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        like_base_layer(self, adapter_name, device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: the tuner has refused to merge adapters of this layer, but merges those of other layers."""

    def unmerge(self) -> None:
        """Do nothing: this layer never merges."""


def has_adapters(model: nn.Module) -> bool:
    """Whether any module of the model is wrapped by an adapter's layer."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def refuse_unfit_layers(model: nn.Module, kind: str, layers: int | list[int] | None, known: list[int]) -> None:
    """Raise an `InputError` if `layers_to_transform` contains layers that the model does not have."""
    if layers is None:
        return
    wanted = [layers] if isinstance(layers, int) else layers
    missing = [layer for layer in wanted if layer not in known]
    if missing:
        shown = f"{known[0]} to {known[-1]}" if known else "none"
        raise InputError(
            f"{kind}: layers_to_transform={wanted} names layer {missing[0]}, and {type(model).__name__} has layers "
            f"{shown}; pass layers of this range"
        )


def refuse_unknown_pattern(model: nn.Module, config) -> None:
    """Raise an `InputError` if `layers_pattern` names no list of layers."""
    if config.layers_pattern and not names_by_layer(model, config.layers_pattern):
        lists = {
            plain_name(name).rpartition(".")[2]: None
            for name, m in model.named_modules()
            if isinstance(m, nn.ModuleList)
        }
        raise InputError(
            f"layers_pattern={config.layers_pattern!r} names no list of layers of {type(model).__name__}, which has "
            f"{', '.join(lists) or 'none'}; pass one of these names, or leave it out"
        )


def refuse_unknown_names(model: nn.Module, config) -> None:
    """Raise an `InputError` if a list of targeted or excluded modules contains a name of no module."""
    plain = [plain_name(name) for name, _ in model.named_modules()]
    inner = (split_layer(name, config.layers_pattern) for name in plain)
    known = {*plain, *(found.name for found in inner if found is not None)}
    for option in ("target_modules", "exclude_modules"):
        names = getattr(config, option, None)
        wrong = [name for name in names or () if name not in known] if not isinstance(names, str) else []
        if wrong:
            similar = sorted((name for name in known if name.endswith(f".{wrong[0]}")), key=len)[:3]
            shown = f", such as {', '.join(map(repr, similar))}" if similar else ""
            raise InputError(
                f"{option}: {type(model).__name__} has no module {wrong[0]!r}; pass complete names within a layer or "
                f"in the model{shown}, or a regular expression as a string"
            )


def refuse_wrapped_targets(model: nn.Module, config) -> None:
    """Raise an `InputError` if a target is inside of a module that another adapter has wrapped."""
    for name, _ in model.named_modules():
        if ".base_layer." in name and not inside_adapter(name, model) and matches(config, plain_name(name)):
            raise InputError(
                f"{plain_name(name)} is inside of {plain_name(name.rpartition('.base_layer.')[0])}, which another "
                "adapter has wrapped, so peft cannot adapt it any more; add the two adapters in the other order"
            )


def refuse_nested_targets(model: nn.Module, kind: str, config) -> None:
    """Raise an `InputError` if the configuration targets a module and another module inside of it."""
    targeted: set[str] = set()
    for name, _ in model.named_modules():
        name = plain_name(name)
        if not name or not matches(config, name):
            continue
        outer = next((part for part in _enclosing_modules(name) if part in targeted), None)
        if outer is not None:
            raise InputError(
                f"{kind}: target_modules={config.target_modules!r} matches {outer!r} and {name!r}, which is inside of "
                "it; an adapter cannot wrap both, so match one of the two (or put the other in exclude_modules)"
            )
        targeted.add(name)


def like_base_layer(layer: BaseTunerLayer, adapter_name: str, device=None) -> None:
    """Move an adapter to the device and floating-point type of the module that it wraps, of any class.

    Parts on the meta device stay there; peft fills them later (`low_cpu_mem_usage`).
    """
    reference = next(layer.get_base_layer().parameters(), None)
    if reference is None:
        return
    dtype = reference.dtype if reference.is_floating_point() else None
    for name in layer.adapter_layer_names:
        parts = getattr(layer, name)
        if adapter_name in parts and not _on_meta(parts[adapter_name]) and reference.device.type != "meta":
            parts[adapter_name].to(reference.device if device is None else device, dtype)


def _name_without_others(model: nn.Module, key: str, adapter_name: str) -> str:
    """The name that the parameter `key` of an adapter has in a model with this adapter only.

    If another adapter wraps a module around the parameter's owner, the owner's path has one more `base_layer`.
    """
    if ".base_layer." not in key:
        return key
    kept, owner = [], model
    for part in key.split("."):
        wrapped_by_others = (
            part == "base_layer"
            and isinstance(owner, BaseTunerLayer)
            and adapter_name not in owner._get_available_adapters()
        )
        if not wrapped_by_others:
            kept.append(part)
        owner = getattr(owner, "_modules", {}).get(part)
    return ".".join(kept)


def _enclosing_modules(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())
