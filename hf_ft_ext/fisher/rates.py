"""Learning rates by candidate."""

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.adapters.layers import plain_name, split_layer
from hf_ft_ext.fisher.arguments import HEAD
from hf_ft_ext.fisher.plan import AdapterPlan


def candidate_of_parameters(model: nn.Module, plan: AdapterPlan) -> dict[int, str]:
    """Map the `id` of each adapter parameter to its candidate."""
    found: dict[int, str] = {}
    classes = {
        name: PEFT_TYPE_TO_TUNER_MAPPING[settings["peft_type"]].tuner_layer_cls
        for name, settings in plan.candidates.items()
    }
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner = split_layer(plain_name(name.removeprefix("base_model.model.")) + ".")
            candidate = None if inner is None else plan.choice.get(inner.layer)
            if candidate is not None and isinstance(module, classes[candidate]):
                own = (p for n, p in module.named_parameters() if not n.startswith("base_layer."))
                found.update((id(p), candidate) for p in own)
    return found


def split_by_rate(
    optimizer: torch.optim.Optimizer, model: nn.Module, plan: AdapterPlan | None, rates: dict[str, float]
) -> None:
    """Split the optimizer's groups by candidate and head, and set their rates; call it before the first step.

    Candidates that are not in `rates` keep the rate of their group.
    """
    of = {} if plan is None else candidate_of_parameters(model, plan)
    groups = []
    for group in optimizer.param_groups:
        parts: dict[str, list] = {}
        for parameter in group["params"]:
            parts.setdefault(of.get(id(parameter), HEAD), []).append(parameter)
        for name, parameters in parts.items():
            groups.append({**group, "params": parameters, "lr": rates.get(name, group["lr"])})
    optimizer.param_groups[:] = groups
