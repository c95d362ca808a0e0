"""Arguments of `--method sparse`."""

from dataclasses import dataclass, field

from hf_ft_ext.arguments import MethodTrainingArguments
from hf_ft_ext.errors import InputError

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
        metadata={"help": "Regular expression, searched in the dotted names of linear layers; none = the MLP layers."},
    )
    sparse_basis_steps: int = field(
        default=30,
        metadata={"help": "Gradients (of one optimizer step's batch each) that the basis is computed from."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sparse_density is not None and self.sparse_n_params is not None:
            raise InputError(
                f"sparse_density={self.sparse_density} and sparse_n_params={self.sparse_n_params} both say how many "
                "entries a step updates; pass one of them"
            )
        if self.sparse_density is not None and not 0 < self.sparse_density <= 1:
            raise InputError(f"sparse_density={self.sparse_density} is no share; pass a number in (0, 1]")
        if self.sparse_n_params is not None and self.sparse_n_params < 1:
            raise InputError(f"sparse_n_params={self.sparse_n_params} leaves nothing to train; pass 1 or more")
        if self.sparse_basis_steps < 1:
            raise InputError(
                f"sparse_basis_steps={self.sparse_basis_steps} gives no gradient for a basis; pass 1 or more"
            )
