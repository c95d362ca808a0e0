"""Configuration of bottleneck adapters."""

from dataclasses import dataclass, field

from transformers.activations import ACT2FN

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.settings import TargetedConfig
from hf_ft_ext.errors import InputError

PLACEMENTS = PFEIFFER, HOULSBY, PARALLEL = ("pfeiffer", "houlsby", "parallel")
NORMS = ("none", "before", "after", "both")
DEFAULT_SIZE = 64


@dataclass
class BottleneckConfig(TargetedConfig):
    """Bottleneck adapters: `x + scaling * up(activation(down(x)))` in a layer.

    Placements:
        `pfeiffer`: one adapter after the feed-forward (Pfeiffer et al. 2021, arXiv 2005.00247). In a layer that
            normalises after the residual sum `s` (BERT and its kin), the adapter reads `LN(s)` and the layer gives
            `LN(s + adapter)`, as in AdapterHub's configuration of that name; elsewhere it reads and changes the
            feed-forward's output.
        `houlsby`: one after the attention's output projection and one after the feed-forward, each before the
            residual sum (Houlsby et al. 2019, arXiv 1902.00751).
        `parallel`: beside the feed-forward, reading its input (He et al. 2022, arXiv 2110.04366; they scale by 4).

    Raises:
        InputError: a value out of range, or two that contradict each other.
    """

    placement: str = field(default=PFEIFFER, metadata={"help": "Where the adapters sit.", "choices": PLACEMENTS})
    bottleneck_size: int | None = field(
        default=None,
        metadata={"help": f"Width of the bottleneck; none and no `reduction_factor` = {DEFAULT_SIZE}."},
    )
    reduction_factor: float | None = field(
        default=None, metadata={"help": "Hidden size divided by the bottleneck's width, instead of a width."}
    )
    activation: str | None = field(
        default=None,
        metadata={"help": "Activation by transformers' name; none = relu (houlsby: silu, as AdapterHub has it)."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout before the down projection, in [0, 1)."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of what the adapter adds."})
    learned_scaling: bool = field(
        default=False, metadata={"help": "Train the factor, one number per adapter, from `scaling` on."}
    )
    layer_norm: str = field(
        default="none",
        metadata={"help": "A LayerNorm of the adapter's own: before the down projection, after the up projection.",
                  "choices": NORMS},
    )  # fmt: skip
    init_std: float = field(
        default=0.02, metadata={"help": "Both projections start as N(0, init_std), biases at zero: near identity."}
    )
    init_weights: bool | str = field(
        default=True, metadata={"help": "true: N(0, init_std). zero: the up projection is zero, exactly identity."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter: names within a layer, whole names, or one regular expression over "
            "whole names; none = by placement."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = AdapterType.BOTTLENECK
        if self.placement not in PLACEMENTS:
            raise InputError(f"placement={self.placement!r} is unknown; choose from: {', '.join(PLACEMENTS)}")
        if self.layer_norm not in NORMS:
            raise InputError(f"layer_norm={self.layer_norm!r} is unknown; choose from: {', '.join(NORMS)}")
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise InputError(
                f"bottleneck_size={self.bottleneck_size} and reduction_factor={self.reduction_factor} both say how "
                "wide the bottleneck is; pass one of them"
            )
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise InputError(f"bottleneck_size={self.bottleneck_size} is no width; pass 1 or more")
        if self.reduction_factor is not None and not self.reduction_factor > 0:
            raise InputError(f"reduction_factor={self.reduction_factor} is no factor; pass 16, say")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} is no share in [0, 1); pass 0.1, say")
        if self.activation is None:
            self.activation = "silu" if self.placement == HOULSBY else "relu"
        if self.activation not in ACT2FN:
            raise InputError(f"activation={self.activation!r} is unknown to transformers; pass relu, gelu, silu, ...")
        if self.init_weights not in (True, "zero"):
            raise InputError(f"init_weights={self.init_weights!r} is unknown; pass true or zero")

    def width(self, hidden: int) -> int:
        """Width of the bottleneck beside `hidden` features."""
        if self.reduction_factor is not None:
            return max(1, int(hidden / self.reduction_factor))
        return DEFAULT_SIZE if self.bottleneck_size is None else self.bottleneck_size
