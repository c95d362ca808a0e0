"""The tuner that gives each layer adapters of its own kind."""

from contextlib import nullcontext

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_submodules,
    _maybe_include_all_linear_layers,
)
from peft.utils.integrations import init_empty_weights
from peft.utils.other import set_additional_trainable_modules
from torch import nn

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig
from hf_ft_ext.adapters.layer_prefix.model import fold_to_load, saved_prefixes, with_shared_projection
from hf_ft_ext.adapters.layers import inside_adapter, names_by_layer, plain_name, split_layer
from hf_ft_ext.adapters.mixture.config import LayerMixtureConfig
from hf_ft_ext.adapters.sparse_grad.model import refuse_merging_into
from hf_ft_ext.adapters.tuner import LayerTuner, has_adapters
from hf_ft_ext.errors import InputError
from hf_ft_ext.structure.targets import default_targets


class LayerMixtureModel(LayerTuner):
    """Adapters of several kinds in one model, each created by the tuner of its kind."""

    prefix = "layer_mixture_"  # required by peft; parameters have the prefixes of their kinds
    tuner_layer_cls = BaseTunerLayer

    # --- making it --------------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False, state_dict: dict | None = None,
    ) -> None:  # fmt: skip
        """Add the adapters of `adapter_name` to `model`: peft's method of this name, for several kinds."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, LayerMixtureConfig):
            raise InputError(f"adapter {adapter_name!r} is a {config.peft_type}; this model takes LAYER_MIXTURE only")
        if not any(config.layers.values()):
            raise InputError(
                "the mixture gives no layer an adapter; set layers, which maps numbers of layers to names of kinds"
            )
        known = names_by_layer(model, config.layers_pattern)
        if missing := [layer for layer in config.layers if int(layer) not in known]:
            shown = f"{min(known)} to {max(known)}" if known else "none"
            raise InputError(f"the mixture names layer {missing[0]}, and {type(model).__name__} has layers {shown}")
        before = [(p, p.requires_grad) for p in model.parameters()] if has_adapters(model) else []
        # Prefixes last: they wrap an attention, which changes the names of the modules inside it.
        kinds = sorted(config.configs, key=lambda kind: config.configs[kind].peft_type == AdapterType.LAYER_PREFIX)
        for kind in kinds:
            layers = config.layers_of(kind)
            if layers:
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    self._inject_kind(model, adapter_name, kind, layers)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        for parameter, trains in before:
            parameter.requires_grad = trains

    def _inject_kind(self, model: nn.Module, adapter_name: str, kind: str, layers: list[int]) -> None:
        mixture = self.peft_config[adapter_name]
        config = mixture.configs[kind]
        config.inference_mode = mixture.inference_mode
        if hasattr(config, "layers_pattern"):
            config.layers_pattern = mixture.layers_pattern
        tuner = self._tuner(model, adapter_name, config)
        own = config.peft_type in tuple(AdapterType) or hasattr(config, "feedforward_modules")
        if getattr(config, "target_modules", None) is None and not own:
            table = getattr(tuner, "target_module_mapping", {})
            config.target_modules = default_targets(model, table, getattr(model.config, "model_type", None))
        try:
            config = tuner._prepare_adapter_config(config, self.get_model_config(model))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(
                f"kind {kind!r}: peft knows no default targets for a {model.config.model_type!r} model; set its "
                "target_modules"
            ) from error
        tuner._prepare_model(config, model)
        config = _maybe_include_all_linear_layers(config, model)
        reached = set()
        for name, _ in list(model.named_modules()):
            plain = plain_name(name)
            inner = split_layer(plain, mixture.layers_pattern)
            if inner is None or inner.layer not in layers or inside_adapter(name, model):
                continue
            if any(plain == part or plain.startswith(f"{part}.") for part in mixture.modules_to_save or ()):
                continue
            if plain in reached or not tuner._check_target_module_exists(config, plain):
                continue
            reached.add(plain)
            parent, target, target_name = _get_submodules(model, name)
            if isinstance(target, tuner.tuner_layer_cls) and adapter_name in target._get_available_adapters():
                raise InputError(
                    f"kind {kind!r} and another one of the same method both adapt {plain}, which can have one of them "
                    "only; limit their target_modules"
                )
            tuner._create_and_replace(config, adapter_name, target, target_name, parent, current_key=plain)
            self.targeted_module_names.append(plain)
        inside = (split_layer(plain, mixture.layers_pattern) for plain in reached)
        found = {inner.layer for inner in inside if inner is not None}
        if missing := sorted(set(layers) - found):
            raise InputError(
                f"kind {kind!r} finds no target in layer {missing[0]} (target_modules="
                f"{config.target_modules}); set its target_modules to modules of that layer"
            )

    def _tuner(self, model: nn.Module, adapter_name: str, config) -> BaseTuner:
        """The tuner of a kind for this model, before it injects anything.

        peft's constructor injects into all layers at once, so the object is created without calling it. Kinds whose
        tuner does more than `BaseTuner.__init__` are refused by the configuration (`limited_to_layers`).
        """
        tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        tuner = tuner_class.__new__(tuner_class)
        nn.Module.__init__(tuner)
        tuner.model = model
        tuner.peft_config = {adapter_name: config}
        tuner.targeted_module_names, tuner.targeted_parameter_names = [], []
        tuner.active_adapter = self.active_adapter
        tuner.reaches_wrapped = True
        return tuner

    def _create_and_replace(self, *args, **kwargs) -> None:
        raise NotImplementedError("the tuner of each kind does this: see inject_adapter")

    # --- merging ----------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_merging(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _refuse_merging(self, adapter_names: list[str] | None) -> None:
        """Raise an `InputError` if these adapters (`None`: the active ones) cannot be merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for config in (config for name, config in self.peft_config.items() if name in names):
            for kind, settings in config.configs.items():
                if not config.layers_of(kind):
                    continue
                reason = getattr(PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type], "cannot_merge", None)
                if reason is not None:
                    raise InputError(f"kind {kind!r}: {reason}; keep it as an adapter, or remove it with unload()")
                if settings.peft_type == AdapterType.SPARSE_GRAD:
                    refuse_merging_into(self.model)

    # --- files ------------------------------------------------------------------------------------

    @classmethod
    def _to_save(cls, model, config, adapter_name, state_dict):
        for prefix in _prefixes(config):
            state_dict = saved_prefixes(model, prefix, adapter_name, state_dict)
        return state_dict

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        for prefix in _prefixes(config):
            fold_to_load(model, config, prefix, adapter_name, state_dict)
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return with_shared_projection(model, adapter_name, found)


def _prefixes(config: LayerMixtureConfig) -> list[LayerPrefixConfig]:
    return [kind for kind in config.configs.values() if kind.peft_type == AdapterType.LAYER_PREFIX]
