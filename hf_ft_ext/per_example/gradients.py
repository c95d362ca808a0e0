"""`ExampleGradients`: which parameter goes by which rule, found out by trying, and the gradients batch by batch."""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.capture import Function, NoSplit, Owner, gradients
from hf_ft_ext.per_example.forms import Form, Rows, dense, largest
from hf_ft_ext.per_example.rules import find_rule
from hf_ft_ext.per_example.state import (
    Batch,
    batch_in,
    computing_in,
    evaluating,
    only_trainable,
    supports_float64,
)
from hf_ft_ext.per_example.unread import first_position_only, last_feed_forward

logger = logging.getLogger(__name__)

_SAMPLE = 2
# Relative differences beyond which a rule's gradient is another one than autograd's.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2}


@dataclass(frozen=True)
class Part:
    """Gradients of some examples of a batch.

    Attributes:
        first: position of the first of them in the batch.
        scalars: `[n, c]`.
        gradients: for each of the c scalars, forms by parameter name, to be summed (`forms.dense`); a parameter that
            is absent has gradient 0.
    """

    first: int
    scalars: torch.Tensor
    gradients: list[dict[str, list[Form]]]


class ExampleGradients:
    """Gradients of scalars of each example with respect to chosen parameters.

    A forward and one backward pass per scalar over the whole batch, in which no weight's gradient is computed: hooks
    keep what each module read and the gradients of what it gave, and a rule per kind of module says how they make up
    the gradients of its parameters (Linear, GPT-2's Conv1D, Embedding, norms; tied weights and modules used several
    times add up). On the first batch every rule is compared with autograd on single examples, in float64. If a
    parameter has no rule, or its rule differs (`uncovered`), examples run one by one, so that autograd's own gradient
    of that parameter is the example's; no parameter is left out silently. Where a classifier reads the first position
    alone, so does the last layer's feed-forward part.

    Args:
        model: it is run in evaluation mode and left as it was.
        function: `function(model, batch)` -> one scalar per example `[n]`, or several `[n, c]`, each depending on its
            own example only. Default: the logits of `model(**batch)`, labels left out.
        parameters: the chosen ones by name; default: all that require gradients.
        dtype: type to compute in; `None` = the model's own. In float64 nothing inside falls back to float32.

    Attributes:
        uncovered: names of the parameters that no rule covers, once a batch was seen.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Function | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.function = model, function or logits
        chosen = dict(parameters or {n: p for n, p in model.named_parameters() if p.requires_grad})
        if not chosen:
            raise InputError("there is no parameter to take gradients of: all are frozen; pass some, or unfreeze them")
        self.parameters = chosen
        wide = next(iter(chosen.values())).dtype == torch.float64
        self.dtype = torch.float64 if dtype is None and wide else dtype
        self._name_of = {id(parameter): name for name, parameter in chosen.items()}
        self._owners = self._find_owners()
        self._expand = True
        self._short: nn.Module | None = None  # a layer of which only the first position is read
        self.uncovered: list[str] | None = None

    def _find_owners(self) -> list[Owner]:
        owners = []
        for path, module in self.model.named_modules():
            own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            names = {key: self._name_of[id(p)] for key, p in own.items() if id(p) in self._name_of}
            rule = find_rule(module) if names else None
            if rule is not None:
                owners.append(Owner(path, module, rule, names))
        return owners

    def prepare(self, batch: Batch) -> None:
        """Find out, on a few rows of `batch`, which rules hold; done by the first batch unless called before.

        Raises:
            InputError: the model draws random numbers in evaluation mode, mixes the examples of a batch, checkpoints
                its activations, or gives something else than finite scalars.
        """
        n = batch_size(batch)
        rows = [0, 1] if n > 1 else [0, 0]
        few = {key: value[rows] for key, value in batch.items() if key != "labels"}
        if getattr(self.model, "is_activation_checkpointing", False):
            raise InputError(
                "gradient checkpointing is on, which runs modules twice; call model.gradient_checkpointing_disable()"
            )
        dtype = torch.float64 if supports_float64(next(iter(self.parameters.values())).device) else torch.float32
        with evaluating(self.model), computing_in(self.model, dtype):
            few = batch_in(few, dtype)
            self._check_function(few, _TOLERANCE[dtype])
            self.uncovered = self._find_uncovered(few, _TOLERANCE[dtype])
            if self.uncovered and self._short is not None:  # maybe only for NaN that nobody reads
                self._short = None
                self.uncovered = self._find_uncovered(few, _TOLERANCE[dtype])
        if self.uncovered:
            logger.info(
                "no rule for the gradients of %d parameters (%s, ...): examples run one by one",
                len(self.uncovered),
                self.uncovered[0],
            )
            bad = set(self.uncovered)
            for owner in self._owners:
                owner.names = {own: name for own, name in owner.names.items() if name not in bad}
            self._owners = [owner for owner in self._owners if owner.names]

    def __call__(self, batch: Batch) -> Iterator[Part]:
        """The gradients of `batch`, in one part, or one per example where a parameter is uncovered.

        Raises:
            InputError: as `prepare`.
        """
        if self.uncovered is None:
            self.prepare(batch)
        direct = {name: self.parameters[name] for name in self.uncovered}
        n = batch_size(batch)
        step = 1 if direct else n
        batch = batch_in(batch, self.dtype)
        for first in range(0, n, step):
            part = {key: value[first : first + step] for key, value in batch.items() if key != "labels"}
            # no state of the model is held while the caller works with a part
            with evaluating(self.model), computing_in(self.model, self.dtype), only_trainable(self.model, direct):
                found = self._gradients(part, self._owners, direct)
            yield Part(first, *found)

    def _gradients(self, batch: Batch, owners: list[Owner], direct: dict[str, nn.Parameter]) -> tuple:
        n = batch_size(batch)
        with first_position_only(self._short):
            scalars, forms = gradients(self.model, batch, self.function, owners, direct, n, self._expand)
        if self._short is not None and not scalars.isfinite().all():  # other positions are read here
            self._short = None
            return self._gradients(batch, owners, direct)
        return scalars, forms

    # --- the trial on a few rows --------------------------------------------------------------------

    def _check_function(self, few: Batch, tolerance: float) -> None:
        with torch.no_grad():
            together, again = self.function(self.model, few), self.function(self.model, few)
        if together.ndim not in (1, 2) or len(together) != _SAMPLE:
            raise InputError(
                f"the function gave shape {tuple(together.shape)} for {_SAMPLE} examples; it has to give one scalar "
                "per example [n], or several [n, c]"
            )
        if not together.isfinite().all():
            raise InputError("the model's outputs are not finite (NaN or infinite); look for bad weights")
        if not torch.equal(together, again):
            raise InputError(
                f"{type(self.model).__name__} gives other outputs for the same batch in evaluation mode; "
                "remove what draws random numbers"
            )

        def mixed() -> bool:
            try:
                with torch.no_grad(), first_position_only(self._short):
                    alone = torch.cat([self.function(self.model, _row(few, i)) for i in range(_SAMPLE)])
            except ValueError:  # a norm over the batch refuses a batch of one
                return True
            return not (together - alone).abs().max() <= tolerance * (1 + together.abs().max())

        self._short = last_feed_forward(self.model)
        if self._short is not None and mixed():
            self._short = None
        if self._short is None and mixed():
            mixing = [
                name
                for name, module in self.model.named_modules()
                if isinstance(module, nn.modules.batchnorm._BatchNorm)
            ]
            named = f" ({', '.join(mixing[:3])})" if mixing else ""
            raise InputError(
                "the outputs of an example depend on the other examples of its batch"
                f"{named}: gradients per example are not defined; remove such modules or freeze their statistics"
            )

    def _find_uncovered(self, few: Batch, tolerance: float) -> list[str]:
        failed: set[str] = set()
        while True:
            owners = [owner for owner in self._owners if not failed & set(owner.names.values())]
            with only_trainable(self.model, ()):
                try:
                    _, forms = self._gradients(few, owners, {})
                    break
                except NoSplit as error:
                    failed |= set(error.owner.names.values())
                except RuntimeError:
                    if not self._expand:
                        raise
                    self._expand = False  # the model itself repeats what an embedding gives
        with only_trainable(self.model, self.parameters), _sparse_tables(self.model):
            scalars = self.function(self.model, _row(few, 0))
            # the last scalar stands for all: a rule knows nothing of the scalar
            scalar = scalars[0] if scalars.ndim == 1 else scalars[0, -1]
            failed |= self._differing(scalar, forms[-1], tolerance, failed)
        return [name for name in self.parameters if name in failed]

    def _differing(
        self, scalar: torch.Tensor, forms: dict[str, list[Form]], tolerance: float, failed: Collection[str]
    ) -> set[str]:
        """Names of the parameters whose forms, for the first example, are not the gradient of `scalar`."""
        errors: dict[str, float] = {}
        sizes = dict.fromkeys(self.parameters, 0.0)

        def compare(name: str, expected: torch.Tensor) -> None:
            expected = expected.coalesce() if expected.is_sparse else expected
            sizes[name] = largest(expected.values() if expected.is_sparse else expected)
            if name not in failed and name in forms:
                errors[name] = _error([form[:1] for form in forms[name]], expected)

        with _each_gradient(self.parameters, compare):
            scalar.backward()
        top = max(sizes.values())
        for name in self.parameters:
            if name not in errors and name not in failed:  # a hook saw it and autograd did not, or the reverse
                found = largest(dense([form[:1] for form in forms[name]])) if name in forms else 0.0
                errors[name] = abs(found - sizes[name])
        return {n for n, error in errors.items() if not error <= tolerance * (sizes[n] + tolerance * top)}


def _error(forms: list[Form], expected: torch.Tensor) -> float:
    """Largest difference between one example's forms and its gradient, which may be sparse by rows."""
    if all(isinstance(form, Rows) for form in forms):  # without writing out a table that is nearly all zero
        ids = torch.cat([form.ids[0] for form in forms])
        rows, places = ids.clamp_min(0).unique(return_inverse=True)
        grads = torch.cat([form.grads[0] for form in forms]) * (ids >= 0)[:, None]
        found = grads.new_zeros(len(rows), expected.shape[1]).index_add_(0, places, grads)
        there = expected.index_select(0, rows)
        entries = expected
        if expected.is_sparse:
            there, entries = there.to_dense(), expected.values()
        elsewhere = torch.linalg.vector_norm(entries, 1) - torch.linalg.vector_norm(there, 1)
        return max(largest(found - there), float(elsewhere.abs()))
    expected = expected.to_dense()
    found = dense(forms)[0]
    if found.shape != expected.shape:
        return inf
    return largest(found.sub_(expected))


@contextlib.contextmanager
def _sparse_tables(model: nn.Module) -> Iterator[None]:
    """Embeddings give gradients of the rows that they read: a table may be most of a model."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and not (m.sparse or m.scale_grad_by_freq)]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


@contextlib.contextmanager
def _each_gradient(
    parameters: Mapping[str, nn.Parameter], look: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """In a backward pass, hand each gradient to `look` and drop it: they never exist all at once."""
    before = {name: parameter.grad for name, parameter in parameters.items()}

    def hook(name: str) -> Callable[[nn.Parameter], None]:
        def seen(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            look(name, gradient)

        return seen

    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.grad = before[name]


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits of `model(**batch)`, labels left out: `[n, classes]`."""
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def batch_size(batch: Batch) -> int:
    """Examples in `batch`."""
    return len(next(iter(batch.values())))


def trimmed(batch: Batch) -> dict[str, torch.Tensor]:
    """`batch` without the columns at its right end that are padding in every row.

    Every input of the attention mask's shape `[n, tokens]` is cut.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or not mask.any():
        return dict(batch)
    keep = int(mask.any(0).nonzero().max()) + 1
    return {key: value[:, :keep] if value.shape[:2] == mask.shape else value for key, value in batch.items()}


def _row(batch: Batch, i: int) -> dict[str, torch.Tensor]:
    return {key: value[i : i + 1] for key, value in batch.items()}
