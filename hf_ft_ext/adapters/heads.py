"""Which modules train in full beside an adapter."""

from transformers import PreTrainedModel


def trained_in_full(model: PreTrainedModel) -> list[str]:
    """Dotted names of the modules that an adapter cannot do without: the head, and whatever came untrained."""
    prefix = model.base_model_prefix
    names = [
        name for name, module in model.named_children() if name != prefix and any(True for _ in module.parameters())
    ]
    for parameter in sorted(getattr(model, "fresh_parameters", ())):
        owner = parameter.rpartition(".")[0]
        if owner and not any(owner == name or owner.startswith(f"{name}.") for name in names):
            names.append(owner)
    return names
