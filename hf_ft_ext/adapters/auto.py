"""Let peft's `AutoPeftModelForSequenceClassification` load the labels that the adapter was trained with.

It loads an adapter's base model with the base's own configuration. A head of another size then raises an error, and
label names are those of the base. Here, a `config.json` in the adapter's folder is used instead.
"""

import functools
from typing import Any

from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download", "trust_remote_code", "subfolder")
_LABEL_SETTINGS = ("num_labels", "id2label", "label2id", "problem_type")
_DONE = "_hf_ft_ext_reads_configuration"


def read_configuration_beside_adapters() -> None:
    """Patch `AutoPeftModelForSequenceClassification.from_pretrained` to use a `config.json` beside the adapter.

    Calling it again has no effect.
    """
    from peft import AutoPeftModelForSequenceClassification as AutoClass

    if getattr(AutoClass, _DONE, False):
        return
    plain = AutoClass.from_pretrained.__func__

    @functools.wraps(plain)
    def from_pretrained(cls, pretrained_model_name_or_path, *positional, **kwargs):
        own = {name: kwargs[name] for name in _LABEL_SETTINGS if name in kwargs}
        config = _configuration(pretrained_model_name_or_path, own, kwargs)
        if config is None:
            return plain(cls, pretrained_model_name_or_path, *positional, **kwargs)
        base = _Base(cls._target_class, config, pretrained_model_name_or_path)
        reading = type(cls.__name__, (cls,), {"_target_class": base})
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        return plain(reading, pretrained_model_name_or_path, *positional, **kwargs)

    AutoClass.from_pretrained = classmethod(from_pretrained)
    setattr(AutoClass, _DONE, True)


class _Base:
    """Stands in for the class that loads an adapter's base model, and passes it the trained configuration."""

    def __init__(self, target: Any, config: PreTrainedConfig, adapter: str):
        self._target, self._config, self._adapter = target, config, adapter

    def from_pretrained(self, name: str, **kwargs: Any) -> PreTrainedModel:
        model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(self._config)]
        if hasattr(model_class, "from_adapter"):  # a base that is built from another model (prompts)
            return model_class.from_adapter(self._adapter)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # the adapter brings the head
        return self._target.from_pretrained(name, config=self._config, **kwargs)


def _configuration(name: str, own: dict[str, Any], kwargs: dict[str, Any]) -> PreTrainedConfig | None:
    """The configuration of a sequence classifier in the folder or repository `name`; `None` if there is none."""
    hub = {key: kwargs[key] for key in (*_HUB_ARGUMENTS, "revision") if kwargs.get(key) is not None}
    try:
        config = AutoConfig.from_pretrained(name, **hub, **own)
    except (OSError, ValueError, KeyError):
        return None
    return config if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING else None
