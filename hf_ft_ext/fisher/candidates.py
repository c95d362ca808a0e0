"""Candidate adapters for a layer, and their parameters in each layer of a model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.bottleneck.config import BottleneckConfig
from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig
from hf_ft_ext.adapters.layer_prefix.layer import SHARED, PrefixLayer
from hf_ft_ext.adapters.layers import plain_name, split_layer
from hf_ft_ext.adapters.mixture.config import LayerMixtureConfig, limited_to_layers, settings_of
from hf_ft_ext.errors import InputError, did_you_mean, first_line
from hf_ft_ext.models import seeded_init
from hf_ft_ext.per_example.state import evaluating
from hf_ft_ext.structure.find import find_structure
from hf_ft_ext.structure.rows import trial_rows

logger = logging.getLogger(__name__)

PREFIX, BOTTLENECK, LORA = ("prefix", "bottleneck", "lora")
DEFAULTS = (PREFIX, BOTTLENECK, LORA)
_INIT_FIELDS = ("init_lora_weights", "init_weights")  # fields of peft's configurations
_INITS_KEEPING_BASE = ("gaussian", "orthogonal", "eva", "zero")  # these do not change the base weights


def default_candidates() -> dict[str, PeftConfig]:
    """The thesis's candidates: a prefix of 10 with a projection of 512, a bottleneck of 48, LoRA of rank 8."""
    return {
        PREFIX: LayerPrefixConfig(prefix_length=10, projection_size=512),
        BOTTLENECK: BottleneckConfig(bottleneck_size=48),
        LORA: LoraConfig(r=8, lora_alpha=16),
    }


def make_candidates(names: list[str] | None, settings: dict[str, Any] | None = None) -> dict[str, PeftConfig]:
    """Make candidates by name.

    Args:
        names: names of default candidates, of `settings`, or of peft's methods; `None` = the defaults and `settings`.
        settings: name -> settings. A `peft_type` is needed unless the name is a default candidate or a method of peft.
            Settings of a default candidate override its own.

    Raises:
        InputError: an unknown name or setting, or a type that cannot be limited to layers.
    """
    own = {name: settings_of(config) for name, config in default_candidates().items()}
    settings = settings or {}
    for name, values in settings.items():
        if not isinstance(values, dict):
            raise InputError(
                f'the settings of candidate {name!r} must be a mapping, such as {{"r": 8}}, got {values!r}'
            )
        same = values.get("peft_type", own.get(name, {}).get("peft_type")) == own.get(name, {}).get("peft_type")
        own[name] = {**own.get(name, {}), **values} if same else values
    names = list(dict.fromkeys([*DEFAULTS, *settings])) if names is None else names
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"candidate {twice[0]!r} is named twice; use each name once")
    known = {str(getattr(t, "value", t)).lower() for t in PEFT_TYPE_TO_TUNER_MAPPING}
    for name in names:
        if name not in own and name.lower() not in known:
            raise InputError(
                f"candidate {name!r} is unknown{did_you_mean(name, [*own, *sorted(known)])}; choose from "
                f"{', '.join(own)}, another method of peft, or give it settings with a peft_type in "
                "--fisher_candidate_settings"
            )
    return {name: limited_to_layers(name, own.get(name, {})) for name in names}


@dataclass(frozen=True)
class CandidateModule:
    """One candidate in one layer.

    Attributes:
        parameters: names, in the probing model, of parameters that belong only to this layer.
        shared: names of parameters that the candidate's modules in all layers share.
        added: number of parameters that it adds to the model at inference.
    """

    candidate: str
    layer: int
    parameters: tuple[str, ...]
    shared: tuple[str, ...]
    added: int


def layers_of(model: nn.Module) -> list[int]:
    """Return the indices of the model's layers, found by structure.

    Layers with the same index in several stacks, such as an encoder and a decoder, count as one.

    Raises:
        InputError: the model has no layers.
    """
    found = sorted({layer.number for layer in find_structure(model).layers})
    if not found:
        raise InputError(
            f"{type(model).__name__} has no repeated layers, so there is nothing to choose adapters for; use another "
            "method, such as full or linearhead"
        )
    return found


def fitting_candidates(
    model: nn.Module, candidates: dict[str, PeftConfig], layers: list[int], seed: int
) -> dict[str, PeftConfig]:
    """Return the candidates with which the model runs when they are in every layer; the others are logged.

    Raises:
        InputError: some do not fit and fewer than two remain, or one fits with default settings but not with its own.
    """
    reasons: dict[str, str] = {}
    defaults = {config.peft_type: config for config in default_candidates().values()}
    for name, config in candidates.items():
        reason = _misfit_reason(model, name, config, layers, seed)
        if reason is None:
            continue
        default = defaults.get(config.peft_type)
        changed = default is not None and settings_of(default) != settings_of(config)
        if changed and _misfit_reason(model, name, default, layers, seed) is None:
            raise InputError(f"candidate {name!r} cannot be used with these settings: {reason}")
        reasons[name] = reason
    for name, reason in reasons.items():
        logger.warning("Candidate %r does not fit %s and is left out: %s.", name, type(model).__name__, reason)
    left = {name: config for name, config in candidates.items() if name not in reasons}
    if reasons and len(left) < min(2, len(candidates)):
        shown = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise InputError(
            f"too few of the candidates fit {type(model).__name__} ({shown}); choose others with --fisher_candidates, "
            "or change their settings with --fisher_candidate_settings"
        )
    return left


def compatible_groups(candidates: dict[str, PeftConfig]) -> list[dict[str, PeftConfig]]:
    """Group candidates that can be in one model together: those of different peft types."""
    result: list[dict[str, PeftConfig]] = []
    for name, config in candidates.items():
        free = (group for group in result if all(c.peft_type != config.peft_type for c in group.values()))
        group = next(free, None)
        if group is None:
            result.append(group := {})
        group[name] = config
    return result


@contextmanager
def probing(model: nn.Module, candidates: dict[str, PeftConfig], layers: list[int], seed: int) -> Iterator[PeftModel]:
    """Put every candidate into every layer of `model`, initialized from `seed`; restore the model afterwards."""
    trains = [(p, p.requires_grad) for p in model.parameters()]
    before = [(p, p.detach().clone()) for p in model.parameters()] if _may_change_base_weights(candidates) else []
    kinds = {name: settings_of(config) for name, config in candidates.items()}
    config = LayerMixtureConfig(kinds=kinds, layers={str(layer): list(kinds) for layer in layers})
    try:
        with as_input_error(list(candidates)), seeded_init(seed):
            probe = get_peft_model(model, config)
        yield probe
    finally:
        _remove_adapters(model)
        for parameter, values in before:
            parameter.data = values
        for parameter, trained in trains:
            parameter.requires_grad_(trained)


@contextmanager
def as_input_error(names: list[str]) -> Iterator[None]:
    """Turn errors of peft while the candidates `names` are put into a model into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the candidates {', '.join(names)} cannot be put into the model "
            f"({first_line(error)}); check --fisher_candidate_settings, or "
            "the settings in the plan"
        ) from error


def modules_of(probe: nn.Module, candidates: dict[str, PeftConfig]) -> list[CandidateModule]:
    """Return each candidate's module in each layer of a `probing` model."""
    by_class = {PEFT_TYPE_TO_TUNER_MAPPING[c.peft_type].tuner_layer_cls: name for name, c in candidates.items()}
    found: dict[tuple[int, str], list[str]] = {}
    added: dict[tuple[int, str], int] = {}
    for name, module in probe.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        candidate = next((own for kind, own in by_class.items() if isinstance(module, kind)), None)
        inner = split_layer(plain_name(name.removeprefix("base_model.model.")) + ".")
        if candidate is None or inner is None:
            continue
        others = ("base_layer.", *(f"{part}." for part in SHARED))  # the wrapped module, and parts all layers share
        own = [(n, p) for n, p in module.named_parameters() if not n.startswith(others) and p.requires_grad]
        key = (inner.layer, candidate)
        found.setdefault(key, []).extend(f"{name}.{n}" for n, _ in own)
        size = sum(p.numel() for _, p in own)
        if isinstance(module, PrefixLayer):
            size = candidates[candidate].prefix_length * 2 * module.heads * module.size
        added[key] = added.get(key, 0) + size
    shared = tuple(n for n, _ in probe.named_parameters() if any(f".{part}." in n for part in SHARED))
    return [
        CandidateModule(
            candidate, layer, tuple(names),
            shared if candidates[candidate].peft_type == AdapterType.LAYER_PREFIX else (), added[layer, candidate],
        )
        for (layer, candidate), names in sorted(found.items())
    ]  # fmt: skip


def _misfit_reason(model: nn.Module, name: str, config: PeftConfig, layers: list[int], seed: int) -> str | None:
    """Return why a candidate cannot be put into every layer of `model`, or `None` if it can."""
    try:
        with probing(model, {name: limited_to_layers(name, config)}, layers, seed) as probe:
            _try_rows(probe)
    except InputError as error:
        return str(error.__cause__) if isinstance(error.__cause__, InputError) else str(error)
    return None


def _try_rows(probe: PeftModel) -> None:
    base, first = probe.get_base_model(), None
    with torch.no_grad(), evaluating(base):
        for batch in trial_rows(base):
            try:
                probe(**batch)
                return
            except Exception as error:  # models raise many types if an adapter does not fit
                first = first or error
    if isinstance(first, InputError):
        raise first
    reason = "no trial rows fit its inputs" if first is None else first_line(first)
    raise InputError(f"the model does not run with it ({reason})") from first


def _may_change_base_weights(candidates: dict[str, PeftConfig]) -> bool:
    """Whether a candidate's initialization may change the base weights (PiSSA, OLoRA, CorDA)."""
    starts = [getattr(config, name, True) for config in candidates.values() for name in _INIT_FIELDS]
    return any(isinstance(start, str) and start not in _INITS_KEEPING_BASE for start in starts)


def _remove_adapters(model: nn.Module) -> None:
    """Remove every adapter from `model`, even if adding them failed half way."""
    while found := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        owner, _, own = found[0].rpartition(".")
        setattr(model.get_submodule(owner), own, model.get_submodule(found[0]).base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
