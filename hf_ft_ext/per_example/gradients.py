"""`ExampleGradients`: per-example gradients by verified rules, and by autograd where no rule holds."""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.per_example.capture import Capture, Function, HookedModule, Receiver
from hf_ft_ext.per_example.outputs import logits
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
from hf_ft_ext.per_example.trial import NotFinite, Shortcuts, Trial, tolerance_of, without_parameters
from hf_ft_ext.per_example.types import Gradient

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 16  # enough to verify the rules


@dataclass(frozen=True)
class Part:
    """Gradients of some examples of a batch.

    Attributes:
        first: position in the batch of the first of these examples.
        scalars: `[n, c]`.
        gradients: for each of the c scalars, one gradient per use of each parameter, by name; their sum
            (`types.dense`) is the parameter's gradient. An absent parameter has gradient 0.
    """

    first: int
    scalars: torch.Tensor
    gradients: list[dict[str, list[Gradient]]]


class ExampleGradients:
    """Computes gradients of each example's scalars with respect to chosen parameters.

    One forward pass and one backward pass per scalar run over the whole batch, and no weight gradient is computed in
    them. Hooks store the inputs of each module and receive the gradients of its outputs. A rule per kind of module
    (Linear, GPT-2's Conv1D, Embedding, norms) combines them to per-example gradients of its parameters. Gradients of
    tied weights, and of modules that are used several times, are summed. A module without a rule is called again for
    each example separately; an adapter that uses its parts' weights without calling the parts is one.

    On the first batch every rule is compared with autograd: for one example, for a random combination of its scalars,
    in a batch with a second, different example whose scalars have another weight. A parameter whose rule differs or
    fails is `uncovered`. If the compared example does not depend on a module, its rule stays unverified, and its
    parameters become uncovered as soon as a batch depends on it. If there are uncovered parameters, examples run one
    by one, so that autograd's gradient is the example's own. So no parameter is left out. If a classifier
    reads only the first position, the last layer's feed-forward part runs on that position only.

    Call the object with a batch to get `Part`s, or `stream` a batch to a receiver to avoid keeping all gradients.

    Args:
        model: it runs in evaluation mode, and its state is restored.
        function: `function(model, batch)` -> one scalar per example `[n]`, or several `[n, c]`; each may depend only
            on its own example. Default: the logits of `model(**batch)` without labels.
        parameters: the chosen ones by name; default: all that require gradients.
        dtype: type to compute in; `None` = the model's own. In float64, casts to float32 inside the model are
            suppressed. Half-precision models give float32 gradients.
        wide_trial: compare in float64 where the model runs in it, so that small differences are detected; otherwise
            in the model's own type, which needs no second copy of the weights.
        one_by_one: run examples one by one and take all gradients from autograd, without any comparison. For a
            function that is not defined for several examples (a trainer's `compute_loss`).
        mixing: how to treat a model whose outputs for an example depend on the rest of the batch: `refuse` it, or
            run examples `one_by_one`, so that each is the only one in its batch.

    Attributes:
        uncovered: names of the parameters that no rule covers; `None` before the first batch.
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
            raise InputError("there are no parameters to differentiate: all are frozen; pass some, or unfreeze them")
        self.parameters = chosen
        wide = next(iter(chosen.values())).dtype == torch.float64
        self.dtype = torch.float64 if dtype is None and wide else dtype
        self.wide_trial, self.mixing = wide_trial, mixing
        self._hooked_modules: list[HookedModule] = []
        self._shortcuts = Shortcuts(skip_zero_gradients=not one_by_one)
        self._compared = not one_by_one
        # what the trials found, by the kind of rows; the last one is in use
        self._trials: dict[Any, tuple[list[HookedModule], Shortcuts, list[str] | None]] = {}
        self._kind: Any = None
        self.uncovered: list[str] | None = list(chosen) if one_by_one else None

    # --- gradients ----------------------------------------------------------------------------------

    def __call__(self, batch: Batch) -> Iterator[Part]:
        """Yield the gradients of `batch`: in one part, or in one per example if a parameter is uncovered.

        Raises:
            InputError: as `prepare`.
        """
        self.prepare(batch)
        n, first = batch_size(batch), 0
        while first < n:
            last = first + 1 if self.uncovered else n
            collected = _Collected()
            # The model's state is restored before the caller gets the part.
            scalars, capture = self._run(rows(batch, first, last), first, collected.receive)
            if failed := capture.failed:  # run again, with autograd's gradients of these parameters
                self._mark_uncovered(failed)
                continue
            yield Part(first, scalars, collected.gradients(scalars.shape[1]))
            del collected
            first = last

    def stream(self, batch: Batch, receive: Receiver) -> None:
        """Pass each parameter's gradients to `receive(name, gradients, scalar, first)` during the backward pass.

        The call comes as soon as all uses of the parameter have their gradients, which are freed afterwards.
        `gradients` holds one gradient per use, for the examples from `first` on; their sum (`types.dense`) is the
        parameter's. If a scalar does not depend on a parameter, there may be no call: the gradient is 0.

        Raises:
            InputError: as `prepare`.
        """
        self.prepare(batch)
        n, first = batch_size(batch), 0
        while first < n:
            last = first + 1 if self.uncovered else n
            _, capture = self._run(rows(batch, first, last), first, receive)
            if capture.failed:  # only these parameters are missing
                missing = {name: self.parameters[name] for name in capture.failed}
                for i in range(first, last):
                    self._run(rows(batch, i, i + 1), i, receive, missing, capture.delivered)
                self._mark_uncovered(capture.failed)
            first = last

    def _run(
        self,
        batch: Batch,
        first: int,
        receive: Receiver,
        direct: dict[str, nn.Parameter] | None = None,
        skip: Collection[tuple[str, int]] = (),
    ) -> tuple[torch.Tensor, Capture]:
        """Run `batch`, whose first example is number `first` for `receive`.

        Args:
            direct: only these parameters, all by autograd; `None` = all parameters, the uncovered ones by autograd.
            skip: (name, scalar) pairs that `receive` does not get.

        Returns:
            The scalars `[n, c]`, and the capture, which lists parameters whose rule failed in this batch.
        """
        hooked_modules: list[HookedModule] = []
        if direct is None:
            direct = {name: self.parameters[name] for name in self.uncovered or ()}
            hooked_modules = without_parameters(self._hooked_modules, direct)
        with (
            evaluating(self.model),
            without_cache(self.model),
            computing_in(self.model, self.dtype),
            only_trainable(self.model, direct.values()),
        ):
            batch = batch_in(batch, self.dtype)
            while True:
                capture = Capture(
                    hooked_modules, direct, batch_size(batch), receive, self._shortcuts.expand, first=first, skip=skip
                )
                with self._shortcuts.applied(self.model):
                    scalars = capture.forward(self.model, batch, self.function)
                    if self._shortcuts.first_position_layer is None or scalars.isfinite().all():
                        capture.backward(scalars)
                        return scalars.detach(), capture
                # The scalars depend on positions that the shortcut replaced by NaN: run again without it.
                self._shortcuts.first_position_layer = None
                del scalars  # frees the graph first

    def _mark_uncovered(self, names: set[str]) -> None:
        """Take the gradients of these parameters from autograd from now on."""
        known = self.uncovered or []
        new = [name for name in names if name not in known]
        if new:
            logger.info("no rule covers %s (and %d more parameters) in a later batch: examples now run one by one",
                        new[0], len(new) - 1)  # fmt: skip
        self.uncovered = [name for name in self.parameters if name in {*known, *names}]

    # --- the trial on a few rows --------------------------------------------------------------------

    def prepare(self, batch: Batch) -> None:
        """Verify the rules on two rows of `batch`, unless it was done with rows of this kind before.

        Rows of another kind have other inputs, or inputs of another number of axes: a prompt model takes one context
        or several. The model may process them in another layout.

        Raises:
            InputError: the model draws random numbers in evaluation mode, mixes the examples of a batch, or does not
                give finite scalars.
        """
        kind = frozenset((name, value.ndim) for name, value in batch.items() if isinstance(value, torch.Tensor))
        if not self._compared or kind == self._kind:
            return
        known = self._trials.get(kind) or self._tried(batch)
        if self._kind is not None:
            self._trials[self._kind] = self._hooked_modules, self._shortcuts, self.uncovered
        self._kind = kind
        self._hooked_modules, self._shortcuts, self.uncovered = known

    def _tried(self, batch: Batch) -> tuple[list[HookedModule], Shortcuts, list[str]]:
        """The modules with rules, the shortcuts and the uncovered parameters that a trial on two rows finds."""
        trial = self._run_trial(_two_rows(batch))
        if trial.uncovered is None and self.mixing == "refuse":
            raise InputError(self._mixing_message())
        uncovered = list(self.parameters) if trial.uncovered is None else trial.uncovered
        if uncovered:
            logger.info(
                "no rule covers %d parameters (%s, ...): examples run one by one", len(uncovered), uncovered[0]
            )
        return trial.hooked_modules, trial.shortcuts, uncovered

    def _run_trial(self, few: Batch) -> Trial:
        """Run the trial on shortened inputs, or on full ones if the model or the function fails on short ones."""
        device = next(iter(self.parameters.values())).device
        own = next(iter(self.parameters.values())).dtype if self.dtype is None else self.dtype
        types = [self.dtype]
        if self.wide_trial:
            types = [torch.float64, torch.float32] if supports_float64(device) else [torch.float32]
        short = _shortened(few)
        # Some models fail only in float64 (products of expert weights, masks that overflow), others on short inputs.
        attempts = [(dtype, inputs) for dtype in types for inputs in ((few,) if short is None else (short, few))]
        for number, (dtype, inputs) in enumerate(attempts):
            last = number + 1 == len(attempts)
            trial = Trial(self.model, self.function, self.parameters)
            try:
                with evaluating(self.model), without_cache(self.model), computing_in(self.model, dtype):
                    trial.run(batch_in(inputs, dtype), tolerance_of(dtype or own))
                return trial
            except (AssertionError, RuntimeError, LookupError, ValueError) as error:
                # What short inputs lack, such as a prompt's mask, says nothing about the model.
                cut = inputs is not few
                if not last and (cut or isinstance(error, NotFinite) or not isinstance(error, InputError)):
                    continue
                if isinstance(error, AssertionError):  # Reformer recomputes activations in training mode only
                    raise InputError(
                        f"{type(self.model).__name__} gives no gradients in evaluation mode ({first_line(error)}), "
                        "and dropout makes the gradients of training mode random; choose another model"
                    ) from error
                raise
        raise AssertionError("there is at least one attempt")

    def _mixing_message(self) -> str:
        mixing = [n for n, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        named = f" ({', '.join(mixing[:3])})" if mixing else ""
        return (
            f"the outputs of an example depend on the other examples of its batch{named}: per-example gradients are "
            "not defined; remove such modules or freeze their statistics"
        )


class _Collected:
    """A receiver that keeps all gradients of a part."""

    def __init__(self):
        self._pieces: dict[int, dict[str, list[Gradient]]] = {}

    def receive(self, name: str, gradients: list[Gradient], scalar: int, first: int) -> None:
        self._pieces.setdefault(scalar, {})[name] = gradients

    def gradients(self, scalars: int) -> list[dict[str, list[Gradient]]]:
        """By scalar and parameter name."""
        return [self._pieces.pop(scalar, {}) for scalar in range(scalars)]


def _two_rows(batch: Batch) -> Batch:
    """Return the first row of a batch and the row that differs from it in the most positions."""
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
    """Cut long texts to their first tokens; return `None` if the texts are short or one begins with padding."""
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
