"""Wrapping a model with a peft method: modules that train in full, and settings that peft cannot infer."""

import inspect
import re
from dataclasses import fields
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    ModulesToSaveWrapper,
)
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import encoder_path
from hf_ft_ext.models.loading import seeded_init
from hf_ft_ext.offload import has_offloaded, keep_loaded, placeholders
from hf_ft_ext.per_example.state import evaluating
from hf_ft_ext.prompts.model import architecture, is_prompt_model
from hf_ft_ext.structure.find import find_structure
from hf_ft_ext.structure.heads import head_modules
from hf_ft_ext.structure.rows import trial_rows
from hf_ft_ext.structure.targets import default_targets, endings, key_value_and_down
from hf_ft_ext.training.saved.delta_files import modules_with_statistics
from hf_ft_ext.training.weights.precision import train_in_float32

PREFIX_TUNING = "prefix_tuning"
_SAVED_BY_PEFT = ("classifier", "score")  # regardless of `modules_to_save`
_PASSED_BY_PEFT = {"inputs_embeds", "output_attentions", "output_hidden_states", "return_dict"}
_PARTS_OF_ADAPTERS = ("lora_dropout", "lora_A", "lora_B", "base_layer")
_INIT_FROM_ACTIVATIONS = "init_from_activations"  # our own setting, not part of peft's configuration
_TASKS = (
    ("ForSequenceClassification", TaskType.SEQ_CLS),
    ("ForCausalLM", TaskType.CAUSAL_LM),
    ("LMHeadModel", TaskType.CAUSAL_LM),
    ("ForConditionalGeneration", TaskType.SEQ_2_SEQ_LM),
    ("ForTokenClassification", TaskType.TOKEN_CLS),
    ("ForQuestionAnswering", TaskType.QUESTION_ANS),
)
_LANGUAGE_MODELS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)


_TEXT = "input_ids"  # the first argument of peft's classes for tasks


def task_type_of(model: nn.Module) -> TaskType | None:
    """peft's task type of a transformers model, by the end of its class's name; `None` for others.

    A subclass of a transformers class has the type of that class. A model whose forward does not take what peft's
    class for the type passes on has none, such as Whisper, whose first input is sound.
    """
    if getattr(model, "main_input_name", _TEXT) != _TEXT:
        return None
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds and not parameters.keys() >= _PASSED_BY_PEFT:
        return None
    for kind in type(model).__mro__:
        for ending, task in _TASKS:
            if kind.__name__.endswith(ending):
                return task
    return None


def saved_by_peft(model: nn.Module) -> list[str]:
    """Names of the heads that peft expects in every adapter file of a classifier, trained or not."""
    if task_type_of(model) not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return []
    return [name for name, _ in model.named_children() if name in _SAVED_BY_PEFT]


def carries_adapters(model: nn.Module) -> bool:
    """Whether a model is wrapped by peft, or some of its modules are."""
    return hasattr(model, "peft_config") or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def trained_in_full(model: PreTrainedModel) -> list[str]:
    """Dotted names of the modules that must train in full beside an adapter: the head, and all untrained modules.

    The heads of prompt models and language models are pretrained. Of a prompt model only the label words' rows count,
    if linear probing has written them.

    Raises:
        InputError: the model is not a transformers model, so its head is unknown.
    """
    if getattr(model, "base_model_prefix", None) is None:
        raise InputError(
            f"{type(model).__name__} is not a transformers model, so its head is unknown; add the adapter to it "
            "yourself (model.add_adapter or peft's get_peft_model; with SparseGradConfig call compute_bases(model, "
            "batches, loss) before training) and train with its own trainer"
        )
    language = is_prompt_model(model) or task_type_of(model) in _LANGUAGE_MODELS
    names = [] if language else head_modules(model)
    for parameter in sorted(getattr(model, "fresh_parameters", ())):
        owner = parameter.rpartition(".")[0]
        if owner and not any(owner == name or owner.startswith(f"{name}.") for name in names):
            names.append(owner)
    return names


def saved_for_statistics(model: nn.Module, saved: list[str]) -> list[str]:
    """Names of the modules outside of `saved` whose running statistics have to be saved beside an adapter."""
    return [name for name in modules_with_statistics(model) if not any(f".{part}." in f".{name}." for part in saved)]


def check_heads(model: nn.Module, names: list[str]) -> None:
    """Refuse heads whose name peft would also find in the layers, as it compares the ends of names.

    A head called `output` would stand for the `output` of every layer of BERT: all of them would train in full, and
    get no adapters.

    Raises:
        InputError: there is such a head.
    """
    for name, others in _alike(model, names).items():
        with_linear = [o for o in others if any(isinstance(m, nn.Linear) for m in model.get_submodule(o).modules())]
        with_linear += [part for part in _PARTS_OF_ADAPTERS if part.endswith(name)] * 2
        if len(with_linear) > 1:
            raise InputError(
                f"the head {name!r} of {type(model).__name__} cannot be trained beside adapters: peft finds modules "
                f"by the ends of their names, and {with_linear[0]} has the same; rename the head, to head for example"
            )


def freeze_others(wrapped: PeftModel, names: list[str]) -> PeftModel:
    """Freeze the modules that peft wrapped beside the heads `names`; return the model.

    They are saved with the adapter: for their running statistics, or because their names end as those of heads do.
    """
    base, heads = wrapped.get_base_model(), tuple(f"{name}." for name in names)
    for path, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and not f"{path}.".startswith(heads):
            module.requires_grad_(False)
    return wrapped


def wrap_with_peft(
    model: PreTrainedModel, kind: str, settings: dict | None, seed: int, option: str = "peft"
) -> PeftModel:
    """Wrap a model with a peft method, initialised from `seed`; the head of a classifier trains in full.

    Saved models are standard adapters that include the head. With your own `modules_to_save`, other modules that were
    loaded untrained are saved too but do not train; otherwise the adapter could not be loaded. Without
    `target_modules`, peft's own table is used. For a model that it lacks, the targets are found by structure: queries
    and values; for `ia3` keys, values and the last projection of the feed-forward layers.

    Args:
        kind: the method's name in peft, such as `lora`, `ia3`, `vera`, `ln_tuning`, `prefix_tuning`.
        settings: arguments of its configuration. For `prefix_tuning` also `init_from_activations: true`: the prefix is
            initialised with the model's keys and values of as many random tokens, as in MeZO.
        option: name of the argument that holds `kind`, for error messages.

    Raises:
        InputError: there is no such method, or it does not work with these settings or this model.
    """
    known = {name.value.lower(): name for name in PeftType if name in PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind.lower() not in known:
        raise InputError(f"{option}={kind!r} is not a peft method; choose from: {', '.join(sorted(known))}")
    if carries_adapters(model):
        raise InputError(f"the model carries PEFT adapters already; leave {option} out, or pass the base model")
    given, settings = settings, dict(settings or {})
    real = settings.pop(_INIT_FROM_ACTIVATIONS, False)
    if real and kind.lower() != PREFIX_TUNING:
        raise InputError(f"{option}_config: {_INIT_FROM_ACTIVATIONS} is about prefix_tuning, not {kind}; leave it out")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind.lower()]]
    if known[kind.lower()] == PeftType.ADALORA:
        raise InputError(
            f"{option}={kind} moves ranks between layers by a call after each step, which a Trainer does not make, "
            f"and adds a penalty to the loss in evaluation too; choose another method, such as {option}=lora"
        )
    if known[kind.lower()] == PeftType.PREFIX_TUNING and is_prompt_model(model) and model.config.reading == "decoder":
        raise InputError(
            f"{option}={kind} puts keys and values in front of a decoder's tokens, and the encoder that reads the row "
            f"would get none; use lora, ia3 or another method of peft that changes layers"
        )
    tokens = {field.name for field in fields(config_class)} & {"num_virtual_tokens"}
    if tokens and settings.get("num_virtual_tokens") is None:
        raise InputError(
            f"{option}={kind} needs a number of virtual tokens; pass it in {option}_config, such as "
            '{"num_virtual_tokens": 20}'
        )
    if tokens and settings.get("task_type", task_type_of(model)) is None:
        raise InputError(
            f"{option}={kind} puts virtual tokens in front of texts, and {type(model).__name__} is not one of the "
            "models of texts for which peft does so; use lora, ia3 or another method of peft that changes layers"
        )
    heads = list(dict.fromkeys(trained_in_full(model)))
    asked = settings.get("modules_to_save")
    if asked is None:
        check_heads(model, heads)
    trained = heads if asked is None else asked
    saved_too = [] if asked is None else _untrained_modules(model, [*asked, *_SAVED_BY_PEFT])
    saved_too += saved_for_statistics(model, [*trained, *saved_too])
    settings["modules_to_save"] = [*trained, *saved_too] or None
    method = known[kind.lower()]
    settings = _with_targets(model, method, config_class, settings, [] if asked is not None else heads)
    inner = model.config.masked_lm if is_prompt_model(model) else model.config
    if "num_virtual_tokens" in {field.name for field in fields(config_class)} and not _sizes_known_to_peft(model):
        settings = {**_sizes_of_virtual_tokens(inner, method), **settings}
    try:
        config = config_class(**{"task_type": task_type_of(model), **settings})
        with seeded_init(seed):
            wrapped = _wrapped(model, config)
            if real:
                start_from_activations(wrapped)
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise InputError(f"{option}={kind} with {option}_config={given} does not work: {reason}") from error
    if config.is_prompt_learning:
        _check_prompt(wrapped, kind, option)
    for name, parameter in wrapped.named_parameters():
        if any(f".{module}.modules_to_save." in name for module in saved_too):
            parameter.requires_grad_(False)
    return freeze_others(wrapped, heads) if asked is None else wrapped


@torch.no_grad()
def start_from_activations(model: PeftModel) -> None:
    """Set a prefix without reparametrisation to the keys and values of random tokens, drawn from torch's generator.

    Raises:
        ValueError: the prefix has a reparametrisation, or the encoder does not cache keys and values.
    """
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    if getattr(encoder, "prefix_projection", False):
        raise ValueError("a prefix with prefix_projection does not hold keys and values; leave one of the two out")
    base = model.get_base_model()
    body = base.get_submodule(encoder_path(base))
    cache, n = DynamicCache(), config.num_virtual_tokens
    ids = torch.randint(base.config.vocab_size, (1, n))
    hooks, body._forward_hooks = body._forward_hooks, type(body._forward_hooks)()  # they look for a mask
    try:
        with evaluating(body):
            body(input_ids=ids.to(model.device), past_key_values=cache)
    finally:
        body._forward_hooks = hooks
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    if len(pairs) != config.num_layers:
        raise ValueError("its encoder keeps no keys and values of all layers")
    # peft's layout: [virtual tokens, layers x (key, value), heads, head size]
    rows = torch.stack([tensor[0].transpose(0, 1) for pair in pairs for tensor in pair], 1)
    encoder.embedding.weight.copy_(rows.reshape(n, -1))


def _alike(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """For each of the heads `names`, the modules outside of all heads whose names end in its name."""
    heads = tuple(f"{name}." for name in names)
    outside = [name for name, _ in model.named_modules() if not f"{name}.".startswith(heads)]
    return {name: [other for other in outside if other.endswith(name)] for name in names}


def _untrained_modules(model: PreTrainedModel, saved: list[str]) -> list[str]:
    """Modules that were loaded untrained and are not part of a module in `saved`."""
    fresh = getattr(model, "fresh_parameters", ())
    holders = [name for name in trained_in_full(model) if any(p == name or p.startswith(f"{name}.") for p in fresh)]
    return [name for name in holders if not any(f".{part}." in f".{name}." for part in saved)]


def _wrapped(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The model with adapters. Of an offloaded model, adapters and modules that train in full stay loaded."""
    names = [f".{name}" for name in config.modules_to_save or ()] if has_offloaded(model) else []
    full = [m for name, m in model.named_modules() if f".{name}".endswith(tuple(names))] if names else []
    keep_loaded(model, [parameter for module in full for parameter in module.parameters()])
    computed = (
        "the adapters are computed from the weights that they adapt, and these are offloaded; leave out the setting "
        "that does this, or load the whole model"
    )
    try:
        with placeholders(model):
            wrapped = train_in_float32(get_peft_model(model, config))
            trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    except torch.linalg.LinAlgError as error:
        raise ValueError(computed) from error
    if has_offloaded(model) and not all(parameter.isfinite().all() for parameter in trained):
        raise ValueError(computed)
    return wrapped


def _sizes_known_to_peft(model: PreTrainedModel) -> bool:
    """Whether peft finds the sizes of virtual tokens in the configuration, which it reads as a dictionary."""
    names = model.config.to_dict().keys()
    return not is_prompt_model(model) and bool(names & {"hidden_size", "n_embd", "d_model"})


def _sizes_of_virtual_tokens(config: Any, method: PeftType) -> dict[str, int | None]:
    """The sizes that peft reads from the configuration of models that it knows."""
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    shared = getattr(config, "num_key_value_heads", None)
    if method == PeftType.PREFIX_TUNING and shared is not None:  # grouped-query attention: fewer heads
        size = getattr(config, "head_dim", None)
        if not size and hidden and heads:
            size = hidden // heads
        if size:
            heads, hidden = shared, size * shared
    return {
        "num_layers": getattr(config, "num_hidden_layers", None),
        "token_dim": hidden,
        "num_attention_heads": heads,
    }


def _with_targets(
    model: PreTrainedModel, method: PeftType, config_class: type, settings: dict[str, Any], heads: list[str]
) -> dict[str, Any]:
    """`settings` with the method's default targets, and without adapters in modules that train in full."""
    settings, known = dict(settings), {field.name for field in fields(config_class)}
    table = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(method), "target_module_mapping", None)
    if not any(settings.get(name) for name in ("target_modules", "target_parameters")):
        if table and "target_modules" in known:  # a method without a table chooses them itself (shadow)
            settings["target_modules"] = default_targets(model, table, architecture(model))
        elif method == PeftType.IA3 and architecture(model) in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
            kind = architecture(model)  # peft does not look inside a prompt model
            settings["target_modules"] = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[kind]
            settings["feedforward_modules"] = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
        elif method == PeftType.IA3:
            attention, down = key_value_and_down(find_structure(model))
            names = [name for name, _ in model.named_modules()]
            settings["feedforward_modules"] = endings(names, down)
            settings["target_modules"] = [*endings(names, attention), *settings["feedforward_modules"]]
    if "exclude_modules" in known and settings.get("exclude_modules") is None and heads:
        # a target such as "dense" must not add adapters to modules that train in full
        settings["exclude_modules"] = "|".join(rf"{re.escape(name)}(\..*)?" for name in heads)
    return settings


def _check_prompt(model: PeftModel, kind: str, option: str) -> None:
    """Raise an `InputError` if virtual tokens have no effect on this model's logits."""
    base, reason, failed = model.get_base_model(), "", True
    prompt = [p for p in model.prompt_encoder.parameters() if p.requires_grad]
    with torch.enable_grad(), evaluating(base):
        for batch in trial_rows(base):
            if "attention_mask" not in batch:  # all training rows have one
                continue
            try:
                output = model(**batch)
                logits = output.logits if hasattr(output, "logits") else output[0]
                found = torch.autograd.grad(logits.float().sum(), prompt, allow_unused=True)
            except Exception as error:  # a model may raise anything on past keys and values
                reason = reason or next(iter(str(error).splitlines()), "").rstrip(".") or type(error).__name__
                continue
            failed = all(gradient is None for gradient in found)
            reason = "its virtual tokens do not reach the result" if failed else ""
            break
    if failed:
        raise InputError(
            f"{option}={kind} does not work with {type(base).__name__} ({reason}); use lora, ia3 or another method of "
            "peft that changes layers"
        )
