"""One learning rate per kind of adapter."""

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.adapters.layers import plain_name, split_layer
from hf_ft_ext.fisher.arguments import HEAD
from hf_ft_ext.fisher.plan import AdapterPlan


def candidate_of_parameters(model: nn.Module, plan: AdapterPlan) -> dict[int, str]:
    """`id` of each adapter parameter -> the candidate that it belongs to."""
    found: dict[int, str] = {}
    classes = {
        name: PEFT_TYPE_TO_TUNER_MAPPING[settings["peft_type"]].tuner_layer_cls
        for name, settings in plan.candidates.items()
    }
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            place = split_layer(plain_name(name.removeprefix("base_model.model.")) + ".")
            candidate = None if place is None else plan.choice.get(place[0])
            if candidate is not None and isinstance(module, classes[candidate]):
                own = (p for n, p in module.named_parameters() if not n.startswith("base_layer."))
                found.update((id(p), candidate) for p in own)
    return found


def split_by_rate(
    optimizer: torch.optim.Optimizer, model: nn.Module, plan: AdapterPlan | None, rates: dict[str, float]
) -> None:
    """Give the parameters of each candidate in `rates`, and of the head, a group with that rate, before any step."""
    of = {} if plan is None else candidate_of_parameters(model, plan)
    groups = []
    for group in optimizer.param_groups:
        parts: dict[str, list] = {}
        for parameter in group["params"]:
            parts.setdefault(of.get(id(parameter), HEAD), []).append(parameter)
        for name, parameters in parts.items():
            groups.append({**group, "params": parameters, "lr": rates.get(name, group["lr"])})
    optimizer.param_groups[:] = groups
