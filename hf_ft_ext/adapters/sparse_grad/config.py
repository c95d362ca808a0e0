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
DEFAULT_GRADIENTS = 30  # as in the source; fewer save time and may cost accuracy: docs/sparse.md


@dataclass
class SparseGradConfig(TargetedConfig):
    """Structured SparseGrad: `y = W x + V_r D U_c^T x` in each target layer.

    `D`, shape (r, c), is trained, starting from zero. The orthonormal columns `V_r`, shape (out, r), and `U_c`, shape
    (in, c), are fixed. The base weight does not change; it may have any number format or be quantized.

    With `init="gradient"`, call `compute_bases(model, batches)` before training: it computes the columns from
    gradients (`SparseTrainer` does so automatically).

    Raises:
        InputError: a value out of range, or two that contradict each other.

    Source: Chekalina et al., EMNLP 2024, arXiv 2410.07383, which selects entries in each step, not a fixed block.
    """

    density: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of each weight that is trained, in (0, 1]; none = by `n_params`, else "
            f"{DEFAULT_DENSITY}."
        },
    )
    n_params: int | None = field(
        default=None,
        metadata={"help": "Number of trained entries of each weight, instead of `density`, rounded up to a block."},
    )
    init: Init = field(
        default=GRADIENT,
        metadata={
            "help": "Source of the columns. gradient: the leading HOSVD directions of gradients, from "
            "compute_bases. random: random orthonormal columns. svd: the leading singular vectors of the weights.",
            "choices": INITS,
        },
    )
    scope: Scope = field(
        default=PER_LAYER,
        metadata={
            "help": "layer: each layer has its own columns. kind: layers with equal names (apart from numbers) and "
            "shapes share columns, which are saved once.",
            "choices": SCOPES,
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of random columns and of random sketches."})
    init_std: float = field(
        default=0.0,
        metadata={"help": "Standard deviation of the initial D; 0 = zero, so that the start equals the base model."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers that get an adapter: names within a layer, full names, or one regular expression "
            "that matches full names; none = those of all feed-forwards, found by structure."
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
                f"density={self.density} and n_params={self.n_params} both set the number of trained entries; pass one"
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
        density = DEFAULT_DENSITY if self.density is None else self.density
        count = round(density * size) if self.n_params is None else self.n_params
        if count < 1:
            raise InputError(
                f"density={density} leaves no entry to train in {name}, a weight of {size} entries; raise it"
            )
        if count > size:
            raise InputError(f"n_params={count} is more than the {size} entries of {name}; lower it")
        return block_shape(count, n_out, n_in)


def block_shape(n_params: int, n_out: int, n_in: int) -> tuple[int, int]:
    """Rows and columns `(r, c)` of the cheapest block with at least `n_params` entries.

    Per token the gradient of the block takes `out r + in c` multiplications. With `r c` fixed this is smallest for
    `out r = in c`, so `r = sqrt(n_params in / out)`.
    """
    rows = min(max(round(math.sqrt(n_params * n_in / n_out)), math.ceil(n_params / n_in)), n_out)
    columns = math.ceil(n_params / rows)
    return math.ceil(n_params / columns), columns
