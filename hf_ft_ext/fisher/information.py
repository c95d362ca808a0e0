"""The diagonal of the Fisher information: squared or absolute gradients per example, summed."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite

import torch
from torch import nn
from tqdm import tqdm

from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.frozen import skipping_zero_rows
from hf_ft_ext.fisher.losses import LABELS, TRUE, Loss, WholeLoss, draws, problem_type_of, refuse_expectation
from hf_ft_ext.fisher.per_example import Capture, Receiver, find_sites
from hf_ft_ext.per_example.forms import Form, Outer, dense, largest, parts
from hf_ft_ext.per_example.unread import first_position_only, last_feed_forward

logger = logging.getLogger(__name__)

POWERS = (1, 2)
_SAMPLE = 16
_CHUNK = 2**20  # numbers of per-example gradients made at a time: they should not leave the processor's cache by far


@dataclass
class GradientSums:
    """Sums over examples, per parameter.

    Attributes:
        powers: name -> sum of `weight * |gradient|^power`, in the parameter's shape.
        totals: name -> sum of `weight * gradient`; empty unless asked for.
        examples: how many examples, over all processes.
    """

    powers: dict[str, torch.Tensor]
    totals: dict[str, torch.Tensor]
    examples: int


def fisher_information(
    model: nn.Module,
    dataloader: Iterable[dict],
    parameters: Iterable[str] | None = None,
    *,
    labels: str = TRUE,
    power: int = 2,
    loss: Loss | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Sum over examples of the squared (or absolute) gradient of the example's loss, for each scalar parameter.

    The values are those of one backward pass per example, at any batch size. Dropout is off. Each process passes its
    own part of the data; the sums are those of all. The model is left as it was: mode, gradients, what requires them.

    Args:
        model: a sequence classifier (or any model, with `loss`), plain or with peft adapters.
        dataloader: batches of model inputs, `labels` among them.
        parameters: names; `None` = all that require gradients.
        labels: `true`: the empirical Fisher information. `expected`: over the model's own distribution of labels.
        power: 2, or 1 for absolute values.
        loss: `loss(output, batch)` -> `[batch]`, in place of the classifier's; or a `WholeLoss`.
        progress: show a bar (first process only).

    Returns:
        Name -> tensor of the parameter's shape, in single precision at least.

    Raises:
        InputError: labels missing, an unknown parameter or option, or gradients that are not finite.
    """
    return gradient_sums(
        model, dataloader, parameters, labels=labels, power=power, loss=loss, progress=progress
    ).powers


def gradient_sums(
    model: nn.Module,
    dataloader: Iterable[dict],
    parameters: Iterable[str] | None = None,
    *,
    labels: str = TRUE,
    power: int = 2,
    loss: Loss | None = None,
    totals: bool = False,
    progress: bool = True,
) -> GradientSums:
    """`fisher_information`, and with `totals` the sums of the gradients themselves.

    Raises:
        InputError: as for `fisher_information`.
    """
    own = dict(model.named_parameters())
    names = [name for name, p in own.items() if p.requires_grad] if parameters is None else list(parameters)
    problem_type = _check(model, own, names, labels, power, loss)
    sums = GradientSums({n: _zeros(own[n]) for n in names}, {n: _zeros(own[n]) for n in names if totals}, 0)
    device = next(iter(own.values())).device
    with untouched(model):
        looped: list[str] = []
        unseen: set[str] = set()
        short: nn.Module | None = None  # a layer of which only the first position is read
        skip = True  # of frozen linear layers, positions without gradient
        for batch in tqdm(dataloader, desc="Fisher information", disable=not progress or _rank() > 0, leave=False):
            batch = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
            rows = _rows_of(batch, labels, loss)
            if isinstance(loss, WholeLoss):
                looped = names
            elif sums.examples == 0:
                few = (model, _sample(batch), min(rows, 2), names, labels, power, problem_type, loss)
                short = last_feed_forward(model)
                try:
                    with first_position_only(short):
                        trial = Trial.of(*few)
                except AssertionError as error:  # Reformer recomputes activations, which needs training mode
                    raise InputError(
                        f"{type(model).__name__} gives no gradients in evaluation mode ({error}), and dropout makes "
                        "those of training mode random; choose another model"
                    ) from error
                if short is not None and not trial.finite():
                    short, trial = None, Trial.of(*few)
                looped, unseen, skip = trial.missed(), trial.unseen, trial.skips
            hooked = [name for name in names if name not in looped]
            if hooked:
                settings = (labels, power, problem_type, loss)
                looped += _add_hooked(model, batch, rows, hooked, unseen, *settings, sums, short, skip)
            if looped:
                _add_looped(model, batch, rows, looped, labels, power, problem_type, loss, sums)
            sums.examples += rows
    _reduce(sums, device)
    if sums.examples == 0:
        raise InputError("the data loader gave no batch; a Fisher information needs examples")
    if bad := [name for name, value in sums.powers.items() if not torch.isfinite(value).all()]:
        raise InputError(
            f"the gradients of {bad[0]} are not finite; check the data and the model's precision (float16 overflows: "
            "load the model in float32 or bfloat16)"
        )
    return sums


def _check(model, own, names, labels, power, loss) -> str | None:
    if labels not in LABELS:
        raise InputError(f"labels={labels!r} is unknown; choose from: {', '.join(LABELS)}")
    if power not in POWERS:
        raise InputError(f"power={power!r} is unknown; pass 2 for squared gradients or 1 for absolute ones")
    if unknown := [name for name in names if name not in own]:
        raise InputError(f"the model has no parameter {unknown[0]!r}; pass names of model.named_parameters()")
    if not names:
        raise InputError("no parameter requires gradients; pass parameters, the names of those that matter")
    if not_float := [name for name in names if not own[name].is_floating_point()]:
        raise InputError(
            f"{not_float[0]} is quantized ({own[not_float[0]].dtype}) and has no gradient; the Fisher information of "
            "a quantized model is that of its adapters: pass their names"
        )
    problem_type = None if loss is not None else problem_type_of(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    outputs = getattr(getattr(inner, "config", None), "num_labels", 1)
    refuse_expectation(labels, power, problem_type, outputs, loss is not None)
    return problem_type


def _rows_of(batch: dict, labels: str, loss: Loss | None) -> int:
    if labels == TRUE and loss is None and batch.get("labels") is None:
        raise InputError(
            f"a batch has no labels (it has {', '.join(batch)}), and labels='true' needs them; add them, or take the "
            "expectation over the model's own: labels='expected'"
        )
    return next(len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.dim())


def _first(batch: dict, count: int) -> dict:
    return {key: v[:count] if isinstance(v, torch.Tensor) and v.dim() else v for key, v in batch.items()}


def _zeros(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter that requires gradients inside; all as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    trains = [(p, p.requires_grad) for p in model.parameters()]
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    try:
        model.eval()
        for p, _ in trains:
            p.requires_grad_(False)
        if cache:
            model.config.use_cache = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, trained in trains:
            p.requires_grad_(trained)
        if cache:
            model.config.use_cache = cache


def _backward(model, capture: Capture, batch, rows, labels, power, problem_type, loss, weigh, short=None) -> None:
    """One forward pass, and a backward pass per draw of labels; `weigh` is told the weights of each.

    Args:
        short: a layer of which only the first position should be needed; if others are, it runs in full.
    """

    def pairs_of(layer: nn.Module | None) -> list[tuple]:
        capture.begin(rows)
        with first_position_only(layer):
            return list(draws(model(**_inputs(batch, loss)), batch, labels, power, problem_type, loss))

    with torch.enable_grad():
        pairs = pairs_of(short)
        if short is not None and not all(values.isfinite().all() for _, values in pairs):
            pairs = pairs_of(None)
        for i, (weights, values) in enumerate(pairs):
            weigh(weights)
            if values.requires_grad:
                values.sum().backward(retain_graph=i + 1 < len(pairs))


def _inputs(batch: dict, loss: Loss | None) -> dict:
    """Without labels where the loss is computed here: the model's own would cost, and average."""
    return batch if loss is not None else {key: value for key, value in batch.items() if key != "labels"}


def _add_hooked(model, batch, rows, names, unseen, labels, power, problem_type, loss, sums, short, skip) -> list[str]:
    """Add the gradients by hooks; the names of the parameters that turned out to have none are returned."""
    weights: list[torch.Tensor | float] = [1.0]
    receive = _summing(sums, power, weights)

    def weigh(found: torch.Tensor | float) -> None:
        weights[0] = found

    sites = find_sites(model, names)
    for site in sites:
        site.untried = not unseen.isdisjoint(site.names.values())
    with Capture(sites, receive) as capture, skipping_zero_rows(model) if skip else contextlib.nullcontext():
        _backward(model, capture, batch, rows, labels, power, problem_type, loss, weigh, short)
    return [name for site in sites if site.unfit for name in site.names.values()]


def _summing(sums: GradientSums, power: int, weights: list) -> Receiver:
    """Adds per-example gradients, weighted by what `weights[0]` holds at that time."""

    def receive(name: str, forms: list[Form], start: int) -> None:
        w = weights[0]
        if power == 2 and name not in sums.totals and len(forms) == 1 and getattr(forms[0], "shared", False):
            sums.powers[name] += _squares_over_tokens(forms[0], w)
            return
        for first, gradients in parts(forms, _CHUNK):
            add(name, gradients, w[start + first :][: len(gradients)] if isinstance(w, torch.Tensor) else w)

    def add(name: str, gradients: torch.Tensor, w: torch.Tensor | float) -> None:
        if len(gradients) == 1 and power == 2 and name not in sums.totals and isinstance(w, float):
            sums.powers[name].addcmul_(gradients[0], gradients[0], value=w)  # nothing of its size is made
            return
        if isinstance(w, torch.Tensor):
            w = w.to(gradients.dtype).view(-1, *[1] * (gradients.dim() - 1))
        one = isinstance(w, float) and w == 1
        if name in sums.totals:
            sums.totals[name] += gradients.sum(0) if one else (gradients * w).sum(0)
        gradients = gradients.square() if power == 2 else gradients.abs()
        sums.powers[name] += gradients.sum(0) if one else gradients.mul_(w).sum(0)

    return receive


def _squares_over_tokens(form: Outer, weights: torch.Tensor | float) -> torch.Tensor:
    """`sum_n w_n gradient_n^2` where all examples have the same inputs `x`: no gradient of an example is made.

    `sum_ts (sum_n w_n g_nt g_ns) x_t x_s`, one product over pairs of tokens.
    """
    x, g = form.inputs[0], form.grads
    weighed = g * weights.to(g.dtype)[:, None, None] if isinstance(weights, torch.Tensor) else g * weights
    pairs = (weighed[:, :, None] * g[:, None]).sum(0).flatten(0, 1)  # [tokens^2, out]
    squares = (pairs.mT @ (x[:, None] * x[None]).flatten(0, 1)).clamp_min_(0)  # below zero by rounding only
    return squares.mT if form.transposed else squares


def _add_looped(model, batch, rows, names, labels, power, problem_type, loss, sums: GradientSums) -> None:
    """The plain way: a backward pass per example."""
    own = dict(model.named_parameters())
    for n in range(rows):
        one = {k: v[n : n + 1] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in batch.items()}
        for weight, gradients in plain_gradients(model, one, names, labels, power, problem_type, loss):
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    continue
                gradient = gradient.to(sums.powers[name].dtype)
                sums.powers[name] += weight * (gradient.square() if power == 2 else gradient.abs())
                if name in sums.totals:
                    sums.totals[name] += weight * gradient
    for name in names:
        own[name].requires_grad_(False)


def plain_gradients(model, one, names, labels, power, problem_type, loss) -> Iterator[tuple]:
    """Weight and autograd's own gradients for each draw of labels, of one batch taken as a whole."""
    own = dict(model.named_parameters())
    parameters = [own[name].requires_grad_(True) for name in names]
    with torch.enable_grad():
        if isinstance(loss, WholeLoss):
            pairs = [(1.0, loss.compute(model, one))]
        else:
            pairs = list(draws(model(**_inputs(one, loss)), one, labels, power, problem_type, loss))
        for i, (weight, values) in enumerate(pairs):
            last = i + 1 == len(pairs)
            found: tuple = (None,) * len(parameters)
            if values.requires_grad:  # else the loss depends on none of them
                found = torch.autograd.grad(values.sum(), parameters, retain_graph=not last, allow_unused=True)
            yield (weight.sum() if isinstance(weight, torch.Tensor) else weight), found


def _runs_with_skipping(model: nn.Module, inputs: dict) -> bool:
    """Whether the model runs with `skipping_zero_rows` where autograd watches every layer."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)  # the embeddings', in most models
    if weight is None:
        return True
    trained = weight.requires_grad
    try:
        weight.requires_grad_(True)
        with torch.enable_grad(), skipping_zero_rows(model):
            model(**inputs)
    except RuntimeError:
        return False
    finally:
        weight.requires_grad_(trained)
    return True


@dataclass
class Trial:
    """The gradients of one example in two ways.

    Attributes:
        found: the example's gradients by hooks, out of a batch that holds another example too.
        expected: autograd's gradients of the example alone.
        unfit: parameters of modules that have no gradients of single examples by hooks.
        unseen: parameters of modules that these examples do not reach.
        skips: whether the model runs with linear layers that skip positions without gradient. One that changes such a
            layer's output in place does not.
    """

    found: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    unfit: set[str]
    unseen: set[str]
    skips: bool

    @classmethod
    def of(cls, model, batch, rows, names, labels, power, problem_type, loss) -> "Trial":
        """Of the first example of `batch`, for the first draw of labels."""
        own = dict(model.named_parameters())
        found = {name: torch.zeros_like(_zeros(own[name])) for name in names}

        def add(name: str, forms: list[Form], start: int) -> None:
            if start == 0:
                found[name] += dense([form[:1] for form in forms])[0]

        with Capture(find_sites(model, names), add, trial=True) as capture, torch.enable_grad():
            capture.begin(rows)
            _, values = next(draws(model(**_inputs(batch, loss)), batch, labels, power, problem_type, loss))
            if values.requires_grad:
                values.sum().backward()
            unseen = {name for site in capture.sites if not site.calls for name in site.names.values()}
            unfit = {name for site in capture.sites if site.unfit for name in site.names.values()}
        _, expected = next(plain_gradients(model, _first(batch, 1), names, labels, power, problem_type, loss))
        for name in names:
            own[name].requires_grad_(False)
        alone = {
            name: torch.zeros_like(found[name]) if gradient is None else gradient
            for name, gradient in zip(names, expected, strict=True)
        }
        return cls(found, alone, unfit, unseen - unfit, _runs_with_skipping(model, _inputs(batch, loss)))

    def finite(self) -> bool:
        """Whether no gradient holds NaN or infinity."""
        return all(isfinite(largest(value)) for way in (self.found, self.expected) for value in way.values())

    def missed(self) -> list[str]:
        """Parameters whose gradients by hooks are not those of the example; the gradients are used up.

        A weight may be used where no hook sees it, and a module may mix the examples' rows. Those parameters take one
        backward pass per example.
        """
        # Rounding of a sum in another order; a use that was missed is off by the order of the gradient itself. What is
        # zero but for rounding (the gradient of an attention's key bias) is measured by the largest of all.
        floor = max(largest(gradient) for gradient in self.expected.values())
        missed = []
        for name, gradient in self.expected.items():
            scale = max(largest(gradient), largest(self.found[name]), 1e-5 * floor)
            difference = largest(self.found[name].sub_(gradient.to(self.found[name].dtype)))
            if name in self.unfit or (scale and not difference <= _tolerance(gradient.dtype) * scale):
                missed.append(name)
        if missed:
            logger.warning(
                "No rule for gradients per example of %d parameters (%s, ...): one backward pass per example for "
                "them.",
                len(missed),
                missed[0],
            )
        return missed


def _sample(batch: dict) -> dict:
    """Two examples, and of long texts the first tokens: enough to see which parameters the hooks reach."""
    part = _first(batch, 2)
    mask, ids = part.get("attention_mask"), part.get("input_ids")
    if mask is None or ids is None or mask.shape != ids.shape or not mask[:, :_SAMPLE].any(1).all():
        return part
    length = ids.shape[1]
    return {
        k: v[:, :_SAMPLE] if isinstance(v, torch.Tensor) and v.dim() == 2 and v.shape[1] == length else v
        for k, v in part.items()
    }


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-8, torch.float32: 1e-2}.get(dtype, 0.2)


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _reduce(sums: GradientSums, device: torch.device) -> None:
    """The sums over all processes, on each."""
    if not _distributed():
        return
    for values in (sums.powers, sums.totals):
        for tensor in values.values():
            torch.distributed.all_reduce(tensor)
    count = torch.tensor(sums.examples, device=device)
    torch.distributed.all_reduce(count)
    sums.examples = int(count)
