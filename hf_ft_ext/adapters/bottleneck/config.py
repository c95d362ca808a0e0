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
            normalises after the residual sum `s` (BERT and related models), the adapter reads `LN(s)`, and the layer
            returns `LN(s + adapter(LN(s)))`, as AdapterHub's configuration of that name. In other layers the adapter
            reads the feed-forward's output and is added to it.
        `houlsby`: one after the attention's output projection and one after the feed-forward, each before the
            residual sum (Houlsby et al. 2019, arXiv 1902.00751).
        `parallel`: in parallel to the feed-forward, from the same input (He et al. 2022, arXiv 2110.04366, with
            scaling 4).

    Raises:
        InputError: a value out of range, or two that contradict each other.
    """

    placement: str = field(
        default=PFEIFFER, metadata={"help": "Where the adapters are in a layer.", "choices": PLACEMENTS}
    )
    bottleneck_size: int | None = field(
        default=None,
        metadata={"help": f"Width of the bottleneck; none = by `reduction_factor`, else {DEFAULT_SIZE}."},
    )
    reduction_factor: float | None = field(
        default=None, metadata={"help": "Hidden size divided by the bottleneck's width, instead of `bottleneck_size`."}
    )
    activation: str | None = field(
        default=None,
        metadata={"help": "Activation, by its name in transformers; none = relu (houlsby: silu, as in AdapterHub)."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout before the down projection, in [0, 1)."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    learned_scaling: bool = field(
        default=False, metadata={"help": "Train the factor, one scalar per adapter, starting from `scaling`."}
    )
    layer_norm: str = field(
        default="none",
        metadata={"help": "Add a LayerNorm before the down projection, after the up projection, or both.",
                  "choices": NORMS},
    )  # fmt: skip
    init_std: float = field(
        default=0.02,
        metadata={"help": "Standard deviation of the initial projection weights (biases are zero)."},
    )
    init_weights: bool | str = field(
        default=True,
        metadata={"help": "true: both projections normal, so the start is close to the base model. zero: the up "
                  "projection is zero, so the start equals the base model."},
    )  # fmt: skip
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter: names within a layer, full names, or one regular expression that "
            "matches full names; none = by placement."
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
                f"bottleneck_size={self.bottleneck_size} and reduction_factor={self.reduction_factor} both set the "
                "width of the bottleneck; pass one of them"
            )
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise InputError(f"bottleneck_size must be 1 or more, got {self.bottleneck_size}")
        if self.reduction_factor is not None and not self.reduction_factor > 0:
            raise InputError(f"reduction_factor must be above 0, such as 16, got {self.reduction_factor}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.activation is None:
            self.activation = "silu" if self.placement == HOULSBY else "relu"
        if self.activation not in ACT2FN:
            raise InputError(f"activation={self.activation!r} is unknown to transformers; pass relu, gelu, silu, ...")
        if self.init_weights not in (True, "zero"):
            raise InputError(f"init_weights={self.init_weights!r} is unknown; pass true or zero")

    def width(self, hidden: int) -> int:
        """Width of the bottleneck for a module with `hidden` features."""
        if self.reduction_factor is not None:
            return max(1, int(hidden / self.reduction_factor))
        return DEFAULT_SIZE if self.bottleneck_size is None else self.bottleneck_size
