"""Loading a pretrained model with a classification, prompt or language-model head, and its tokenizer."""

import contextlib
import inspect
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_ft_ext.arguments import (
    CAUSAL_LM,
    FINETUNE,
    SEQ2SEQ_LM,
    DataArguments,
    MethodTrainingArguments,
    ModelArguments,
)
from hf_ft_ext.demo.encoder import demo_encoder
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.models.labels import check_untrained_head, set_labels, warn_of_renamed_labels
from hf_ft_ext.models.source import ADAPTER_NOT_TRAINED, checked_name, loading_errors_as_input_errors
from hf_ft_ext.models.trained_adapter import TrainedAdapter, add_adapter, find_adapter, is_hub_adapter
from hf_ft_ext.models.weight_options import apply_dtype, weight_options
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.loading import load_prompt_model
from hf_ft_ext.prompts.making import load_language_model
from hf_ft_ext.prompts.readout import Reading, reading_of
from hf_ft_ext.training.finite import first_not_finite
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.saved.saving import keep_weights_in_evaluation, plain_outputs
from hf_ft_ext.training.weights.placement import check_map
from hf_ft_ext.training.weights.quantized import keep_differentiable
from hf_ft_ext.training.weights.sharding import whole_shape

logger = logging.getLogger(__name__)

_NEWEST = "main"  # the Hub's default branch
# names in configurations: of most models, of LED, of MPT
_POSITIONS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len")
_DECODER_POSITIONS = ("max_decoder_position_embeddings", "max_position_embeddings")
_NO_LIMIT = 10**6  # tokenizers without a limit carry a huge number


def load_tokenizer_and_model(
    model_args: ModelArguments,
    data: Any,
    *,
    seed: int,
    data_args: DataArguments | None = None,
    args: MethodTrainingArguments | None = None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | PeftModel]:
    """Load the tokenizer and the model with a head for the labels of `data`.

    With prompts (`data_args.few_shot_type`), and for a saved prompt model, the head is the language model's own: a
    `PromptForSequenceClassification`.

    A new head is initialised from `seed`; the global random state is not changed. `model.fresh_parameters` lists the
    names of newly initialised parameters, so that an adapter can save them. `model.loaded_from` holds revision and
    cache folder, so that an adapter can record them. A model that already has these labels, in any order and case,
    keeps its own names and ids.

    The folder or Hub id of a trained adapter gives its base model with the adapter, if `args` do not train.

    Args:
        model_args: the model; no name = the demo encoder.
        data: the run's `TaskData` (`label_names` and `problem_type` are read).
        seed: seed of new weights.
        data_args: whether and how the task is put as a prompt; `None` = a classification head.
        args: determines which parameters train and on which device; `None` = all weights, on the CPU.

    Raises:
        InputError: the model or tokenizer cannot be found, read, or used for classification.
    """
    source = _source(model_args, args)
    config, adapter = source.config, source.adapter
    data_args = DataArguments() if data_args is None else data_args
    as_prompt = data_args.few_shot_type != FINETUNE or isinstance(config, PromptConfig)
    if not as_prompt:
        _check_class(config, source.name)
    stored = getattr(config, "dtype", None)
    options = weight_options(model_args, config, args, source.name, as_prompt=as_prompt)
    if as_prompt:
        tokenizer = _load_tokenizer(model_args, source)
        with loading_errors_as_input_errors(source.name, "weights"):
            model = load_prompt_model(
                source.name, config, tokenizer, data, data_args, adapter=None if adapter is None else adapter.folder,
                revision=source.revision, **source.hub, **options,
            )  # fmt: skip
        check_map(options.get("device_map"), model.masked_lm, source.name)
        model.fresh_parameters = frozenset()
        if model_args.attn_implementation is not None:  # the constructor of the wrapper resets it to the default
            model.masked_lm.set_attn_implementation(model_args.attn_implementation)
        apply_dtype(model, model_args.dtype, args, stored, source.name)
        return _complete(source, tokenizer, model)
    trained_labels = getattr(config, "num_labels", None)
    own_names = [str(label) for _, label in sorted((getattr(config, "id2label", None) or {}).items())]
    trains = args is None or args.do_train
    set_labels(config, data, trains)
    if adapter is not None and adapter.has_configuration and config.num_labels != trained_labels:
        raise InputError(
            f"the adapter in {adapter.name!r} was trained for {trained_labels} outputs "
            f"({', '.join(own_names[:10])}), but this data needs {config.num_labels}; pass data with these labels"
        )
    tokenizer = _load_tokenizer(model_args, source)
    with loading_errors_as_input_errors(source.name, "weights"), seeded_init(seed):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.name,
            config=config,
            revision=source.revision,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **source.hub,
            **options,
        )
    check_map(options.get("device_map"), model, source.name)
    _check_loaded(model, info, source.name, own_names, trains=trains or adapter is not None)
    apply_dtype(model, model_args.dtype, args, stored, source.name)
    tokenizer, complete = _complete(source, tokenizer, model)
    warn_of_renamed_labels(model, own_names, source.name if adapter is None else adapter.name, trains)
    return tokenizer, complete


def load_tokenizer_and_language_model(
    model_args: ModelArguments, task_type: str, args: MethodTrainingArguments | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | PeftModel]:
    """Load the tokenizer and a causal language model, or an encoder-decoder for `seq2seq_lm`.

    The folder or Hub id of a trained adapter gives its base model with the adapter, if `args` do not train.

    Args:
        model_args: the model.
        task_type: `causal_lm` or `seq2seq_lm`.
        args: determines which parameters train and on which device; `None` = all weights, on the CPU.

    Raises:
        InputError: the model or tokenizer cannot be found or read, or the model is of another kind.
    """
    if model_args.model_name_or_path is None:
        raise InputError(f"--task_type {task_type} needs a language model; pass one with --model_name_or_path")
    source = _source(model_args, args)
    name, config = source.name, source.config
    if isinstance(config, PromptConfig):
        raise InputError(
            f"--task_type {task_type}: {model_args.model_name_or_path!r} was trained to classify by a prompt; leave "
            "--task_type out, or pass a language model"
        )
    wanted = Reading.LAST if task_type == CAUSAL_LM else Reading.DECODER
    reading = reading_of(config, name)
    if reading is not wanted:
        kinds = {
            Reading.MASK: "a masked language model",
            Reading.LAST: "causal",
            Reading.DECODER: "an encoder-decoder",
        }
        other = {Reading.LAST: f"--task_type {CAUSAL_LM}", Reading.DECODER: f"--task_type {SEQ2SEQ_LM}"}.get(
            reading, "--few_shot_type prompt"
        )
        raise InputError(f"--task_type {task_type}: model {name!r} is {kinds[reading]}; pass another one, or {other}")
    stored = getattr(config, "dtype", None)
    options = weight_options(model_args, config, args, name, as_prompt=True)
    tokenizer = _load_tokenizer(model_args, source)
    with loading_errors_as_input_errors(name, "weights"):
        model = load_language_model(name, config=config, revision=source.revision, **source.hub, **options)
    if "perm_mask" in inspect.signature(model.forward).parameters:  # XLNet
        raise InputError(
            f"--task_type {task_type}: {type(model).__name__} predicts tokens in any order, and without a mask of the "
            "order each position reads the tokens after it; pass a causal language model"
        )
    check_map(options.get("device_map"), model, name)
    model.fresh_parameters = frozenset()
    apply_dtype(model, model_args.dtype, args, stored, name)
    return _complete(source, tokenizer, model)


def model_max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Maximum input length of model and tokenizer in tokens, with special tokens; `None` = no limit known."""
    limits = []
    if tokenizer.model_max_length is not None and tokenizer.model_max_length < _NO_LIMIT:
        limits.append(int(tokenizer.model_max_length))
    config = model.config
    if getattr(config, "is_encoder_decoder", False):  # an encoder and a decoder may have configurations of their own
        config = config.get_text_config(encoder=True)
    if (positions := _positions(config, _POSITIONS)) is not None:
        limits.append(positions - _reserved_positions(model))
    return min(limits) if limits else None


def decoder_max_length(model: PreTrainedModel) -> int | None:
    """Number of positions of an encoder-decoder's decoder; `None` = no limit known (T5)."""
    return _positions(model.config.get_text_config(decoder=True), _DECODER_POSITIONS)


@contextlib.contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Initialise parameters inside (on the CPU) from `seed`, and restore the global random state afterwards.

    transformers and peft always draw from torch's global CPU generator. Generators of accelerators are not changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class _Source:
    """Where a model comes from.

    Attributes:
        name: folder or Hub id of the weights; of an adapter's base model.
        revision: of `name`.
        config: configuration of the model; of a trained adapter its own, if it has one.
        hub: arguments of `from_pretrained` for the Hub.
        adapter: a trained adapter on these weights.
    """

    name: str
    revision: str
    config: PreTrainedConfig
    hub: dict[str, Any]
    adapter: TrainedAdapter | None

    @property
    def loaded_from(self) -> dict[str, str | None]:
        """What an adapter records of its base model."""
        return {"revision": self.revision, "cache_dir": self.hub["cache_dir"]}


def _source(model_args: ModelArguments, args: MethodTrainingArguments | None) -> _Source:
    """The model that the arguments name; a trained adapter only for a run that does not train."""
    name = demo_encoder() if model_args.model_name_or_path is None else model_args.model_name_or_path
    revision, adapter = model_args.model_revision, None
    at_hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    if args is not None and not args.do_train:
        adapter = find_adapter(name, revision, **at_hub)
    elif is_hub_adapter(name, revision, **at_hub):
        raise InputError(ADAPTER_NOT_TRAINED.format(name=name))
    found = checked_name(name) if adapter is None else adapter.folder
    if os.path.isdir(os.path.expanduser(name)) and revision != _NEWEST:
        raise InputError(
            f"model_revision={revision!r} is about a model of the Hub, and {name!r} is a local folder; leave it out, "
            "or pass the Hub id"
        )
    hub = {**at_hub, "trust_remote_code": model_args.trust_remote_code}
    weights = found if adapter is None else adapter.base
    revision = revision if adapter is None else adapter.revision
    at, its_revision = (weights, revision) if adapter is None or not adapter.has_configuration else (found, _NEWEST)
    with loading_errors_as_input_errors(at, "configuration"):
        config = AutoConfig.from_pretrained(at, revision=its_revision, **hub)
    return _Source(weights, revision, config, hub, adapter)


def _complete(
    source: _Source, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | PeftModel]:
    """Fit tokenizer and model to each other, and add the trained adapter, if there is one."""
    model.loaded_from = source.loaded_from
    tokenizer, model = _fitted_together(tokenizer, model, source.name)
    if source.adapter is None:
        return tokenizer, model
    keep_weights_in_evaluation(model)  # an adapter of RWKV was trained on undivided weights
    if source.adapter.has_generation_configuration:
        model.generation_config = GenerationConfig.from_pretrained(source.adapter.folder)
    wrapped = add_adapter(model, source.adapter, model.fresh_parameters)
    model.fresh_parameters = frozenset()
    return tokenizer, wrapped


def _fitted_together(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Set the padding token and plain outputs, check weights and vocabulary, and return both."""
    if (bad := first_not_finite(model)) is not None:
        raise InputError(f"the weights of model {name!r} hold NaN or infinity in {bad}; save or download them again")
    keep_differentiable(model)
    _set_padding(model, tokenizer)
    declare_mean_loss(model)
    plain_outputs(model)
    try:
        rows = whole_shape(model.get_input_embeddings().weight)[0]
    except NotImplementedError:  # CANINE hashes characters into several tables
        rows = len(tokenizer)
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} knows {len(tokenizer)} tokens but model {name!r} only {rows}; "
            "pass the tokenizer that belongs to the model"
        )
    return tokenizer, model


def _positions(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _reserved_positions(model: nn.Module) -> int:
    """Number of unused positions: RoBERTa and similar models start counting after the padding position."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    return 0


def _check_class(config: PreTrainedConfig, name: str) -> None:
    remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"model {name!r} is of type {config.model_type!r}, for which transformers has no sequence classifier; "
            "pass another model"
        )


def _load_tokenizer(model_args: ModelArguments, source: _Source) -> PreTrainedTokenizerBase:
    name, revision = source.name, {"revision": source.revision}
    if model_args.tokenizer_name is not None:
        name, revision = os.path.expanduser(model_args.tokenizer_name), {}
    elif source.adapter is not None and source.adapter.has_tokenizer:
        name, revision = source.adapter.folder, {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **revision, **source.hub)
    except ImportError as error:
        if (library := re.search(r"requires the (\w+) library", str(error))) is None:
            raise InputError(f"cannot load a tokenizer from {name!r}: {first_line(error)}") from error
        raise InputError(
            f"the tokenizer in {name!r} needs a library that is not installed: pip install {library[1].lower()}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"cannot load a tokenizer from {name!r} ({first_line(error)}); pass a folder or Hub id "
            "that has one with --tokenizer_name"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{name!r} holds no tokenizer files; pass the model's tokenizer with --tokenizer_name")
    return tokenizer


def _check_loaded(model: PreTrainedModel, info: dict, name: str, own_labels: list[str], trains: bool) -> None:
    """Check the parameters that the weight file lacks, and record them in `model.fresh_parameters`."""
    encoder = f"{model.base_model_prefix}."
    mismatched = sorted(entry[0] for entry in info["mismatched_keys"])
    wrong = [key for key in mismatched if key.startswith(encoder)]
    if wrong:
        raise InputError(f"the weights of model {name!r} do not have the shapes of its config.json: {wrong[0]}")
    missing = set(info["missing_keys"])
    names = [key for key, _ in model.named_parameters() if key.startswith(encoder)]
    absent = [key for key in names if key in missing]
    if len(absent) > len(names) / 2:
        raise InputError(
            f"the weights of model {name!r} lack {len(absent)} of the encoder's {len(names)} tensors "
            f"({absent[0]}, ...); they belong to another model"
        )
    missing |= set(mismatched)
    model.fresh_parameters = frozenset(missing)
    if not trains:
        check_untrained_head(model, bool(mismatched), own_labels, name)
    if mismatched:
        logger.info(
            "New classification head: %s had %s labels, not %d.", name, len(own_labels), model.config.num_labels
        )


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and model a padding token, without which batches of several rows are impossible."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has neither padding nor end token; set one")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("The tokenizer has no padding token: padding with its end token %r.", tokenizer.eos_token)
        model.config.pad_token_id = tokenizer.pad_token_id
    elif getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
