"""The diagonal of the Fisher information: sums over examples of squared or absolute gradients."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import find_labels

from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.losses import (
    LABELS,
    TRUE,
    FisherScalars,
    Loss,
    ModelLoss,
    base_model,
    is_classifier,
    own_loss,
    problem_type_of,
    refuse_expectation,
)
from hf_ft_ext.label_tokens import label_tokens, predicts_next_tokens
from hf_ft_ext.per_example.gradients import ExampleGradients
from hf_ft_ext.per_example.state import batch_size, evaluating, refuse_single_batch, without_cache
from hf_ft_ext.per_example.types import (
    Gradient,
    LinearGradient,
    dense_in_chunks,
    join_uses,
    share_activations,
    squares_of_shared,
)

POWERS = (1, 2)
_CHUNK = 2**20  # values of per-example gradients at a time, so that they about fit into the processor's cache


@dataclass
class GradientSums:
    """Sums over examples, per parameter.

    Attributes:
        powers: name -> `sum w |g|^power`, in the parameter's shape (see `FisherScalars` for the weights w).
        totals: name -> `sum w g`; empty unless requested.
        examples: number of examples of all processes.
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
    """Sum the squared (or absolute) gradients of each example's loss, for every entry of the parameters.

    With `power=2` this is the diagonal of the Fisher information, times the number of examples:
    `sum_n (d loss_n(y_n) / d theta)^2` with the true labels y_n (the empirical one), and with expected labels
    `sum_n E_y (d loss_n(y) / d theta)^2`, where y follows the model's own distribution p(y | x_n). The loss is
    `-log p(y | x_n)` up to a constant; with several labels per row, their mean. The values equal those of one backward
    pass per example and do not depend on the batch size. Dropout is off. Each process passes its own part of the data;
    the sums are over all processes. Mode, gradients and `requires_grad` of the model are restored.

    Args:
        model: a sequence classifier, a language model or another transformers model that returns a loss (or any
            model, with `loss`), with or without peft adapters.
        dataloader: batches of model inputs, with `labels`.
        parameters: names; `None` = all that require gradients.
        labels: `true`: the empirical Fisher information. `expected`: the expectation over the model's own distribution
            of labels; for sequence classifiers.
        power: 2, or 1 for absolute values.
        loss: `loss(output, batch)` -> `[batch]`, used instead of the model's loss; or a `ModelLoss`. The model gets
            the entries of a batch that its `forward` takes, the loss gets all.
        progress: show a progress bar (first process only).

    Returns:
        Name -> tensor of the parameter's shape, in float32 or wider.

    Raises:
        InputError: missing or unsuitable labels, an unknown parameter or option, or gradients that are not finite.

    Source: Sung et al. 2021, arXiv 2111.09839, section 3, for the masks that use it.
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
    """Compute the sums of `fisher_information`, and with `totals` also the sums of the gradients themselves.

    Raises:
        InputError: as for `fisher_information`.
    """
    refuse_single_batch(dataloader, "dataloader")
    own = dict(model.named_parameters())
    names = [name for name, p in own.items() if p.requires_grad] if parameters is None else list(parameters)
    _check(model, own, names, labels, power, loss)
    sums = GradientSums({n: _zeros(own[n]) for n in names}, {n: _zeros(own[n]) for n in names if totals}, 0)
    device = next(iter(own.values())).device
    engine: ExampleGradients | None = None
    found, compared = loss, loss is not None or (labels != TRUE and is_classifier(model))
    for batch in tqdm(dataloader, desc="Fisher information", disable=not progress or _rank() > 0, leave=False):
        if not isinstance(batch, Mapping):
            raise InputError(
                f"a batch is a {type(batch).__name__}, not keyword arguments of the model; pass mappings from names "
                "to tensors"
            )
        batch = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
        _check_batch(model, batch, labels, loss)
        if not compared:
            if label_tokens(batch, predicts_next_tokens(model)) == 0:  # adds nothing
                sums.examples += batch_size(batch)
                continue
            with evaluating(model), without_cache(model):
                found, compared = own_loss(model, batch), True
        scalars = FisherScalars(labels, power, _problem_type(model, batch, labels, found), found)
        if engine is None:
            engine = ExampleGradients(
                model, scalars, {name: own[name] for name in names}, wide_trial=False, mixing="one_by_one",
                one_by_one=isinstance(scalars.loss, ModelLoss),
            )  # fmt: skip
        engine.function = scalars
        engine.stream(batch, _Accumulator(sums, scalars))
        sums.examples += batch_size(batch)
    _reduce(sums, device)
    if sums.examples == 0:
        raise InputError("the data loader gave no batch; pass at least one example")
    if bad := [name for name, value in sums.powers.items() if not torch.isfinite(value).all()]:
        raise InputError(
            f"the gradients of {bad[0]} are not finite; check the data and the model's precision (float16 overflows: "
            "load the model in float32 or bfloat16)"
        )
    return sums


class _Accumulator:
    """A receiver that adds per-example gradients to the sums, with the weights of the scalars."""

    def __init__(self, sums: GradientSums, scalars: FisherScalars):
        self.sums, self.scalars = sums, scalars

    def __call__(self, name: str, gradients: list[Gradient], scalar: int, first: int) -> None:
        powers, totals = self.sums.powers[name], self.sums.totals.get(name)
        gradients = [share_activations(gradient) for gradient in join_uses(gradients)]
        weights = self.scalars.weights  # of the current batch
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
                # w g^2, without a temporary tensor
                powers.addcmul_(values[0], values[0], value=1.0 if w is None else w.item())
            else:
                powers += _weighted_sum(values.square() if squares else values.abs(), w)


def _weighted_sum(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """`sum_n w_n values_n`."""
    if weights is None:
        return values.sum(0)
    return torch.tensordot(weights.to(values.dtype), values, 1)


def _check_batch(model: nn.Module, batch: dict, labels: str, loss: Loss | None) -> None:
    """Raise an `InputError` for unsuitable input ids or missing labels."""
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.is_floating_point():
        raise InputError(
            f"input_ids have dtype {str(ids.dtype).removeprefix('torch.')}, but token ids are integers: pass "
            "input_ids.long(), or inputs_embeds for embeddings"
        )
    known = ["labels"] if is_classifier(model) else ["labels", *find_labels(type(base_model(model)))]
    if loss is None and labels == TRUE and all(batch.get(name) is None for name in known):
        raise InputError(
            f"a batch has no labels (it has {', '.join(batch)}), but labels='true' needs them; add them, or pass "
            "labels='expected' for the expectation over the model's own distribution"
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
        raise InputError("no parameter requires gradients; pass the names of parameters")
    if not_float := [name for name in names if not own[name].is_floating_point()]:
        raise InputError(
            f"{not_float[0]} is quantized ({own[not_float[0]].dtype}) and has no gradient; the Fisher information of "
            "a quantized model is that of its adapters: pass their names"
        )
    inner = base_model(model)
    if loss is None and not is_classifier(model) and not hasattr(inner, "config"):
        raise InputError(
            f"{type(inner).__name__} is not a transformers model, so its loss per example is not known; pass loss, a "
            "function of the model's output and the batch that returns one value per example"
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
    """Sum over all processes, on every process."""
    if not _distributed():
        return
    for values in (sums.powers, sums.totals):
        for tensor in values.values():
            torch.distributed.all_reduce(tensor)
    count = torch.tensor(sums.examples, device=device)
    torch.distributed.all_reduce(count)
    sums.examples = int(count)
