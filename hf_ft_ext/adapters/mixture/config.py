"""Configuration of a model with adapters of several kinds in its layers."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.settings import LayeredConfig
from hf_ft_ext.errors import InputError, did_you_mean

# Methods that a tuner overrides if it has state beyond its layers, or handles the model as a whole.
_WHOLE_MODEL_METHODS = ("__init__", "_pre_injection_hook", "_post_injection_hook", "inject_adapter")
_MIXTURE_FIELDS = ("modules_to_save", "layers_to_transform")
# Settings of LoRA for what is outside of layers, for tensors that are not modules, or for the model as a whole.
_WHOLE_MODEL_FIELDS = (
    "target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config",
    "ensure_weight_tying",
)  # fmt: skip


@dataclass
class LayerMixtureConfig(LayeredConfig):
    """Adapters of different kinds in different layers: `kinds` defines them, `layers` assigns them to layers.

    One `PeftModel` of this type can have LoRA in one layer, a bottleneck in the next and a prefix in a third. It is
    saved, loaded, enabled and disabled as one adapter.

    Attributes:
        kinds: name -> settings of a peft configuration with its `peft_type`, or a configuration.
        layers: number of the layer (as a string, for JSON, or an integer) -> name(s) of kinds.

    Raises:
        InputError: an unknown kind, or one that cannot be limited to layers.
    """

    kinds: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Name -> peft settings of this kind, with `peft_type`."}
    )
    layers: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Number of the layer -> name(s) of its kinds."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = AdapterType.LAYER_MIXTURE
        self.configs: dict[str, PeftConfig] = {
            name: limited_to_layers(name, settings) for name, settings in self.kinds.items()
        }
        self.layers = {str(layer): _listed(names) for layer, names in self.layers.items()}
        for layer, names in self.layers.items():
            if not layer.isdigit():
                raise InputError(f"layers={{{layer!r}: ...}}: {layer!r} is not a layer number; count from 0")
            for name in names:
                if name not in self.configs:
                    raise InputError(
                        f"layer {layer}: kind {name!r} is not defined{did_you_mean(name, self.configs)}; the kinds "
                        f"are: {', '.join(self.configs) or 'none'}"
                    )
        self.kinds = {name: settings_of(config) for name, config in self.configs.items()}
        self.target_modules = None  # peft reads this attribute; each kind has its own

    def layers_of(self, kind: str) -> list[int]:
        """The layers that get this kind."""
        return [int(layer) for layer, names in self.layers.items() if kind in names]

    def to_dict(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kinds = {name: settings_of(config) for name, config in self.configs.items()}
        if not getattr(self, "saves_projection", False):  # the file holds the resulting keys and values only
            for settings in kinds.values():
                settings.pop("projection_size", None)
        return {**values, "kinds": kinds}


def settings_of(config: PeftConfig) -> dict[str, Any]:
    """The settings of `config` that differ from the defaults of its class, as JSON values."""
    defaults = type(config)()
    values = {key: _plain(getattr(config, key, value)) for key, value in config.to_dict().items()}
    plain = {key: _plain(value) for key, value in defaults.to_dict().items()}
    about_the_model = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
    kept = {k: v for k, v in values.items() if k not in about_the_model and plain.get(k) != v}
    return {"peft_type": _plain(config.peft_type), **{k: v for k, v in kept.items() if k != "peft_type"}}


def limited_to_layers(name: str, settings: PeftConfig | dict[str, Any]) -> PeftConfig:
    """Create the configuration of a kind, without a choice of layers (the mixture assigns them).

    Raises:
        InputError: unknown type or setting, or a kind that cannot be limited to layers.
    """
    if isinstance(settings, PeftConfig):
        settings = settings_of(settings)
    settings = {**settings}
    kind = settings.pop("peft_type", None) or name
    types = {str(getattr(t, "value", t)): t for t in PEFT_TYPE_TO_CONFIG_MAPPING}
    raw = str(getattr(kind, "value", kind))
    if raw.upper() not in types:
        raise InputError(
            f"kind {name!r}: peft has no method {raw!r}{did_you_mean(raw.upper(), types)}; choose from: "
            f"{', '.join(sorted(types)).lower()}"
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[types[raw.upper()]]
    _refuse_unlimited(name, raw, config_class)
    if given := [key for key in _MIXTURE_FIELDS if settings.get(key) is not None]:
        raise InputError(
            f"kind {name!r} sets {given[0]}={settings[given[0]]}, which only the mixture itself can set; leave it out"
        )
    if given := [key for key in _WHOLE_MODEL_FIELDS if settings.get(key)]:
        raise InputError(
            f"kind {name!r} sets {given[0]}={settings[given[0]]}, which a mixture does not support: its kinds adapt "
            "modules of chosen layers; leave it out, or use the method alone"
        )
    if settings.get("bias", "none") != "none":
        raise InputError(
            f"kind {name!r}: bias={settings['bias']!r} would also train biases in layers of other kinds; leave it out"
        )
    try:
        return config_class(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"kind {name!r}: {error}") from error


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    value = getattr(value, "value", value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _handles_whole_model(tuner: type) -> bool:
    from peft.tuners.tuners_utils import BaseTuner

    return any(getattr(tuner, name) is not getattr(BaseTuner, name) for name in _WHOLE_MODEL_METHODS)


def _refuse_unlimited(name: str, kind: str, config_class: type[PeftConfig]) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind.upper()]
    own = config_class.__module__.startswith("hf_ft_ext.")
    limited = "target_modules" in {f.name for f in dataclasses.fields(config_class)}
    reason = None
    if kind.upper() == AdapterType.LAYER_MIXTURE:
        reason = "is a mixture itself"
    elif not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)) or not limited:
        reason = "adds its parameters to the inputs or to all layers at once"
    elif not own and (getattr(tuner, "uses_shared_state", False) or _handles_whole_model(tuner)):
        reason = "shares parameters between layers"
    if reason is not None:
        raise InputError(
            f"kind {name!r}: {kind.lower()} {reason}, so it cannot be limited to layers; use lora, ia3, loha, lokr, "
            "bottleneck, layer_prefix, or another method with target_modules"
        )
