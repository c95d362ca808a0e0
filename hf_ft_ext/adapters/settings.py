"""What the configurations of our adapters share: which layers and modules of a model they are about."""

from dataclasses import dataclass, field

from peft import PeftConfig


@dataclass
class LayeredConfig(PeftConfig):
    """Configuration of an adapter that sits in layers."""

    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, where the first number in names is not it."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that train in full and are saved with the adapter."}
    )


@dataclass
class TargetedConfig(LayeredConfig):
    """Configuration of an adapter that sits beside chosen modules of chosen layers."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that get no adapter, named as in `target_modules`."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
