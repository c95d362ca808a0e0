"""Selection of an adapter for each layer."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.adapters.mixture.config import limited_to_layers, settings_of
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.candidates import (
    CandidateModule,
    compatible_groups,
    default_candidates,
    fitting_candidates,
    layers_of,
    modules_of,
    probing,
)
from hf_ft_ext.fisher.criteria import DEFAULT, NEEDS_TOTALS, ModuleSums, find_criterion
from hf_ft_ext.fisher.information import gradient_sums
from hf_ft_ext.fisher.losses import TRUE, Loss
from hf_ft_ext.fisher.plan import AdapterPlan, model_fingerprint
from hf_ft_ext.per_example.state import refuse_single_batch

logger = logging.getLogger(__name__)


def select_adapters(
    model: nn.Module,
    data: Iterable[dict],
    candidates: dict[str, PeftConfig] | list[PeftConfig] | None = None,
    criterion: str = DEFAULT,
    budget: int | None = None,
    *,
    labels: str = TRUE,
    power: int = 2,
    loss: Loss | None = None,
    seed: int = 42,
    progress: bool = True,
) -> AdapterPlan:
    """Score every candidate in every layer by its gradients before training, and choose one per layer.

    This is FishPAL's selection (thesis, lucalila/fishpal). The default criterion, `agreement`, is this package's;
    `thesis` is the one of the thesis.

    Candidates of different peft types are in the model at the same time; the model is restored afterwards. A candidate
    that does not fit the model is dropped with a warning, as long as two remain.

    Args:
        model: a plain sequence classifier or language model, or any model with `loss`.
        data: batches of model inputs with `labels`; each process passes its own part.
        candidates: peft configurations by name, or a list of them; `None` = the three of the thesis.
        criterion: `thesis`, `mean`, `decrease` or `agreement`; see `hf_ft_ext.fisher.criteria`.
        budget: largest number of parameters that all chosen adapters together add at inference; some layers may then
            have no adapter.
        labels, power, loss, progress: as for `fisher_information`.
        seed: seed of the new adapters' initialization.

    Raises:
        InputError: bad input, a budget below the smallest module, or gradients that are all zero.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model carries PEFT adapters already; pass the base model, or merge the adapters first")
    score = find_criterion(criterion)
    if criterion in NEEDS_TOTALS and power != 2:
        raise InputError(f"criterion {criterion!r} needs squared gradients, but power={power}; leave power out")
    if criterion in NEEDS_TOTALS and labels != TRUE:
        raise InputError(
            f"criterion {criterion!r} uses the mean gradient, but labels={labels!r} makes it zero "
            "(the expected gradient of a log-likelihood is 0), so scores would be rounding noise; pass "
            "labels='true', or criterion 'mean' or 'thesis'"
        )
    candidates = _named_candidates(candidates)
    refuse_single_batch(data, "data")
    data = list(data)
    layers = layers_of(model)
    candidates = fitting_candidates(model, candidates, layers, seed)
    fingerprint = model_fingerprint(model)
    scores: dict[int, dict[str, float]] = {layer: {} for layer in layers}
    parameters: dict[int, dict[str, int]] = {layer: {} for layer in layers}
    examples = 0
    for group in compatible_groups(candidates):
        with probing(model, group, layers, seed) as probe:
            modules = modules_of(probe, group)
            wanted = list(dict.fromkeys(n for m in modules for n in (*m.parameters, *m.shared)))
            with _explain_missing_gradients(model):
                sums = gradient_sums(
                    probe, data, wanted, labels=labels, power=power, loss=loss,
                    totals=criterion in NEEDS_TOTALS, progress=progress,
                )  # fmt: skip
        examples = sums.examples
        _refuse_zero(sums.powers)
        for module in modules:
            scores[module.layer][module.candidate] = score(_sums_of(module, group[module.candidate], sums))
            parameters[module.layer][module.candidate] = module.added
    choice = choose(scores, parameters, budget)
    if not any(choice.values()):
        raise InputError(
            f"by criterion {criterion!r} no module within the budget has a score above 0 (with {examples} examples "
            "there is more noise than signal); pass more examples, or criterion 'mean'"
        )
    return AdapterPlan(
        choice=choice,
        candidates={name: settings_of(config) for name, config in candidates.items()},
        scores={layer: {name: scores[layer][name] for name in candidates} for layer in layers},
        parameters=parameters,
        criterion=criterion,
        settings={"budget": budget, "labels": labels, "power": power, "seed": seed},
        model=fingerprint,
        data={"examples": examples, "fingerprint": data_fingerprint(data)},
    )


def data_fingerprint(batches: list[dict]) -> str:
    """SHA-256 of the batches' tensors."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor):
                digest.update(f"{name} {tuple(value.shape)} {value.flatten().tolist()}".encode())
    return digest.hexdigest()


def choose(
    scores: dict[int, dict[str, float]], parameters: dict[int, dict[str, int]], budget: int | None
) -> dict[int, str | None]:
    """Choose the best candidate of each layer; with a budget, the choice with the largest sum of scores.

    With a budget it solves a knapsack problem with at most one item per layer exactly, by dynamic programming over the
    Pareto-optimal pairs of size and score.

    Raises:
        InputError: no module fits into the budget.
    """
    if budget is None:
        return {layer: max(own, key=own.__getitem__) for layer, own in scores.items()}
    _check_budget(budget, parameters)
    states: list[tuple[int, float, tuple]] = [(0, 0.0, ())]  # Pareto-optimal (size, score, choices), ascending
    for layer, own in scores.items():
        options = [(0, 0.0, None), *((parameters[layer][name], value, name) for name, value in own.items())]
        grown = [
            (size + more, total + value, (*chosen, name))
            for size, total, chosen in states
            for more, value, name in options
            if size + more <= budget
        ]
        grown.sort(key=lambda state: (state[0], -state[1]))
        # Keep a state only if its score is above that of every smaller state.
        states, best = [], -1.0
        for state in grown:
            if state[1] > best:
                states.append(state)
                best = state[1]
    return dict(zip(scores, states[-1][2], strict=True))


def random_choice(
    layers: list[int], candidates: list[str], parameters: dict[int, dict[str, int]], budget: int | None, seed: int
) -> dict[int, str | None]:
    """Choose a random candidate for each layer; with a budget, layers in random order, among those that still fit.

    Raises:
        InputError: no module fits into the budget.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(names: list[str]) -> str:
        return names[int(torch.randint(len(names), (1,), generator=generator))]

    if budget is None:
        return {layer: pick(candidates) for layer in layers}
    _check_budget(budget, parameters)
    choice: dict[int, str | None] = dict.fromkeys(layers)
    left = budget
    for i in torch.randperm(len(layers), generator=generator).tolist():
        fitting_candidates = [name for name in candidates if parameters[layers[i]][name] <= left]
        if fitting_candidates:
            choice[layers[i]] = picked = pick(fitting_candidates)
            left -= parameters[layers[i]][picked]
    return choice


def added_parameters(
    model: nn.Module, candidates: dict[str, PeftConfig], layers: list[int], seed: int
) -> dict[int, dict[str, int]]:
    """Count the parameters that each candidate adds in each layer at inference; the model is restored afterwards."""
    found: dict[int, dict[str, int]] = {layer: {} for layer in layers}
    for group in compatible_groups(candidates):
        with probing(model, group, layers, seed) as probe:
            for module in modules_of(probe, group):
                found[module.layer][module.candidate] = module.added
    return found


@contextmanager
def _explain_missing_gradients(model: nn.Module) -> Iterator[None]:
    """Turn torch's error for a loss that does not depend on the adapters into an `InputError`."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise InputError(
            f"no gradient reaches adapters in {type(model).__name__}, whose layers compute gradients in their own "
            "backward pass and need inputs that require gradients; use another method, such as full or sparse"
        ) from error


def _named_candidates(candidates) -> dict[str, PeftConfig]:
    if candidates is None:
        return default_candidates()
    if not isinstance(candidates, dict):
        named: dict[str, PeftConfig] = {}
        for config in candidates:
            kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
            named[kind if kind not in named else f"{kind}-{len(named)}"] = config
        candidates = named
    if not candidates:
        raise InputError("no candidates to choose from; pass at least one peft configuration")
    return {name: limited_to_layers(name, config) for name, config in candidates.items()}


def _sums_of(module: CandidateModule, config: PeftConfig, sums) -> ModuleSums:
    names = (*module.parameters, *module.shared)
    return ModuleSums(
        str(getattr(config.peft_type, "value", config.peft_type)),
        {name: sums.powers[name] for name in names},
        {name: sums.totals[name] for name in names if name in sums.totals},
        sums.examples,
    )


def _refuse_zero(powers: dict[str, torch.Tensor]) -> None:
    if not any(value.any() for value in powers.values()):
        raise InputError(
            "every gradient is exactly zero, so no adapter can be chosen: the loss does not depend on the layers "
            "(a classifier whose weights are all zero), the model is already certain of every label, or its layers "
            "compute gradients in their own backward pass, as Reformer's do; check the classifier's weights and the "
            "labels, or use another method"
        )


def _check_budget(budget: int, parameters: dict[int, dict[str, int]]) -> None:
    """Raise an `InputError` if no module of any layer fits into the budget."""
    smallest = min(size for own in parameters.values() for size in own.values())
    if budget < smallest:
        raise InputError(
            f"budget={budget} parameters, but the smallest module of any layer has {smallest}; raise it, or add "
            "smaller candidates"
        )
