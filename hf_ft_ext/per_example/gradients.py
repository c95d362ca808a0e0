"""`ExampleGradients`: which parameter goes by which rule, found out by trying, and the gradients batch by batch."""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.per_example.capture import Function, NoSplit, Owner, gradients
from hf_ft_ext.per_example.forms import Form
from hf_ft_ext.per_example.rules import find_rule
from hf_ft_ext.per_example.state import (
    Batch,
    batch_in,
    computing_in,
    evaluating,
    only_trainable,
    supports_float64,
)
from hf_ft_ext.per_example.trial import differing, sparse_tables
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


class _NotFinite(InputError):
    pass


class ExampleGradients:
    """Gradients of scalars of each example with respect to chosen parameters.

    A forward and one backward pass per scalar over the whole batch, in which no weight's gradient is computed: hooks
    keep what each module read and the gradients of what it gave, and a rule per kind of module says how they make up
    the gradients of its parameters (Linear, GPT-2's Conv1D, Embedding, norms; tied weights and modules used several
    times add up). On the first batch every rule is compared with autograd on a single example and a random combination
    of its scalars, in float64. Every other parameter is `uncovered`: its module has no rule, or the rule differs or
    fails. A rule that could not be compared, because that example does not depend on the module, makes its parameters
    uncovered as soon as a batch depends on it. Where there are uncovered parameters, examples run one by one, so that
    autograd's own gradient of them is the example's; no parameter is left out. Where a classifier reads the first
    position alone, so does the last layer's feed-forward part.

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
        self._expand, self._copy = True, False
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
        """Find out, on two rows of `batch`, which rules hold; done by the first batch unless called before.

        Raises:
            InputError: the model draws random numbers in evaluation mode, mixes the examples of a batch, checkpoints
                its activations, or gives something else than finite scalars.
        """
        rows = _differing_rows(batch)
        few = {key: value[rows] for key, value in batch.items() if key != "labels"}
        if getattr(self.model, "is_activation_checkpointing", False):
            raise InputError(
                "gradient checkpointing is on, which runs modules twice; call model.gradient_checkpointing_disable()"
            )
        device = next(iter(self.parameters.values())).device
        types = [torch.float64, torch.float32] if supports_float64(device) else [torch.float32]
        for dtype in types:
            try:
                self._try_rules(few, dtype)
                break
            except AssertionError as error:  # Reformer recomputes activations, which it does in training mode alone
                raise InputError(
                    f"{type(self.model).__name__} gives no gradients in evaluation mode ({first_line(error)}), and "
                    "dropout makes those of training mode random; choose another model"
                ) from error
            except (RuntimeError, _NotFinite):
                if dtype == types[-1]:
                    raise
                # Some models fail in float64 alone: products of expert weights, masks that overflow.
        if self.uncovered is None:
            raise InputError(self._mixing())
        if self.uncovered:
            logger.info(
                "no rule for the gradients of %d parameters (%s, ...): examples run one by one",
                len(self.uncovered),
                self.uncovered[0],
            )

    def _try_rules(self, few: Batch, dtype: torch.dtype) -> None:
        self._expand, self._copy = True, False
        with evaluating(self.model), computing_in(self.model, dtype):
            few = batch_in(few, dtype)
            self._short = last_feed_forward(self.model)
            self.uncovered = self._tried(few, _TOLERANCE[dtype])
            if self.uncovered != [] and self._short is not None:  # maybe only for NaN that nobody reads
                self._short = None
                self.uncovered = self._tried(few, _TOLERANCE[dtype])

    def _uncover(self, names: set[str]) -> None:
        """Parameters whose gradients are autograd's from here on."""
        self.uncovered = [name for name in self.parameters if name in {*self.uncovered, *names}]

    def __call__(self, batch: Batch) -> Iterator[Part]:
        """The gradients of `batch`, in one part, or one per example where a parameter is uncovered.

        Raises:
            InputError: as `prepare`.
        """
        if self.uncovered is None:
            self.prepare(batch)
        n = batch_size(batch)
        batch = batch_in(batch, self.dtype)
        first = 0
        while first < n:
            step = 1 if self.uncovered else n - first
            part = {key: value[first : first + step] for key, value in batch.items() if key != "labels"}
            direct = {name: self.parameters[name] for name in self.uncovered}
            owners = self._owners_without(direct)
            try:
                # no state of the model is held while the caller works with a part
                with evaluating(self.model), computing_in(self.model, self.dtype), only_trainable(self.model, direct):
                    found = self._gradients(part, owners, direct)
            except NoSplit as error:  # a module that the trial did not reach, or inputs of another kind
                self._uncover(set(error.owner.names.values()))
                continue
            yield Part(first, *found)
            first += step

    def _owners_without(self, names: Collection[str]) -> list[Owner]:
        """The owners of the other parameters."""
        left = []
        for owner in self._owners:
            kept = {own: name for own, name in owner.names.items() if name not in names}
            if kept:
                left.append(owner if len(kept) == len(owner.names) else replace(owner, names=kept))
        return left

    def _gradients(self, batch: Batch, owners: list[Owner], direct: dict[str, nn.Parameter]) -> tuple:
        n = batch_size(batch)
        with first_position_only(self._short):
            scalars, forms = gradients(self.model, batch, self.function, owners, direct, n, self._expand, self._copy)
        if self._short is not None and not scalars.isfinite().all():  # other positions are read here
            self._short = None
            return self._gradients(batch, owners, direct)
        return scalars, forms

    # --- the trial on a few rows --------------------------------------------------------------------

    def _tried(self, few: Batch, tolerance: float) -> list[str] | None:
        """Parameters without a rule that holds; `None` if an example's outputs are others in the batch than alone.

        A forward pass costs about as much as it takes to read the weights, so none is made only to be compared.
        """
        together = self._outputs(few)
        if self._short is not None and not together.isfinite().all():
            return None
        self._check(together)
        weights = _combination(together)
        combined, forms, failed = self._by_rules(few, weights)
        expected = _weighed(together, weights)
        if not torch.equal(expected, combined) and not torch.equal(together, self._outputs(few)):
            raise InputError(
                f"{type(self.model).__name__} gives other outputs for the same batch in evaluation mode; "
                "remove what draws random numbers"
            )
        with only_trainable(self.model, self.parameters), sparse_tables(self.model):
            try:
                first = self.function(self.model, _row(few, 0))
                with torch.no_grad():
                    alone = torch.cat([first, self.function(self.model, _row(few, 1))])
            except ValueError:  # a norm over the batch refuses a batch of one
                return None
            if not (together - alone).abs().max() <= tolerance * (1 + together.abs().max()):
                return None
            failed |= differing(self.parameters, _weighed(first, weights)[0, 0], forms[0], tolerance, failed)
        owned = {name for owner in self._owners for name in owner.names.values()}
        for owner in self._owners:
            # These examples do not depend on the others: a batch that does makes them uncovered (`NoSplit`).
            owner.tried = any(name in forms[0] for name in owner.names.values())
        return [name for name in self.parameters if name in failed or name not in owned]

    def _outputs(self, few: Batch) -> torch.Tensor:
        with torch.no_grad(), first_position_only(self._short):
            return self.function(self.model, few)

    def _check(self, outputs: torch.Tensor) -> None:
        if outputs.ndim not in (1, 2) or len(outputs) != _SAMPLE:
            raise InputError(
                f"the function gave shape {tuple(outputs.shape)} for {_SAMPLE} examples; it has to give one scalar "
                "per example [n], or several [n, c]"
            )
        if not outputs.isfinite().all():
            raise _NotFinite("the model's outputs are not finite (NaN or infinite); look for bad weights")

    def _by_rules(
        self, few: Batch, weights: torch.Tensor
    ) -> tuple[torch.Tensor, list[dict[str, list[Form]]], set[str]]:
        """Combined scalars, their forms, and the names of the parameters that cannot have any."""
        failed: set[str] = set()
        function = self.function
        self.function = lambda model, batch: _weighed(function(model, batch), weights)
        for owner in self._owners:
            owner.tried = True
        try:
            while True:
                with only_trainable(self.model, ()):
                    try:
                        return *self._gradients(few, self._owners_without(failed), {}), failed
                    except NoSplit as error:
                        failed |= set(error.owner.names.values())
                    except RuntimeError:
                        if self._copy:
                            raise
                        # The model itself repeats what an embedding gives, or changes a module's output in place.
                        self._expand, self._copy = False, not self._expand
        finally:
            self.function = function

    def _mixing(self) -> str:
        mixing = [n for n, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        named = f" ({', '.join(mixing[:3])})" if mixing else ""
        return (
            f"the outputs of an example depend on the other examples of its batch{named}: gradients per example are "
            "not defined; remove such modules or freeze their statistics"
        )


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


def _differing_rows(batch: Batch) -> list[int]:
    """The first row, and the one that differs from it in most places."""
    n = batch_size(batch)
    if n == 1:
        return [0, 0]
    different = torch.zeros(n)
    for key, value in batch.items():
        if key != "labels" and value.ndim > 1:
            different += (value != value[:1]).reshape(n, -1).float().mean(1).cpu()
    return [0, 1 + int(different[1:].argmax())]


def _combination(scalars: torch.Tensor) -> torch.Tensor:
    """Random weights of the scalars of an example, none near 0: `[c]`."""
    count = 1 if scalars.ndim == 1 else scalars.shape[1]
    if count == 1:
        return scalars.new_ones(1)
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(scalars)
    return drawn + drawn.sign()


def _weighed(scalars: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_c weights[c] scalars[:, c]`: `[n, 1]`."""
    scalars = scalars[:, None] if scalars.ndim == 1 else scalars
    return (scalars * weights).sum(1, keepdim=True)


def _row(batch: Batch, i: int) -> dict[str, torch.Tensor]:
    return {key: value[i : i + 1] for key, value in batch.items()}
