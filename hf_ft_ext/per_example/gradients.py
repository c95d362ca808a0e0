"""`ExampleGradients`: gradients of scalars of each example, by rules that were tried, and by autograd for the rest."""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.per_example.capture import Capture, Function, Owner, Receiver
from hf_ft_ext.per_example.state import (
    Batch,
    batch_in,
    batch_size,
    computing_in,
    evaluating,
    only_trainable,
    rows,
    supports_float64,
    without_cache,
)
from hf_ft_ext.per_example.trial import NotFinite, Shortcuts, Trial, tolerance_of, without
from hf_ft_ext.per_example.types import Gradient

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 16  # enough to see which rules hold


@dataclass(frozen=True)
class Part:
    """Gradients of some examples of a batch.

    Attributes:
        first: position of the first of them in the batch.
        scalars: `[n, c]`.
        gradients: for each of the c scalars, gradients by parameter name, to be summed (`types.dense`); a parameter
            that is absent has gradient 0.
    """

    first: int
    scalars: torch.Tensor
    gradients: list[dict[str, list[Gradient]]]


class ExampleGradients:
    """Gradients of scalars of each example with respect to chosen parameters.

    A forward and one backward pass per scalar over the whole batch, in which no weight's gradient is computed: hooks
    keep what each module read and meet the gradients of what it gave, and a rule per kind of module says how they make
    up the gradients of its parameters (Linear, GPT-2's Conv1D, Embedding, norms; tied weights and modules used several
    times add up). A module without a rule, such as an adapter that uses its parts' weights without calling them, is
    called again for each example alone.

    On the first batch every rule is compared with autograd: the gradient of one example, for a random combination of
    its scalars, beside another example that differs and counts otherwise. Every parameter whose rule differs or fails
    is `uncovered`. A rule that could not be compared, because that example does not depend on the module, makes its
    parameters uncovered as soon as a batch depends on it. Where there are uncovered parameters, examples run one by
    one, so that autograd's own gradient of them is the example's; no parameter is left out. Where a
    classifier reads the first position alone, so does the last layer's feed-forward part.

    Call it with a batch for `Part`s, or `stream` a batch to a receiver, which keeps nothing for the whole model.

    Args:
        model: it is run in evaluation mode and left as it was.
        function: `function(model, batch)` -> one scalar per example `[n]`, or several `[n, c]`, each depending on its
            own example only. Default: the logits of `model(**batch)`, labels left out.
        parameters: the chosen ones by name; default: all that require gradients.
        dtype: type to compute in; `None` = the model's own. In float64 nothing inside falls back to float32. Gradients
            of half-precision models come in float32.
        wide_trial: compare in float64 where the model runs in it, so that even small differences are seen; else in
            the model's own type, which takes no second copy of the weights.
        one_by_one: run examples one by one and take all gradients from autograd, for a function that is not defined
            for several examples (a trainer's `compute_loss`). Nothing is compared then.
        mixing: what to do about a model whose outputs for an example depend on the rest of its batch: `refuse` it, or
            run examples `one_by_one`, so that each is alone in its batch.

    Attributes:
        uncovered: names of the parameters that no rule covers, once a batch was seen.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Function | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        dtype: torch.dtype | None = None,
        *,
        wide_trial: bool = True,
        one_by_one: bool = False,
        mixing: Literal["refuse", "one_by_one"] = "refuse",
    ):
        self.model, self.function = model, function or logits
        chosen = dict(parameters or {n: p for n, p in model.named_parameters() if p.requires_grad})
        if not chosen:
            raise InputError("there is no parameter to take gradients of: all are frozen; pass some, or unfreeze them")
        self.parameters = chosen
        wide = next(iter(chosen.values())).dtype == torch.float64
        self.dtype = torch.float64 if dtype is None and wide else dtype
        self.wide_trial, self.mixing = wide_trial, mixing
        self._owners: list[Owner] = []
        self._shortcuts = Shortcuts(skip=not one_by_one)
        self.uncovered: list[str] | None = list(chosen) if one_by_one else None

    # --- gradients ----------------------------------------------------------------------------------

    def __call__(self, batch: Batch) -> Iterator[Part]:
        """The gradients of `batch`, in one part, or one per example where a parameter is uncovered.

        Raises:
            InputError: as `prepare`.
        """
        self.prepare(batch)
        n, first = batch_size(batch), 0
        while first < n:
            last = first + 1 if self.uncovered else n
            collected = _Collected()
            # no state of the model is held while the caller works with a part
            scalars, capture = self._pass(rows(batch, first, last), collected.receive)
            if failed := capture.failed:  # once more, with autograd's gradients of these
                self._uncover(failed)
                continue
            yield Part(first, scalars, collected.gradients(scalars.shape[1]))
            del collected
            first = last

    def stream(self, batch: Batch, receive: Receiver) -> None:
        """Hand each parameter's gradients to `receive(name, gradients, scalar, first)` in the backward pass.

        They come as soon as the last use of the parameter has its gradient, and are not kept. `gradients` are those of
        the examples from `first` on, to be summed (`types.dense`). A parameter that a scalar does not depend on, or an
        example that runs alone, may be left out: its gradient is 0.

        Raises:
            InputError: as `prepare`.
        """
        self.prepare(batch)
        n, first = batch_size(batch), 0
        while first < n:
            last = first + 1 if self.uncovered else n
            _, capture = self._pass(rows(batch, first, last), _shifted(receive, first))
            if capture.failed:  # only these are still to be done
                direct = {name: self.parameters[name] for name in capture.failed}
                for i in range(first, last):
                    rest = _shifted(receive, i, capture.handed_on)
                    self._run(rows(batch, i, i + 1), [], direct, rest)
                self._uncover(capture.failed)
            first = last

    def _pass(self, batch: Batch, receive: Receiver) -> tuple[torch.Tensor, Capture]:
        """Scalars, and what became of the gradients: a parameter may turn out to have no rule."""
        direct = {name: self.parameters[name] for name in self.uncovered}
        return self._run(batch, without(self._owners, direct), direct, receive)

    def _run(
        self, batch: Batch, owners: list[Owner], direct: dict[str, nn.Parameter], receive: Receiver
    ) -> tuple[torch.Tensor, Capture]:
        def check(scalars: torch.Tensor) -> None:
            if self._shortcuts.short is not None and not scalars.isfinite().all():
                raise _OtherPositionsRead

        with (
            evaluating(self.model),
            without_cache(self.model),
            computing_in(self.model, self.dtype),
            only_trainable(self.model, direct.values()),
        ):
            batch = batch_in(batch, self.dtype)
            while True:
                capture = Capture(owners, direct, batch_size(batch), receive, self._shortcuts.expand)
                try:
                    with self._shortcuts.used(self.model):
                        return capture.run(self.model, batch, self.function, check), capture
                except _OtherPositionsRead:
                    self._shortcuts.short = None

    def _uncover(self, names: set[str]) -> None:
        """Parameters whose gradients are autograd's from here on."""
        new = [name for name in names if name not in self.uncovered]
        if new:
            logger.info("no rule for the gradients of %s (and %d more) in a later batch: examples run one by one",
                        new[0], len(new) - 1)  # fmt: skip
        self.uncovered = [name for name in self.parameters if name in {*self.uncovered, *names}]

    # --- the trial on a few rows --------------------------------------------------------------------

    def prepare(self, batch: Batch) -> None:
        """Find out, on two rows of `batch`, which rules hold; done by the first batch unless called before.

        Raises:
            InputError: the model draws random numbers in evaluation mode, mixes the examples of a batch, or gives
                something else than finite scalars.
        """
        if self.uncovered is not None:
            return
        few = _two_rows(batch)
        trial = self._tried(few)
        if trial.uncovered is None and self.mixing == "refuse":
            raise InputError(self._mixing())
        self._owners, self._shortcuts = trial.owners, trial.shortcuts
        self.uncovered = list(self.parameters) if trial.uncovered is None else trial.uncovered
        if self.uncovered:
            logger.info(
                "no rule for the gradients of %d parameters (%s, ...): examples run one by one",
                len(self.uncovered),
                self.uncovered[0],
            )

    def _tried(self, few: Batch) -> Trial:
        """A trial on short inputs, or in full where the model or the function does not bear them."""
        device = next(iter(self.parameters.values())).device
        own = next(iter(self.parameters.values())).dtype if self.dtype is None else self.dtype
        types = [self.dtype]
        if self.wide_trial:
            types = [torch.float64, torch.float32] if supports_float64(device) else [torch.float32]
        short = _shortened(few)
        # Some models fail in float64 alone (products of expert weights, masks that overflow), others on short inputs.
        ways = [(dtype, inputs) for dtype in types for inputs in ((few,) if short is None else (short, few))]
        for number, (dtype, inputs) in enumerate(ways):
            last = number + 1 == len(ways)
            trial = Trial(self.model, self.function, self.parameters)
            try:
                with evaluating(self.model), without_cache(self.model), computing_in(self.model, dtype):
                    trial.run(batch_in(inputs, dtype), tolerance_of(dtype or own))
                return trial
            except (AssertionError, RuntimeError, LookupError, ValueError) as error:
                if not last and (isinstance(error, NotFinite) or not isinstance(error, InputError)):
                    continue
                if isinstance(error, AssertionError):  # Reformer recomputes activations, in training mode alone
                    raise InputError(
                        f"{type(self.model).__name__} gives no gradients in evaluation mode ({first_line(error)}), "
                        "and dropout makes those of training mode random; choose another model"
                    ) from error
                raise
        raise AssertionError("there is at least one way")

    def _mixing(self) -> str:
        mixing = [n for n, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        named = f" ({', '.join(mixing[:3])})" if mixing else ""
        return (
            f"the outputs of an example depend on the other examples of its batch{named}: gradients per example are "
            "not defined; remove such modules or freeze their statistics"
        )


class _OtherPositionsRead(Exception):
    pass


class _Collected:
    """A receiver that keeps all gradients of a part."""

    def __init__(self):
        self._pieces: dict[int, dict[str, list[Gradient]]] = {}

    def receive(self, name: str, gradients: list[Gradient], scalar: int, first: int) -> None:
        self._pieces.setdefault(scalar, {})[name] = gradients

    def gradients(self, scalars: int) -> list[dict[str, list[Gradient]]]:
        """By scalar and parameter name."""
        return [self._pieces.pop(scalar, {}) for scalar in range(scalars)]


def _shifted(receive: Receiver, start: int, done: Collection[tuple[str, int]] = ()) -> Receiver:
    """`receive` for examples from `start` on, without the names and scalars that it has got."""

    def shifted(name: str, gradients: list[Gradient], scalar: int, first: int) -> None:
        if (name, scalar) not in done:
            receive(name, gradients, scalar, start + first)

    return shifted


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits of `model(**batch)`, labels left out: `[n, classes]`."""
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def trimmed(batch: Batch) -> dict[str, torch.Tensor]:
    """`batch` without the columns at its right end that are padding in every row.

    Every input of the attention mask's shape `[n, tokens]` is cut.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or not mask.any():
        return dict(batch)
    keep = int(mask.any(0).nonzero().max()) + 1
    return {key: value[:, :keep] if value.shape[:2] == mask.shape else value for key, value in batch.items()}


def _two_rows(batch: Batch) -> Batch:
    """The first row of a batch, and the one that differs from it in most places."""
    n = batch_size(batch)
    different = torch.zeros(n)
    for key, value in batch.items():
        if key != "labels" and isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == n:
            different += (value != value[:1]).reshape(n, -1).float().mean(1).cpu()
    other = 1 + int(different[1:].argmax()) if n > 1 else 0
    return {
        key: value[[0, other]] if isinstance(value, torch.Tensor) and value.ndim and len(value) == n else value
        for key, value in batch.items()
    }


def _shortened(few: Batch) -> Batch | None:
    """The first tokens of long texts; `None` where a text is short or begins with padding."""
    mask = few.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] <= _TRIAL_TOKENS:
        return None
    if not mask[:, :_TRIAL_TOKENS].any(1).all():
        return None
    return {
        key: value[:, :_TRIAL_TOKENS]
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[:2] == mask.shape
        else value
        for key, value in few.items()
    }
