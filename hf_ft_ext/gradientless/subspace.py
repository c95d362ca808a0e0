"""Searching a small subspace: the parameters of a peft method, and the head."""

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, TaskType, get_peft_model
from transformers import PreTrainedModel

from hf_ft_ext.errors import InputError
from hf_ft_ext.models import seeded_init

_DEFAULT_TARGETS = {"distilbert": ["q_lin", "v_lin"]}  # query and value, which peft's table lacks


def add_subspace(model: PreTrainedModel, kind: str, settings: dict | None, seed: int) -> PeftModel:
    """Wrap a sequence classifier with a peft method, drawn from `seed`.

    Saved models are standard adapters, the head included.

    Args:
        kind: the method's name in peft, such as `lora`, `ia3`, `vera`, `ln_tuning`.
        settings: arguments of its configuration.

    Raises:
        InputError: no such method, or one that these settings or this model do not fit.
    """
    known = {name.value.lower(): name for name in PeftType if name in PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind.lower() not in known:
        raise InputError(f"search_peft={kind!r} is no method of peft; choose from: {', '.join(sorted(known))}")
    if isinstance(model, PeftModel):
        raise InputError("the model carries PEFT adapters already; leave search_peft out, or pass the base model")
    settings = dict(settings or {})
    prefix = model.base_model_prefix
    heads = [n for n, child in model.named_children() if n != prefix and any(True for _ in child.parameters())]
    if getattr(getattr(model, prefix, None), "pooler", None) is not None:
        heads.append("pooler")
    settings.setdefault("modules_to_save", heads)
    default = _DEFAULT_TARGETS.get(model.config.model_type)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind.lower()]]
    if default and kind.lower() in ("lora", "vera") and "target_modules" not in settings:
        settings["target_modules"] = default
    try:
        config = config_class(task_type=TaskType.SEQ_CLS, **settings)
        with seeded_init(seed):
            return get_peft_model(model, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise InputError(f"search_peft={kind} with search_peft_config={settings} does not work: {reason}") from error
