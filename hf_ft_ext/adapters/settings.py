"""Base classes of our adapters' configurations: the layers and modules that get an adapter."""

from dataclasses import dataclass, field

from peft import PeftConfig


@dataclass
class LayeredConfig(PeftConfig):
    """Configuration of an adapter in the layers of a model."""

    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers, if the first number in module names is not the layer's."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter."}
    )


@dataclass
class TargetedConfig(LayeredConfig):
    """Configuration of an adapter at selected modules of selected layers."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that get no adapter, named as in `target_modules`."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layers that get an adapter, counted from 0; none = all."}
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
