"""Options of a kernel: formula, engine, scalars and parameters."""

import enum
import re
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.structure.heads import names_in_head

Choice = TypeVar("Choice", bound=enum.Enum)
DIMENSION = 4096  # of engine `projected`


class Engine(enum.StrEnum):
    """How a kernel is computed. All engines except `projected` give the same kernel.

    AUTO: `structured`, with autograd example by example for parameters that no rule covers. The default.
    STRUCTURED: per-layer contraction only. It refuses a model with a parameter that no rule covers, instead of
        running its examples one by one, which is slow.
    JACOBIAN: full Jacobians by `torch.func` and one matrix product. For comparison, and for small models of any kind.
    PROJECTED: random projections of the gradients to `dimension` values. Each row runs once. Entries of the kernel
        have a random error with a standard deviation of about `sqrt(2 / dimension)` times the product of the
        gradients' norms or less, and of at most twice that. For many rows; formula `sgd` only.
    """

    AUTO = "auto"
    STRUCTURED = "structured"
    JACOBIAN = "jacobian"
    PROJECTED = "projected"


@dataclass(frozen=True)
class KernelOptions:
    """Options of a kernel, and limits for its computation.

    Attributes:
        formula: see `Formula`.
        engine: see `Engine`.
        binary_classification: use the single scalar `f_1 - f_0` instead of two logits.
        class_diagonal: compute only products of a scalar with itself, `K[i, c, j, c]` (`diagonal_axes` of
            neural-tangents).
        parameters, exclude_embeddings, exclude_head, only_biases: see `kernel_parameters`.
        memory_gb: memory limit above the loaded model, in 10^9 bytes; `None` = half of the free memory.
        batch_size: largest number of examples in a forward pass.
        block_rows: examples of the second side in one stored block; `None` = up to 128.
        dimension: only for engine `projected`: k, the dimension of the projection; `None` = 4096.
        seed: only for engine `projected`: seed of the projection; `None` = 0.
    """

    formula: Formula = Formula.SGD
    engine: Engine = Engine.AUTO
    binary_classification: bool = False
    class_diagonal: bool = False
    parameters: str | None = None
    exclude_embeddings: bool = False
    exclude_head: bool = False
    only_biases: bool = False
    memory_gb: float | None = None
    batch_size: int = 16
    block_rows: int | None = None
    dimension: int | None = None
    seed: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "formula", as_formula(self.formula))
        object.__setattr__(self, "engine", as_engine(self.engine))
        for name in ("memory_gb", "batch_size", "block_rows", "dimension"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value} must be above 0")
        if self.engine is not Engine.PROJECTED:
            for name in ("dimension", "seed"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} applies only to engine=projected, not {self.engine.value}; leave it out")
            return
        if self.formula.signs:
            raise InputError(signs_of_projections(self.formula))
        if self.block_rows is not None:
            raise InputError(
                "block_rows applies only to the exact engines: engine=projected stores rows, not blocks; leave it out"
            )
        object.__setattr__(self, "dimension", DIMENSION if self.dimension is None else self.dimension)
        object.__setattr__(self, "seed", self.seed or 0)


def as_formula(value: str | Formula) -> Formula:
    """The formula of this name.

    Raises:
        InputError: there is none.
    """
    return _member(Formula, "formula", value)


def as_engine(value: str | Engine) -> Engine:
    """The engine of this name.

    Raises:
        InputError: there is none.
    """
    return _member(Engine, "engine", value)


def signs_of_projections(formula: Formula) -> str:
    """The message that refuses a sign formula for the engine `projected`."""
    return (
        f"engine=projected does not support formula {formula.value}: the formula needs the sign of every gradient "
        "entry, which a random projection does not keep; pass formula sgd, or engine auto"
    )


def kernel_parameters(
    model: nn.Module,
    pattern: str | None = None,
    exclude_embeddings: bool = False,
    exclude_head: bool = False,
    only_biases: bool = False,
) -> dict[str, nn.Parameter]:
    """Select parameters by name among those that require gradients (in a PEFT model, the adapter's).

    Args:
        pattern: keep only parameters whose name this regular expression matches (`re.search`).
        exclude_embeddings: drop embedding tables (with the decoders tied to them) and, as in the published code, all
            parameters with "embed" in their name, such as the norm of BERT's embeddings.
        exclude_head: drop parameters outside the base model.
        only_biases: keep only parameters whose last name component is `bias`.

    Raises:
        InputError: an invalid regular expression, or no parameter is left.
    """
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise InputError("the model has no trainable parameter to take a kernel over; unfreeze some")
    if pattern is not None:
        try:
            chosen = {name: p for name, p in chosen.items() if re.search(pattern, name)}
        except re.error as error:
            raise InputError(f"kernel_parameters={pattern!r} is not a valid regular expression: {error}") from None
    if exclude_embeddings:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        chosen = {name: p for name, p in chosen.items() if id(p) not in tables and "embed" not in name}
    if exclude_head:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        own = dict(inner.named_parameters(remove_duplicate=False))
        head = names_in_head(inner, own)
        if not head or len(head) == len(own):
            raise InputError(f"exclude_head: {type(inner).__name__} does not say which part is its base model")
        body = {id(p) for name, p in own.items() if name not in head}
        chosen = {name: p for name, p in chosen.items() if id(p) in body}
    if only_biases:
        chosen = {name: p for name, p in chosen.items() if name.rpartition(".")[2] == "bias"}
    if not chosen:
        settings = {
            "kernel_parameters": pattern,
            "exclude_embeddings": exclude_embeddings,
            "exclude_head": exclude_head,
            "only_biases": only_biases,
        }
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value)
        raise InputError(f"{given}: no trainable parameter is left; some are {', '.join(_some(model))}")
    return chosen


def _member(kind: type[Choice], name: str, value: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"{name}={value!r}; choose from: {', '.join(k.value for k in kind)}") from None


def _some(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad][-3:]
