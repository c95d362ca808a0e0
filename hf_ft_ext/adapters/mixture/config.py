"""Configuration of a model whose layers carry adapters of several kinds."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.settings import LayeredConfig
from hf_ft_ext.errors import InputError, did_you_mean

# What a tuner overrides if it keeps state beyond its layers, or looks at the model as a whole.
_MAKES = ("__init__", "_pre_injection_hook", "_post_injection_hook", "inject_adapter")
_OF_THE_MIXTURE = ("modules_to_save", "layers_to_transform")


@dataclass
class LayerMixtureConfig(LayeredConfig):
    """Which adapter each layer gets: `layers` maps a layer to names in `kinds`, `kinds` a name to its peft settings.

    One `PeftModel` of this type holds LoRA in one layer, a bottleneck in the next and a prefix in a third; it saves,
    loads, switches on and off as one adapter.

    Attributes:
        kinds: name -> settings of a peft configuration with its `peft_type`; configurations are taken too.
        layers: number of the layer (a string, as JSON has it; numbers are taken too) -> names of kinds.

    Raises:
        InputError: an unknown kind, or one that cannot be limited to layers.
    """

    kinds: dict[str, Any] = field(default_factory=dict, metadata={"help": "Name -> settings with `peft_type`."})
    layers: dict[str, Any] = field(default_factory=dict, metadata={"help": "Layer -> name(s) of kinds."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = AdapterType.LAYER_MIXTURE
        self.configs: dict[str, PeftConfig] = {
            name: limited_to_layers(name, settings) for name, settings in self.kinds.items()
        }
        self.layers = {str(layer): _listed(names) for layer, names in self.layers.items()}
        for layer, names in self.layers.items():
            if not layer.isdigit():
                raise InputError(f"layers={{{layer!r}: ...}}: {layer!r} is no number of a layer; count from 0")
            for name in names:
                if name not in self.configs:
                    raise InputError(
                        f"layer {layer} is to get {name!r}{did_you_mean(name, self.configs)}; the kinds are: "
                        f"{', '.join(self.configs) or 'none'}"
                    )
        self.kinds = {name: settings_of(config) for name, config in self.configs.items()}
        self.target_modules = None  # peft reads it; each kind has its own

    def layers_of(self, kind: str) -> list[int]:
        """The layers that get this kind."""
        return [int(layer) for layer, names in self.layers.items() if kind in names]

    def to_dict(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kinds = {name: settings_of(config) for name, config in self.configs.items()}
        if not getattr(self, "saves_projection", False):  # what is saved are the keys and values that it made
            for settings in kinds.values():
                settings.pop("projection_size", None)
        return {**values, "kinds": kinds}


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def settings_of(config: PeftConfig) -> dict[str, Any]:
    """What `config` says beyond the defaults of its class, in a form that JSON holds."""
    defaults = type(config)()
    values = {key: _plain(getattr(config, key, value)) for key, value in config.to_dict().items()}
    plain = {key: _plain(value) for key, value in defaults.to_dict().items()}
    about_the_model = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
    kept = {k: v for k, v in values.items() if k not in about_the_model and plain.get(k) != v}
    return {"peft_type": _plain(config.peft_type), **{k: v for k, v in kept.items() if k != "peft_type"}}


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    value = getattr(value, "value", value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def limited_to_layers(name: str, settings: PeftConfig | dict[str, Any]) -> PeftConfig:
    """A fresh configuration of these settings, for layers that somebody else chooses.

    Raises:
        InputError: unknown type or setting, or a kind that no layer can have to itself.
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
    if given := [key for key in _OF_THE_MIXTURE if settings.get(key) is not None]:
        raise InputError(
            f"kind {name!r} sets {given[0]}={settings[given[0]]}, and here the whole mixture says so; leave it out"
        )
    if settings.get("bias", "none") != "none":
        raise InputError(f"kind {name!r}: bias={settings['bias']!r} trains biases of layers that are not its own; "
                         "leave it out")  # fmt: skip
    try:
        return config_class(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"kind {name!r}: {error}") from error


def _makes_more_than_layers(tuner: type) -> bool:
    from peft.tuners.tuners_utils import BaseTuner

    return any(getattr(tuner, name) is not getattr(BaseTuner, name) for name in _MAKES)


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
        reason = "puts its parameters before the model or into all layers at once"
    elif not own and (
        getattr(tuner, "uses_shared_state", False)
        or any(getattr(tuner, n) is not getattr(BaseTuner, n) for n in _MAKES)
    ):
        reason = "shares parameters between layers"
    if reason is not None:
        raise InputError(
            f"kind {name!r}: {kind.lower()} {reason}, so it cannot be limited to layers; use lora, ia3, loha, lokr, "
            "bottleneck, layer_prefix, or another method with target_modules"
        )
