"""Load the model of a solved kernel from its folder: a classifier or prompt model, with or without an adapter."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_ft_ext.adapters.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.kernel.saved.record import NOT_TRAINED, SavedKernel
from hf_ft_ext.models import seeded_init
from hf_ft_ext.prompts.configuration import PROMPT_FILE, PromptConfig
from hf_ft_ext.prompts.model import PromptForSequenceClassification
from hf_ft_ext.training.weights.precision import train_in_float32


def load_model(folder: str | Path, saved: SavedKernel, trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """Load the model of the kernel in `folder`: a classifier or prompt model, with or without an adapter.

    Args:
        trust_remote_code: whether to run model code that comes with the folder.

    Raises:
        InputError: the model cannot be loaded from the folder.
    """
    folder = Path(folder)
    try:
        with without_report():
            if (folder / ADAPTER_CONFIG).is_file():
                return with_adapter(load_base(folder, saved, trust_remote_code), folder)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            return _class_of(config).from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # transformers, peft and safetensors raise many types
        own = " pass trust_remote_code=True if you trust this code, or" if "trust_remote_code" in str(error) else ""
        raise InputError(
            f"the model of the kernel in {str(folder)!r} cannot be loaded from there ({first_line(error)});{own} load "
            "it yourself and pass model="
        ) from error


def load_base(folder: Path, saved: SavedKernel, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the base model of the adapter in `folder`, with the labels of the adapter's task."""
    peft_config = PeftConfig.from_pretrained(folder)
    own_code = {"trust_remote_code": trust_remote_code}
    if (folder / PROMPT_FILE).is_file() or isinstance(AutoConfig.from_pretrained(folder, **own_code), PromptConfig):
        base = PromptForSequenceClassification.from_adapter(folder)
    else:
        config = AutoConfig.from_pretrained(folder, **own_code)
        name = peft_config.base_model_name_or_path
        if not name:
            raise InputError(
                f"the adapter in {str(folder)!r} names no base model; load the model yourself and pass model="
            )
        base = _class_of(config).from_pretrained(
            name, config=config, revision=peft_config.revision or "main", ignore_mismatched_sizes=True, **own_code
        )
    if saved.arguments.get("random_model_init"):  # the adapter's file does not hold the weights of the base model
        with seeded_init(saved.arguments["seed"]):
            base = type(base)(base.config)
    return base


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter in `folder` on its base model, trainable, in the dtype that it had when it was saved."""
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model = train_in_float32(get_peft_model(base, config))
    tensors = {name: tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items() if name != NOT_TRAINED}
    set_peft_model_state_dict(model, tensors)
    return model


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer in `folder`, or return `None` if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Without tokenizer files transformers makes one without a vocabulary, from the model type.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Keep the tensor `NOT_TRAINED` out of transformers' loading report, because here the kernel predicts."""
    before = PreTrainedModel._keys_to_ignore_on_load_unexpected
    PreTrainedModel._keys_to_ignore_on_load_unexpected = [*(before or []), NOT_TRAINED.replace(".", r"\.")]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_unexpected = before


def _class_of(config: PreTrainedConfig) -> Any:
    """The class of a saved model."""
    if isinstance(config, PromptConfig):
        return PromptForSequenceClassification
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    return getattr(transformers, name, AutoModelForSequenceClassification)
