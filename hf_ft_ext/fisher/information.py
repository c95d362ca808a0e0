"""The diagonal of the Fisher information: squared or absolute gradients per example, summed."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.losses import (
    LABELS,
    TRUE,
    FisherScalars,
    Loss,
    WholeLoss,
    base_model,
    is_classifier,
    own_loss,
    problem_type_of,
    refuse_expectation,
)
from hf_ft_ext.per_example.gradients import ExampleGradients
from hf_ft_ext.per_example.state import batch_size, evaluating, without_cache
from hf_ft_ext.per_example.types import (
    Gradient,
    LinearGradient,
    dense_in_chunks,
    join_uses,
    share_activations,
    squares_of_shared,
)

POWERS = (1, 2)
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
        model: a sequence classifier, a language model or another model of transformers that gives a loss (or any
            model, with `loss`), plain or with peft adapters.
        dataloader: batches of model inputs, `labels` among them.
        parameters: names; `None` = all that require gradients.
        labels: `true`: the empirical Fisher information. `expected`: over the model's own distribution of labels; for
            sequence classifiers.
        power: 2, or 1 for absolute values.
        loss: `loss(output, batch)` -> `[batch]`, in place of the model's; or a `WholeLoss`.
        progress: show a bar (first process only).

    Returns:
        Name -> tensor of the parameter's shape, in single precision at least.

    Raises:
        InputError: labels missing or of a wrong kind, an unknown parameter or option, or gradients that are not
            finite.
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
    _check(model, own, names, labels, power, loss)
    sums = GradientSums({n: _zeros(own[n]) for n in names}, {n: _zeros(own[n]) for n in names if totals}, 0)
    device = next(iter(own.values())).device
    engine: ExampleGradients | None = None
    found = loss  # of a language model, once its first batch is there
    for batch in tqdm(dataloader, desc="Fisher information", disable=not progress or _rank() > 0, leave=False):
        batch = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
        _check_batch(batch, labels, loss)
        if found is None and not is_classifier(model):
            with evaluating(model), without_cache(model):
                found = own_loss(model, batch)
        scalars = FisherScalars(labels, power, _problem_type(model, batch, labels, found), found)
        if engine is None:
            engine = ExampleGradients(
                model, scalars, {name: own[name] for name in names}, wide_trial=False, mixing="one_by_one",
                one_by_one=isinstance(scalars.loss, WholeLoss),
            )  # fmt: skip
        engine.function = scalars
        engine.stream(batch, _Summing(sums, scalars))
        sums.examples += batch_size(batch)
    _reduce(sums, device)
    if sums.examples == 0:
        raise InputError("the data loader gave no batch; a Fisher information needs examples")
    if bad := [name for name, value in sums.powers.items() if not torch.isfinite(value).all()]:
        raise InputError(
            f"the gradients of {bad[0]} are not finite; check the data and the model's precision (float16 overflows: "
            "load the model in float32 or bfloat16)"
        )
    return sums


class _Summing:
    """Adds an engine's gradients to sums, each weighted as the scalars say."""

    def __init__(self, sums: GradientSums, scalars: FisherScalars):
        self.sums, self.scalars = sums, scalars

    def __call__(self, name: str, gradients: list[Gradient], scalar: int, first: int) -> None:
        powers, totals = self.sums.powers[name], self.sums.totals.get(name)
        gradients = [share_activations(gradient) for gradient in join_uses(gradients)]
        weights = self.scalars.weights  # of the examples that run now
        weights = None if weights is None else weights[:, scalar].to(powers.dtype)
        squares = self.scalars.power == 2
        only = gradients[0]
        if squares and totals is None and len(gradients) == 1 and isinstance(only, LinearGradient) and only.shared:
            powers += squares_of_shared(only, 1.0 if weights is None else weights)
            return
        for start, values in dense_in_chunks(gradients, _CHUNK):
            w = None if weights is None else weights[start : start + len(values)]
            if totals is not None:
                totals += _weighted_sum(values, w)
            if len(values) == 1 and squares:
                # nothing of its size is made
                powers.addcmul_(values[0], values[0], value=1.0 if w is None else w.item())
            else:
                powers += _weighted_sum(values.square() if squares else values.abs(), w)


def _weighted_sum(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """`sum_n w_n values_n`."""
    if weights is None:
        return values.sum(0)
    return torch.tensordot(weights.to(values.dtype), values, 1)


def _check_batch(batch: dict, labels: str, loss: Loss | None) -> None:
    """Raise an `InputError` for ids or labels that no model takes."""
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.is_floating_point():
        raise InputError(
            f"input_ids are {str(ids.dtype).removeprefix('torch.')} numbers; ids of tokens are integers: pass "
            "input_ids.long(), or inputs_embeds for embeddings"
        )
    if loss is None and labels == TRUE and batch.get("labels") is None:
        raise InputError(
            f"a batch has no labels (it has {', '.join(batch)}), and labels='true' needs them; add them, or take the "
            "expectation over the model's own: labels='expected'"
        )


def _problem_type(model: nn.Module, batch: dict, labels: str, loss: Loss | None) -> str | None:
    if loss is not None:
        return None
    return problem_type_of(model, batch["labels"] if labels == TRUE else None)


def _check(
    model: nn.Module, own: dict[str, nn.Parameter], names: list[str], labels: str, power: int, loss: Loss | None
) -> None:
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
    inner = base_model(model)
    if loss is None and not is_classifier(model) and not hasattr(inner, "config"):
        raise InputError(
            f"{type(inner).__name__} is no sequence classifier or other model of transformers, so its loss per "
            "example is not known; pass loss, a function of the model's output and the batch that gives one "
            "number per example"
        )
    problem_type = problem_type_of(model, None) if loss is None and is_classifier(model) else None
    refuse_expectation(labels, power, problem_type, getattr(getattr(inner, "config", None), "num_labels", 1))


def _zeros(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


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
