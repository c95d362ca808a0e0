"""Configuration of per-layer prefixes."""

from dataclasses import dataclass, field

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.settings import TargetedConfig
from hf_ft_ext.errors import InputError


@dataclass
class LayerPrefixConfig(TargetedConfig):
    """Trained keys and values in front of the attention's own, in chosen layers (Li and Liang 2021, arXiv 2101.00190).

    With `projection_size`, what trains is an embedding and a two-layer network that makes the keys and values of it:
    embedding and first layer belong to all layers of the adapter together, the second to each. `save_pretrained`
    writes the keys and values alone (and a configuration without projection); see `keep_projection`.

    Raises:
        InputError: a value out of range.
    """

    prefix_length: int = field(default=10, metadata={"help": "Keys and values in front, per layer; 1 or more."})
    projection_size: int | None = field(
        default=None,
        metadata={"help": "Width of the reparametrisation network (the thesis: 512); none = keys and values train."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on keys and values, in [0, 1)."})
    init_std: float = field(
        default=0.02, metadata={"help": "Without projection, keys and values start as N(0, init_std)."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Attention modules: names within a layer, whole names, or one regular expression over whole "
            "names; none = every self-attention."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = AdapterType.LAYER_PREFIX
        if self.prefix_length < 1:
            raise InputError(f"prefix_length={self.prefix_length} is no length; pass 1 or more")
        if self.projection_size is not None and self.projection_size < 1:
            raise InputError(f"projection_size={self.projection_size} is no width; pass 1 or more, or none")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} is no share in [0, 1); pass 0.1, say")

    def to_dict(self) -> dict:
        values = super().to_dict()
        if not getattr(self, "saves_projection", False):
            values["projection_size"] = None  # what is saved are the keys and values that it made
        return values
