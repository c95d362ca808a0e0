"""Loading a model that was passed by name, as trl's trainers accept it."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, TrainingArguments

from hf_ft_ext.errors import InputError, first_line

_CLASSES_WITH_LOSS = (
    "ForSequenceClassification", "ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForTokenClassification",
    "ForQuestionAnswering", "ForMultipleChoice",
)  # fmt: skip


def load_by_name(name: str, args: TrainingArguments) -> PreTrainedModel:
    """Load the model of a Hub id or folder in float32, with the class that its configuration names.

    Args:
        name: Hub id or folder.
        args: if it has trl's `model_init_kwargs`, these are passed on to `from_pretrained`.

    Raises:
        InputError: the model cannot be loaded, or it has no head with a loss.
    """
    settings: dict[str, Any] = {"dtype": torch.float32, **(getattr(args, "model_init_kwargs", None) or {})}
    try:
        config = AutoConfig.from_pretrained(name, **{k: v for k, v in settings.items() if k != "dtype"})
        architecture = next(iter(config.architectures or ()), "")
        kind = getattr(transformers, architecture, None)
        if kind is None or not architecture.endswith(_CLASSES_WITH_LOSS):
            raise InputError(
                f"model={name!r} names {architecture or 'no class'}, which has no head to train; pass a loaded model, "
                f"such as AutoModelForSequenceClassification.from_pretrained({name!r})"
            )
        return kind.from_pretrained(name, **settings)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"model={name!r} is a name, and nothing can be loaded from it ({first_line(error)}); pass a folder, a Hub "
            "id, or a loaded model"
        ) from error
