"""Configuration of structured SparseGrad adapters."""

import math
from dataclasses import dataclass, field
from typing import Final, Literal

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.settings import TargetedConfig
from hf_ft_ext.errors import InputError

Init = Literal["gradient", "random", "svd"]
GRADIENT: Final = "gradient"
RANDOM: Final = "random"
SVD: Final = "svd"
INITS: tuple[Init, ...] = (GRADIENT, RANDOM, SVD)
Scope = Literal["kind", "layer"]
PER_KIND: Final = "kind"
PER_LAYER: Final = "layer"
SCOPES: tuple[Scope, ...] = (PER_KIND, PER_LAYER)
DEFAULT_DENSITY = 0.012  # 28,000 of 768 x 3072 entries, the source's setting for BERT-base
DEFAULT_GRADIENTS = 30


@dataclass
class SparseGradConfig(TargetedConfig):
    """Structured SparseGrad: `y = W x + V_r D U_c^T x` in each target layer.

    `D`, shape (r, c), trains from zero. The orthonormal columns `V_r`, shape (out, r), and `U_c`, shape (in, c), stay
    as they are. The base weight is not touched, whatever its number format or quantization.

    With `init="gradient"`, call `compute_bases(model, batches)` before training: it takes the columns from gradients
    (`SparseTrainer` does that by itself).

    Raises:
        InputError: a value out of range, or two that contradict each other.

    Source: Chekalina et al., EMNLP 2024, arXiv 2410.07383, with a fixed block in place of entries chosen at each step.
    """

    density: float | None = field(
        default=None,
        metadata={"help": f"Share of each weight that trains, in (0, 1]; none and no `n_params` = {DEFAULT_DENSITY}."},
    )
    n_params: int | None = field(
        default=None,
        metadata={"help": "Entries of each weight that train, instead of a share, rounded up to a block."},
    )
    init: Init = field(
        default=GRADIENT,
        metadata={
            "help": "Where the columns come from. gradient: the leading HOSVD directions of gradients, from "
            "compute_bases. random: random orthonormal columns. svd: the leading singular vectors of the weights.",
            "choices": INITS,
        },
    )
    scope: Scope = field(
        default=PER_LAYER,
        metadata={
            "help": "layer: each layer has columns of its own. kind: layers of equal name (but for numbers) and shape "
            "share them, and they are saved once.",
            "choices": SCOPES,
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of random columns and of random sketches."})
    init_std: float = field(
        default=0.0, metadata={"help": "D starts as N(0, init_std); 0 = zero, so that training starts at the base."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers that get an adapter: names within a layer, whole names, or one regular expression "
            "over whole names; none = those of all feed-forwards, found by structure."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = AdapterType.SPARSE_GRAD
        if self.init not in INITS:
            raise InputError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.scope not in SCOPES:
            raise InputError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.density is not None and self.n_params is not None:
            raise InputError(
                f"density={self.density} and n_params={self.n_params} both say how many entries train; pass one"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"density must be in (0, 1], got {self.density}")
        if self.n_params is not None and self.n_params < 1:
            raise InputError(f"n_params must be 1 or more, got {self.n_params}")
        if not self.init_std >= 0:
            raise InputError(f"init_std must be 0 or more, got {self.init_std}")

    def block(self, n_out: int, n_in: int, name: str) -> tuple[int, int]:
        """Rows and columns `(r, c)` of the trained block of a weight of shape (out, in).

        Raises:
            InputError: no entry would train, or more than the weight has.
        """
        size = n_out * n_in
        if self.n_params is not None:
            count = self.n_params
        else:
            count = round((DEFAULT_DENSITY if self.density is None else self.density) * size)
        if count < 1:
            raise InputError(f"density={self.density} leaves nothing to train in {name}, a weight of {size}; raise it")
        if count > size:
            raise InputError(f"n_params={count} is more than the {size} entries of {name}; lower it")
        return block_shape(count, n_out, n_in)


def block_shape(n_params: int, n_out: int, n_in: int) -> tuple[int, int]:
    """Rows and columns `(r, c)` of the block that holds at least `n_params` entries at the least cost.

    Per token the gradient of the block takes `out r + in c` multiplications: least at equal parts, `r : c = in : out`.
    """
    rows = min(max(round(math.sqrt(n_params * n_in / n_out)), math.ceil(n_params / n_in)), n_out)
    columns = math.ceil(n_params / rows)
    return math.ceil(n_params / columns), columns
