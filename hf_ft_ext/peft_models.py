"""Wrapping a classifier with a method of peft: what trains in full, and what peft cannot find out by itself."""

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import encoder_path, evaluating
from hf_ft_ext.models import seeded_init
from hf_ft_ext.prompts.model import architecture, is_prompt_model
from hf_ft_ext.training.precision import train_in_float32

# Query and value, as in peft's table, which lacks it.
_DEFAULT_TARGETS = {"distilbert": ["q_lin", "v_lin"]}
_PREFIX = "prefix_tuning"
_SAVED_BY_PEFT = ("classifier", "score")  # whatever `modules_to_save` says
_REAL_ACTIVATIONS = "init_from_activations"  # an argument of ours, not of peft's configuration


_TASKS = (
    ("ForSequenceClassification", TaskType.SEQ_CLS),
    ("ForCausalLM", TaskType.CAUSAL_LM),
    ("LMHeadModel", TaskType.CAUSAL_LM),
    ("ForConditionalGeneration", TaskType.SEQ_2_SEQ_LM),
    ("ForTokenClassification", TaskType.TOKEN_CLS),
    ("ForQuestionAnswering", TaskType.QUESTION_ANS),
)


def task_type_of(model: nn.Module) -> TaskType | None:
    """peft's task type of a transformers model, by the end of its class's name; `None` for others.

    A class that the user derived from one of transformers counts as that one.
    """
    for kind in type(model).__mro__:
        for ending, task in _TASKS:
            if kind.__name__.endswith(ending):
                return task
    return None


def lora_targets(model: nn.Module) -> list[str] | None:
    """The layers that get a LoRA adapter by default; `None` leaves it to peft's own table."""
    kind = architecture(model)
    if kind in _DEFAULT_TARGETS:
        return _DEFAULT_TARGETS[kind]
    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind) if is_prompt_model(model) else None


def trained_in_full(model: PreTrainedModel) -> list[str]:
    """Dotted names of the modules that an adapter cannot do without: the head, and whatever came untrained.

    A prompt model's head is pretrained: only label words' rows that linear probing has written count.
    """
    prefix = model.base_model_prefix
    names = [
        name for name, module in model.named_children() if name != prefix and any(True for _ in module.parameters())
    ]
    for parameter in sorted(getattr(model, "fresh_parameters", ())):
        owner = parameter.rpartition(".")[0]
        if owner and not any(owner == name or owner.startswith(f"{name}.") for name in names):
            names.append(owner)
    return names


def _left_out(model: PreTrainedModel, saved: list[str]) -> list[str]:
    """Modules whose weights came untrained and are not part of a module in `saved`."""
    fresh = getattr(model, "fresh_parameters", ())
    holders = [name for name in trained_in_full(model) if any(p == name or p.startswith(f"{name}.") for p in fresh)]
    return [name for name in holders if not any(f".{part}." in f".{name}." for part in saved)]


def wrap_with_peft(
    model: PreTrainedModel, kind: str, settings: dict | None, seed: int, option: str = "peft"
) -> PeftModel:
    """Wrap a sequence classifier with a peft method, drawn from `seed`; the head trains in full.

    Saved models are standard adapters, the head included. With `modules_to_save` of your own, what came untrained and
    is not among them is saved too, but does not train: nobody could load it otherwise.

    Args:
        kind: the method's name in peft, such as `lora`, `ia3`, `vera`, `ln_tuning`, `prefix_tuning`.
        settings: arguments of its configuration. For `prefix_tuning` also `init_from_activations: true`: the prefix
            starts as the keys and values that the model gives to as many random tokens, as in MeZO.
        option: name of the argument that `kind` came from, for messages.

    Raises:
        InputError: no such method, or one that these settings or this model do not fit.
    """
    known = {name.value.lower(): name for name in PeftType if name in PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind.lower() not in known:
        raise InputError(f"{option}={kind!r} is no method of peft; choose from: {', '.join(sorted(known))}")
    if isinstance(model, PeftModel):
        raise InputError(f"the model carries PEFT adapters already; leave {option} out, or pass the base model")
    given, settings = settings, dict(settings or {})
    real = settings.pop(_REAL_ACTIVATIONS, False)
    if real and kind.lower() != _PREFIX:
        raise InputError(f"{option}_config: {_REAL_ACTIVATIONS} is about prefix_tuning, not {kind}; leave it out")
    heads = trained_in_full(model)
    pooler = f"{encoder_path(model)}.pooler" if encoder_path(model) else "pooler"
    if any(name == pooler for name, _ in model.named_modules()):  # whole: peft cannot load what is wrapped twice
        heads = [*(head for head in heads if not f"{head}.".startswith(f"{pooler}.")), "pooler"]
    asked = settings.get("modules_to_save")
    saved_too = [] if asked is None else _left_out(model, [*asked, *_SAVED_BY_PEFT])
    settings["modules_to_save"] = list(dict.fromkeys(heads)) if asked is None else [*asked, *saved_too]
    if kind.lower() in ("lora", "vera") and (targets := lora_targets(model)):
        settings.setdefault("target_modules", targets)
    if is_prompt_model(model) and kind.lower() == _PREFIX:
        inner = model.config.masked_lm
        settings = {
            "num_layers": inner.num_hidden_layers,
            "token_dim": inner.hidden_size,
            "num_attention_heads": inner.num_attention_heads,
            **settings,
        }
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind.lower()]]
    try:
        config = config_class(task_type=TaskType.SEQ_CLS, **settings)
        with seeded_init(seed):
            wrapped = train_in_float32(get_peft_model(model, config))
            if real:
                start_from_activations(wrapped)
            for name, parameter in wrapped.named_parameters():
                if any(f".{module}.modules_to_save." in name for module in saved_too):
                    parameter.requires_grad_(False)
            return wrapped
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise InputError(f"{option}={kind} with {option}_config={given} does not work: {reason}") from error


@torch.no_grad()
def start_from_activations(model: PeftModel) -> None:
    """Set a prefix without reparametrisation to the keys and values of random tokens, drawn from torch's generator.

    Raises:
        ValueError: the prefix has a reparametrisation, or the encoder keeps no keys and values.
    """
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    if getattr(encoder, "prefix_projection", False):
        raise ValueError("a prefix with prefix_projection does not hold keys and values; leave one of the two out")
    base = model.get_base_model()
    body = base.get_submodule(encoder_path(base))
    cache, n = DynamicCache(), config.num_virtual_tokens
    ids = torch.randint(base.config.vocab_size, (1, n))
    hooks, body._forward_hooks = body._forward_hooks, type(body._forward_hooks)()  # no mask is looked for here
    try:
        with evaluating(body):
            body(input_ids=ids.to(model.device), past_key_values=cache)
    finally:
        body._forward_hooks = hooks
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    if len(pairs) != config.num_layers:
        raise ValueError("its encoder keeps no keys and values of all layers")
    # peft's order: [virtual tokens, layers x (key, value), heads, size of a head]
    rows = torch.stack([tensor[0].transpose(0, 1) for pair in pairs for tensor in pair], 1)
    encoder.embedding.weight.copy_(rows.reshape(n, -1))
