"""Arguments of `--method sparse`."""

import importlib.util
from dataclasses import dataclass, field

from hf_ft_ext.arguments import MethodTrainingArguments
from hf_ft_ext.errors import InputError

SUPPORTS = DYNAMIC, STATIC, STRUCTURED = ("dynamic", "static", "structured")
BASES = HOSVD, NONE, RANDOM = ("hosvd", "none", "random")
ORIENTATIONS = TUCKER, PUBLISHED = ("tucker", "published")
SCOPES = PER_KIND, PER_LAYER = ("kind", "layer")
MOMENTS = OWN, DENSE = ("own", "dense")
DEFAULT_BASIS_STEPS = 30
DEFAULT_DENSITY = 0.012  # 28,000 of 768 x 3072 entries, the source's setting for BERT-base


@dataclass
class SparseTrainingArguments(MethodTrainingArguments):
    """`transformers.TrainingArguments` plus what SparseGrad needs.

    Raises:
        InputError: a value out of range, or two values that contradict each other.
    """

    _argument_group_name = "sparse"

    sparse_density: float | None = field(
        default=None,
        metadata={
            "help": f"Share of the entries of each converted weight that one step updates, in (0, 1]; none and no "
            f"`sparse_n_params` = {DEFAULT_DENSITY}."
        },
    )
    sparse_n_params: int | None = field(
        default=None,
        metadata={"help": "Entries of each converted weight that one step updates, instead of a share."},
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
            "help": "With dynamic support, instead of a number: update the entries whose (clipped) gradient has at "
            "least this magnitude, above 0. The authors' quick starts use 1e-3."
        },
    )
    sparse_support: str = field(
        default=DYNAMIC,
        metadata={
            "help": "Which entries train. dynamic: the largest of each step's gradient (as published). static: those "
            "of the largest mean energy in the pre-pass, fixed. structured: a fixed block of the strongest rows and "
            "columns, the cheapest by far.",
            "choices": SUPPORTS,
        },
    )
    sparse_basis: str = field(
        default=HOSVD,
        metadata={
            "help": "hosvd: from gradients. none: no rotation (MeProp). random: random factors (a control).",
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
    sparse_basis_scope: str = field(
        default=PER_KIND,
        metadata={
            "help": "kind: layers of one kind share a basis (as published). layer: each has its own.",
            "choices": SCOPES,
        },
    )
    sparse_basis_steps: int | None = field(
        default=None,
        metadata={
            "help": "Gradients (of one optimizer step's batch each) that basis and support are chosen from; none = "
            f"{DEFAULT_BASIS_STEPS}, where any are needed."
        },
    )
    sparse_basis_refresh_steps: int = field(
        default=0,
        metadata={
            "help": "Compute the hosvd basis anew after every so many optimizer steps, weights and moments carried "
            "over. With dynamic support from the gradients since, else from another pre-pass. 0 = never."
        },
    )
    sparse_moments: str = field(
        default=OWN,
        metadata={
            "help": "Adam's moments with dynamic support. own: of the entries of the latest step, the others start "
            "anew when they come back. dense: of all entries, as published, which takes as much memory as AdamW.",
            "choices": MOMENTS,
        },
    )
    sparse_skip_leading: float = field(
        default=0.0,
        metadata={
            "help": "With structured support and a hosvd basis: share of the leading directions of each side that the "
            "block leaves out, in [0, 1); 0.25 puts it at the end of the first quarter of the spectrum."
        },
    )
    sparse_show_steps: int = field(
        default=0,
        metadata={
            "help": "Measure how sparse the gradients are, raw and in a basis, before training and after every so "
            "many steps; values (sparsity.json) and pictures go to the output folder. Needs matplotlib. 0 = never."
        },
    )
    sparse_train_rest: str = field(
        default="all",
        metadata={
            "help": "What else trains: all other parameters (as published), head only, none, or a regular expression "
            "searched in parameter names (the head trains too)."
        },
    )

    def validate(self) -> None:
        for name, known in (
            ("sparse_support", SUPPORTS),
            ("sparse_basis", BASES),
            ("sparse_basis_orientation", ORIENTATIONS),
            ("sparse_basis_scope", SCOPES),
            ("sparse_moments", MOMENTS),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose from: {', '.join(known)}")
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
            raise InputError(f"sparse_density={self.sparse_density} is no share; pass a number in (0, 1]")
        if self.sparse_n_params is not None and self.sparse_n_params < 1:
            raise InputError(f"sparse_n_params={self.sparse_n_params} leaves nothing to train; pass 1 or more")
        if self.sparse_threshold is not None:
            if not self.sparse_threshold > 0:
                raise InputError(f"sparse_threshold={self.sparse_threshold} is no magnitude; pass a number above 0")
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
                f"sparse_basis_refresh_steps={self.sparse_basis_refresh_steps} is no number of steps; pass 0 (never) "
                "or more"
            )
        if self.sparse_basis_refresh_steps and self.sparse_basis != HOSVD:
            raise InputError(
                f"sparse_basis_refresh_steps={self.sparse_basis_refresh_steps} is about the hosvd basis, but "
                f"sparse_basis={self.sparse_basis}; leave one of them out"
            )
        if self.sparse_show_steps < 0:
            raise InputError(
                f"sparse_show_steps={self.sparse_show_steps} is no number of steps; pass 0 (never) or more"
            )
        if self.sparse_show_steps and importlib.util.find_spec("matplotlib") is None:
            raise InputError(
                f"sparse_show_steps={self.sparse_show_steps} draws pictures, and matplotlib is not installed; run "
                "pip install 'hf_ft_ext[pictures]', or leave it out"
            )
        if not 0 <= self.sparse_skip_leading < 1:
            raise InputError(f"sparse_skip_leading={self.sparse_skip_leading} is no share; pass a number in [0, 1)")
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
        combination = f"sparse_support={self.sparse_support} with sparse_basis={self.sparse_basis}"
        if self.sparse_basis_steps is not None and not self.needs_gradients:
            raise InputError(f"{combination} looks at no gradients before training; leave sparse_basis_steps out")
        if self.sparse_basis_scope == PER_LAYER and self.sparse_basis == NONE and self.sparse_support != STRUCTURED:
            raise InputError(f"{combination} has nothing that layers could share; leave sparse_basis_scope out")

    @property
    def needs_gradients(self) -> bool:
        """Whether basis or support are chosen from gradients, that is whether there is a pre-pass."""
        if self.sparse_basis == HOSVD or self.sparse_support == STATIC:
            return True
        return self.sparse_support == STRUCTURED and self.sparse_basis == NONE

    @property
    def basis_steps(self) -> int:
        """Gradients of the pre-pass."""
        return DEFAULT_BASIS_STEPS if self.sparse_basis_steps is None else self.sparse_basis_steps
