"""Arguments of `--method sparse`."""

import importlib.util
from dataclasses import dataclass, field
from typing import ClassVar

from hf_ft_ext.adapters.sparse_grad.config import DEFAULT_DENSITY, PER_KIND, PER_LAYER, SCOPES
from hf_ft_ext.adapters.sparse_grad.config import DEFAULT_GRADIENTS as DEFAULT_BASIS_STEPS
from hf_ft_ext.arguments import Gradients, MethodTrainingArguments
from hf_ft_ext.errors import InputError

SUPPORTS = DYNAMIC, STATIC, STRUCTURED = ("dynamic", "static", "structured")
BASES = HOSVD, NONE, RANDOM, SVD = ("hosvd", "none", "random", "svd")
RESTS = ALL, HEAD, NOTHING = ("all", "head", "none")
ORIENTATIONS = TUCKER, PUBLISHED = ("tucker", "published")
MOMENTS = OWN, DENSE = ("own", "dense")
# Default learning rates, for the entries of blocks and for all weights. Few trained entries need a larger rate, which
# was tuned on a 384-wide encoder (docs/sparse.md).
BLOCK_LEARNING_RATE, WEIGHT_LEARNING_RATE = 1e-3, 5e-5


@dataclass
class SparseTrainingArguments(MethodTrainingArguments):
    """`transformers.TrainingArguments` plus what SparseGrad needs.

    Raises:
        InputError: a value out of range, or two values that contradict each other.
    """

    _argument_group_name = "sparse"
    advanced_fields: ClassVar[tuple[str, ...]] = (
        "sparse_basis_orientation", "sparse_basis_refresh_steps", "sparse_moments", "sparse_skip_leading",
        "sparse_show_steps",
    )  # fmt: skip

    sparse_density: float | None = field(
        default=None,
        metadata={
            "help": f"Fraction of the entries of each converted weight that one step updates, in (0, 1]; none = by "
            f"`sparse_n_params`, else {DEFAULT_DENSITY}."
        },
    )
    sparse_n_params: int | None = field(
        default=None,
        metadata={
            "help": "Number of entries of each converted weight that one step updates, instead of `sparse_density`."
        },
    )
    sparse_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression, searched in the dotted names of linear layers; none = those of all "
            "feed-forwards, found by structure."
        },
    )
    sparse_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Dynamic support: update the entries whose (clipped) gradient has at least this magnitude (above "
            "0) instead of a fixed number of entries. The authors' quick starts use 1e-3."
        },
    )
    sparse_support: str = field(
        default=STRUCTURED,
        metadata={
            "help": "Which entries train. structured: a fixed block of the leading rows and columns, as a PEFT "
            "adapter (the cheapest by far). dynamic: the largest entries of each step's gradient (as published). "
            "static: the entries with the largest mean energy in the pre-pass, fixed.",
            "choices": SUPPORTS,
        },
    )
    sparse_basis: str = field(
        default=HOSVD,
        metadata={
            "help": "hosvd: computed from gradients. none: no rotation (MeProp). random: random factors, no pre-pass. "
            "svd: singular vectors of the weights, no pre-pass, structured support only.",
            "choices": BASES,
        },
    )
    sparse_basis_orientation: str = field(
        default=TUCKER,
        metadata={
            "help": "tucker: the input side is rotated by the HOSVD factor. published: by its transpose, as the "
            "authors' code does.",
            "choices": ORIENTATIONS,
        },
    )
    sparse_basis_scope: str | None = field(
        default=None,
        metadata={
            "help": "kind: layers of one kind share a basis (as published). layer: each has its own. none = layer "
            "with structured support, else kind.",
            "choices": SCOPES,
        },
    )
    sparse_basis_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of gradients (one per optimizer step's batch) from which basis and support are chosen; "
            f"none = {DEFAULT_BASIS_STEPS} if the settings need a pre-pass."
        },
    )
    sparse_basis_refresh_steps: int = field(
        default=0,
        metadata={
            "help": "Recompute the hosvd basis every this many optimizer steps; weights and moments are carried over. "
            "Dynamic support uses the gradients since the last refresh, the others another pre-pass. 0 = never.",
        },
    )
    sparse_moments: str = field(
        default=OWN,
        metadata={
            "help": "Adam's moments with dynamic support. own: kept for the entries of the latest step; an entry that "
            "returns starts from zero. dense: kept for all entries, as published; takes as much memory as AdamW.",
            "choices": MOMENTS,
        },
    )
    sparse_skip_leading: float = field(
        default=0.0,
        metadata={
            "help": "Structured support with a hosvd basis: fraction of the leading directions of each side that the "
            "block skips, in [0, 1); 0.25 starts the block after the first quarter of the spectrum.",
        },
    )
    sparse_show_steps: int = field(
        default=0,
        metadata={
            "help": "Measure the sparsity of the gradients, raw and in a basis, before training and every this many "
            "steps; values (sparsity.json) and pictures go to the output folder. Needs matplotlib. 0 = never.",
        },
    )
    sparse_train_rest: str | None = field(
        default=None,
        metadata={
            "help": "What else trains. head: the head and all modules without pretrained weights. all: all other "
            "parameters (as published). none: nothing. Otherwise a regular expression searched in parameter names "
            "(the head trains too). Default: head with structured support, else all."
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"Initial learning rate of the optimizer; none = {BLOCK_LEARNING_RATE} with structured support, "
            f"else {WEIGHT_LEARNING_RATE}."
        },
    )

    def validate(self) -> None:
        for name, known in (
            ("sparse_support", SUPPORTS),
            ("sparse_basis", BASES),
            ("sparse_basis_orientation", ORIENTATIONS),
            ("sparse_basis_scope", (None, *SCOPES)),
            ("sparse_moments", MOMENTS),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(value for value in known if value is not None)
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose from: {choices}")
        # A default that was set here before may be replaced: a hyperparameter search changes `sparse_support`.
        if self.learning_rate in (None, getattr(self, "_rate_set", None)):
            rate = BLOCK_LEARNING_RATE if self.sparse_support == STRUCTURED else WEIGHT_LEARNING_RATE
            self.learning_rate = self._rate_set = rate
        if not isinstance(self.sparse_target_modules, str | None):
            raise InputError(
                "sparse_target_modules must be one regular expression, searched in the names of layers, got "
                f"{self.sparse_target_modules!r}; join several by |"
            )
        if self.sparse_basis_orientation == PUBLISHED and self.sparse_basis != HOSVD:
            raise InputError(
                f"sparse_basis_orientation=published is about the hosvd basis, but sparse_basis={self.sparse_basis}; "
                "leave one of them out"
            )
        if self.sparse_density is not None and self.sparse_n_params is not None:
            raise InputError(
                f"sparse_density={self.sparse_density} and sparse_n_params={self.sparse_n_params} both say how many "
                "entries a step updates; pass one of them"
            )
        if self.sparse_density is not None and not 0 < self.sparse_density <= 1:
            raise InputError(f"sparse_density={self.sparse_density} is out of range; pass a number in (0, 1]")
        if self.sparse_n_params is not None and self.sparse_n_params < 1:
            raise InputError(f"sparse_n_params={self.sparse_n_params} leaves nothing to train; pass 1 or more")
        if self.sparse_threshold is not None:
            if not self.sparse_threshold > 0:
                raise InputError(f"sparse_threshold={self.sparse_threshold} is out of range; pass a number above 0")
            if self.sparse_density is not None or self.sparse_n_params is not None:
                raise InputError(
                    "sparse_threshold says which entries a step updates, sparse_density and sparse_n_params how many; "
                    "pass one of them"
                )
            if self.sparse_support != DYNAMIC:
                raise InputError(
                    f"sparse_threshold is for sparse_support=dynamic, not {self.sparse_support}; leave one of them out"
                )
        if self.sparse_basis_steps is not None and self.sparse_basis_steps < 1:
            raise InputError(
                f"sparse_basis_steps={self.sparse_basis_steps} gives no gradient for a basis; pass 1 or more"
            )
        if self.sparse_basis_refresh_steps < 0:
            raise InputError(
                f"sparse_basis_refresh_steps={self.sparse_basis_refresh_steps} is out of range; pass 0 (never) or more"
            )
        if self.sparse_basis_refresh_steps and self.sparse_basis != HOSVD:
            raise InputError(
                f"sparse_basis_refresh_steps={self.sparse_basis_refresh_steps} is about the hosvd basis, but "
                f"sparse_basis={self.sparse_basis}; leave one of them out"
            )
        if self.sparse_show_steps < 0:
            raise InputError(f"sparse_show_steps={self.sparse_show_steps} is out of range; pass 0 (never) or more")
        if self.sparse_show_steps and importlib.util.find_spec("matplotlib") is None:
            raise InputError(
                f"sparse_show_steps={self.sparse_show_steps} draws pictures, and matplotlib is not installed; run "
                "pip install 'hf_ft_ext[pictures]', or leave it out"
            )
        if not 0 <= self.sparse_skip_leading < 1:
            raise InputError(
                f"sparse_skip_leading={self.sparse_skip_leading} is out of range; pass a number in [0, 1)"
            )
        if self.sparse_skip_leading and (self.sparse_support != STRUCTURED or self.sparse_basis != HOSVD):
            raise InputError(
                f"sparse_skip_leading={self.sparse_skip_leading} is for sparse_support=structured in the hosvd basis, "
                f"not {self.sparse_support} in {self.sparse_basis}; leave it out"
            )
        if self.sparse_moments == DENSE and self.sparse_support != DYNAMIC:
            raise InputError(
                f"sparse_moments=dense is for sparse_support=dynamic, not {self.sparse_support}, whose entries never "
                "change; leave one of them out"
            )
        if self.sparse_basis == SVD and not self.as_adapter:
            raise InputError(
                f"sparse_basis=svd is for structured support as an adapter, and {self.setting_without_adapter} makes "
                "the run convert layers instead; leave one of them out"
            )
        combination = f"sparse_support={self.sparse_support} with sparse_basis={self.sparse_basis}"
        if self.sparse_basis_steps is not None and not self.needs_gradients:
            raise InputError(f"{combination} needs no gradients before training; leave sparse_basis_steps out")
        if self.sparse_basis_scope == PER_LAYER and self.sparse_basis == NONE and self.sparse_support != STRUCTURED:
            raise InputError(f"{combination} has nothing that layers could share; leave sparse_basis_scope out")

    @property
    def setting_without_adapter(self) -> str | None:
        """Return the setting that requires layers converted in place (`SparseGradLinear`), or `None` for an adapter.

        An adapter supports one fixed block in each weight, and its file does not hold the other parameters.
        """
        converting = {
            "sparse_support": self.sparse_support != STRUCTURED,
            "sparse_basis": self.sparse_basis == NONE,
            "sparse_train_rest": self.train_rest not in (HEAD, NOTHING),
            "sparse_basis_orientation": self.sparse_basis_orientation != TUCKER,
            "sparse_basis_refresh_steps": bool(self.sparse_basis_refresh_steps),
            "sparse_skip_leading": bool(self.sparse_skip_leading),
            "sparse_show_steps": bool(self.sparse_show_steps),
        }
        name = next((name for name, converts in converting.items() if converts), None)
        return None if name is None else f"{name}={getattr(self, name)}"

    @property
    def as_adapter(self) -> bool:
        """Whether a PEFT adapter (`SparseGradConfig`) trains rather than converted layers."""
        return self.setting_without_adapter is None

    @property
    def train_rest(self) -> str:
        """`sparse_train_rest` with its default filled in."""
        if self.sparse_train_rest is not None:
            return self.sparse_train_rest
        return HEAD if self.sparse_support == STRUCTURED else ALL

    @property
    def basis_scope(self) -> str:
        """`sparse_basis_scope` with its default filled in."""
        if self.sparse_basis_scope is not None:
            return self.sparse_basis_scope
        return PER_LAYER if self.sparse_support == STRUCTURED else PER_KIND

    @property
    def gradients(self) -> Gradients:
        return Gradients.ADAPTERS if self.as_adapter else Gradients.WEIGHTS

    @property
    def needs_gradients(self) -> bool:
        """Whether the basis or the support is chosen from gradients, that is, whether there is a pre-pass."""
        if self.sparse_basis == HOSVD or self.sparse_support == STATIC:
            return True
        return self.sparse_support == STRUCTURED and self.sparse_basis == NONE

    @property
    def basis_steps(self) -> int:
        """Number of gradients in the pre-pass."""
        return DEFAULT_BASIS_STEPS if self.sparse_basis_steps is None else self.sparse_basis_steps
