"""Configuration of per-layer prefixes."""

from dataclasses import dataclass, field

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.settings import TargetedConfig
from hf_ft_ext.errors import InputError


@dataclass
class LayerPrefixConfig(TargetedConfig):
    """Prefix tuning in selected layers: trained keys and values in front of the attention's own.

    With `projection_size`, keys and values are computed from a trained embedding by a two-layer network. Embedding and
    first layer are shared by all layers of the adapter; each layer has its own second layer. `save_pretrained` writes
    only the resulting keys and values (and a configuration without projection); see `keep_projection`.

    Source: Li and Liang 2021, arXiv 2101.00190.

    Raises:
        InputError: a value out of range.
    """

    prefix_length: int = field(default=10, metadata={"help": "Number of prefix tokens per layer, 1 or more."})
    projection_size: int | None = field(
        default=None,
        metadata={"help": "Width of the reparametrisation network (FishPAL thesis: 512); none = train keys and values "
                  "directly."},
    )  # fmt: skip
    dropout: float = field(default=0.0, metadata={"help": "Dropout on keys and values, in [0, 1)."})
    init_std: float = field(
        default=0.02, metadata={"help": "Standard deviation of the initial keys and values, without projection."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Attention modules: names within a layer, full names, or one regular expression that matches full "
            "names; none = every self-attention."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = AdapterType.LAYER_PREFIX
        if self.prefix_length < 1:
            raise InputError(f"prefix_length must be 1 or more, got {self.prefix_length}")
        if self.projection_size is not None and self.projection_size < 1:
            raise InputError(f"projection_size must be 1 or more, or none, got {self.projection_size}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")

    def to_dict(self) -> dict:
        values = super().to_dict()
        if not getattr(self, "saves_projection", False):
            values["projection_size"] = None  # the file holds the resulting keys and values only
        return values
