"""`PromptConfig`: a language model's configuration with a template and label words."""

from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import CONFIG_NAME

from hf_ft_ext.errors import InputError

PROMPT_FILE = "prompt_config.json"  # saved with an adapter; a full model has the same content in its config.json


class PromptConfig(PreTrainedConfig):
    """Configuration of `PromptForSequenceClassification`.

    Attributes:
        masked_lm: configuration of the language model, masked or not.
        template: see `parse_template`.
        reading: the position whose logits give the class: "mask", "last" (causal) or "decoder" (encoder-decoder).
        word_scoring: "first_token", "sequence" or "sequence_mean".
        words: label words by label id; for a regression the words of the lower and the upper end; `None` = each row
            has its own options.
        word_ids: first token of each label word.
        word_sequences: all tokens of each label word.
        word_bias: subtracted from the logits (see `PromptForSequenceClassification.calibrate`).
        mask_token_id: token at the position of the answer; `None` = the row ends there.
        row_end: tokens that every row ends with, see `row_end`; `None` = unknown.
        decoder_prefix: decoder tokens before the answer.
        bounds: lower and upper end of a regression's scale.
        untied_words: whether the output rows of the label words are a separate layer (`[words, hidden]`).
    """

    model_type = "prompt_classifier"
    sub_configs_defaults: ClassVar = {"masked_lm": SubConfigSpec(config_class=AutoConfig, model_type="bert")}

    masked_lm: PreTrainedConfig | dict | None = None
    template: str = ""
    words: list[str] | None = None
    word_ids: list[int] | None = None
    word_sequences: list[list[int]] | None = None
    word_bias: list[float] | None = None
    reading: str = "mask"
    word_scoring: str = "first_token"
    row_end: list[int] | None = None
    decoder_prefix: list[int] | None = None
    mask_token_id: int | None = None
    bounds: list[float] | None = None
    untied_words: bool = False
    pad_token_id: int | None = None

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict, dict]:
        # peft loads the configuration of an adapter's base model by this class; it may be a plain language model.
        found, unused = super().get_config_dict(*args, **kwargs)
        if found.get("model_type", cls.model_type) != cls.model_type:
            found = {"model_type": cls.model_type, "masked_lm": found}
        return found, unused

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        return self.masked_lm

    def _get_generation_parameters(self) -> dict[str, Any]:
        # transformers refuses to save generation parameters that are not declared fields. Those of the language model
        # (Bart's forced_eos_token_id) are visible through `__getattr__`, but are saved with its own configuration.
        return {name: value for name, value in super()._get_generation_parameters().items() if name in vars(self)}

    def __getattr__(self, name: str) -> Any:
        # Take sizes (hidden_size, vocab_size, max_position_embeddings, ...) from the language model.
        inner = self.__dict__.get("masked_lm")
        if name.startswith("_") or not isinstance(inner, PreTrainedConfig) or name == "masked_lm":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)


def saved_prompt(folder: Path) -> PromptConfig:
    """Return the prompt model's configuration saved with an adapter."""
    for name in (PROMPT_FILE, CONFIG_NAME):
        if (folder / name).is_file():
            found = PromptConfig._dict_from_json_file(folder / name)  # knows infinity, as Mamba2 has it
            if found.get("model_type") == PromptConfig.model_type:
                return PromptConfig.from_dict(found)
    raise InputError(
        f"{str(folder)!r} holds no {PROMPT_FILE}, so it is not an adapter of a prompt model; check the path"
    )
