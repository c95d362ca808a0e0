"""`PromptForSequenceClassification`: a classifier by the word that a language model predicts at one position."""

import contextlib
import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ft_ext.adapters.folder import is_adapter_without_weights
from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import REGRESSION
from hf_ft_ext.prompts.configuration import PromptConfig, saved_prompt
from hf_ft_ext.prompts.making import load_language_model, prompt_config
from hf_ft_ext.prompts.model.losses import class_loss, scale_loss
from hf_ft_ext.prompts.model.word_rows import set_word_rows
from hf_ft_ext.prompts.readout import (
    Reading,
    add_position_ids,
    causal_network,
    first_token_logits,
    has_one_head,
    keep_mask_position,
    last_positions,
    padding_right,
    reading_of,
    take_positions,
    warn_of_other_rows,
)
from hf_ft_ext.prompts.sequences import sequence_logits
from hf_ft_ext.prompts.templates.words import FIRST_TOKEN, check_word_scoring

_PROMPT_FIELDS = (
    "template", "words", "word_ids", "word_sequences", "word_scoring", "word_bias", "mask_token_id", "decoder_prefix",
    "row_end", "id2label", "label2id",
)  # fmt: skip
# attributes of a quantized model that transformers, peft and accelerate read
_QUANTIZATION_ATTRIBUTES = (
    "is_quantized", "hf_quantizer", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit",
)  # fmt: skip


class PromptForSequenceClassification(PreTrainedModel):
    """A classifier from a language model, a template and label words.

    The logits are the vocabulary logits of the label words at one position: the mask of a masked language model, the
    last token of a causal one (whose next word is the class), or the first decoder position of an encoder-decoder.
    Only that position goes through the language-model head. With `word_scoring` "sequence" a logit is the log
    probability of the whole label word, which may be several tokens; "sequence_mean" divides it by their number. A
    regression returns `low + (high - low) * p`, where `p` is the probability of its upper word against its lower one.
    Rows with several contexts, `input_ids` of shape `[rows, contexts, length]`, return the mean of their logits.
    `from_language_model` creates a classifier; `from_pretrained` loads one with its template and words.

    Raises:
        InputError: the model of the configuration has no language-model head; in `forward`, a row does not have
            exactly one mask.

    Sources: LM-BFF (Gao et al., ACL 2021, arXiv 2012.15723); option scoring as in GPT-3 (arXiv 2005.14165) and MeZO
    (arXiv 2305.17333); calibration: Zhao et al., ICML 2021 (arXiv 2102.09690).
    """

    config_class = PromptConfig
    base_model_prefix = "masked_lm"
    accepts_loss_kwargs = False  # the loss is the mean over the rows of one micro-batch
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PromptConfig):
        super().__init__(config)
        inner = config.get_text_config()
        reading = reading_of(inner, inner.name_or_path or inner.model_type)
        if config.untied_words:
            inner.tie_word_embeddings = False
        self._adopt(reading.auto_class.from_config(inner))
        if config.untied_words:
            self._own_rows(copy_rows=False)
        self.post_init()

    @classmethod
    def from_language_model(
        cls,
        language_model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        words: Sequence[str] | None,
        labels: Sequence[str] | None = None,
        bounds: tuple[float, float] | None = None,
        untie_words: bool = False,
        word_scoring: str = FIRST_TOKEN,
        **kwargs: Any,
    ) -> "PromptForSequenceClassification":
        """Create a classifier from a pretrained language model: masked, causal or encoder-decoder.

        Args:
            language_model: Hub id, folder, or the model itself (which is used directly, not copied).
            tokenizer: tokenizer of the model.
            template: see `parse_template`. For a causal model `*mask*` must be last: the answer follows the row.
            words: label words by label id, or the two words of a regression, the lower end first; `None` = each row
                has its own options (`option_ids`), which are scored as sequences.
            labels: label names by id; required without words.
            bounds: lower and upper end of the scale; makes it a regression.
            untie_words: give the label words separate output rows (see `untie_label_words`).
            word_scoring: "first_token", "sequence" (sum of the tokens' log probabilities) or "sequence_mean".
            kwargs: for `from_pretrained` of the language model's Auto class.

        Raises:
            InputError: words that the tokenizer does not distinguish or that have too many tokens, a template whose
                answer position the model cannot read, or a model without language-model head (or without its weights).
        """
        if isinstance(language_model, str):
            language_model = load_language_model(language_model, **kwargs)
        config = prompt_config(language_model, tokenizer, template, words, labels, bounds, untie_words, word_scoring)
        model = cls._around(language_model, config)
        if untie_words:
            model.untie_label_words()
        return model.eval()

    @classmethod
    def from_masked_lm(cls, masked_lm: str | PreTrainedModel, *args, **kwargs) -> "PromptForSequenceClassification":
        """Earlier name of `from_language_model`."""
        return cls.from_language_model(masked_lm, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *positional, **kwargs: Any) -> "PromptForSequenceClassification":
        """As for every model of transformers; from an adapter's folder, load its base model with the adapter."""
        if os.path.isdir(name) and is_adapter_without_weights(name):
            model = cls.from_adapter(name)
            model.load_adapter(os.fspath(name))
            return model
        return super().from_pretrained(name, *positional, **kwargs)

    @classmethod
    def from_adapter(cls, folder: str | os.PathLike, **kwargs: Any) -> "PromptForSequenceClassification":
        """Load the base model of a PEFT adapter that was trained on a prompt model and saved by the launcher.

        `PeftModel.from_pretrained(PromptForSequenceClassification.from_adapter(folder), folder)` is the trained model.

        Args:
            folder: folder of the adapter, with `prompt_config.json` or the prompt model's `config.json`.
            kwargs: for `from_pretrained` of the base model.

        Raises:
            InputError: the folder has neither file, or the adapter does not name its base model.
        """
        config, saved = saved_prompt(Path(folder)), PeftConfig.from_pretrained(folder)
        name, kwargs = saved.base_model_name_or_path, {"revision": saved.revision or "main", **kwargs}
        if not name:
            raise InputError(
                f"the adapter in {str(folder)!r} names no base model; create the base model with from_language_model"
            )
        if isinstance(AutoConfig.from_pretrained(name, **kwargs), PromptConfig):
            model = cls.from_pretrained(name, **kwargs)
            for part in _PROMPT_FIELDS:  # the adapter's run may have changed any of them
                setattr(model.config, part, getattr(config, part))
        else:
            model = cls._around(load_language_model(name, **{"dtype": config.dtype, **kwargs}), config)
        if config.untied_words:
            model.untie_label_words()
        return model.eval()

    @classmethod
    def _around(cls, masked_lm: PreTrainedModel, config: PromptConfig) -> "PromptForSequenceClassification":
        """Return a prompt model around `masked_lm` itself, with tied label words."""
        config = copy.deepcopy(config)
        config.untied_words, config.masked_lm = False, masked_lm.config
        config.name_or_path = masked_lm.name_or_path
        for part in ("_attn_implementation", "_experts_implementation"):  # the constructor would set its defaults
            setattr(config, part, getattr(masked_lm.config, part))
        with torch.device("meta"):  # the weights come from masked_lm
            model = cls(config)
        model._adopt(masked_lm)
        model._renew_ties()
        for name in _QUANTIZATION_ATTRIBUTES:
            if hasattr(masked_lm, name):
                setattr(model, name, getattr(masked_lm, name))
        if getattr(masked_lm, "hf_device_map", None) is not None:  # Trainer does not move a model with a device map
            model.hf_device_map = {f"masked_lm.{name}".strip("."): d for name, d in masked_lm.hf_device_map.items()}
        return model

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for experts in this class's file; the language model inside decides

    def _adopt(self, language_model: PreTrainedModel) -> None:
        self.masked_lm = language_model
        self._positions: torch.Tensor | None = None  # set during a forward pass
        self._rows_checked = False
        if not has_one_head(language_model):
            raise InputError(
                f"{type(language_model).__name__} has no linear layer over its vocabulary; pass another model"
            )
        reading, body = Reading(self.config.reading), self._body()
        if reading is Reading.MASK:
            hook = functools.partial(keep_mask_position, self.config.mask_token_id)
            body.register_forward_hook(hook, with_kwargs=True)
        elif reading is Reading.LAST:
            body.register_forward_pre_hook(add_position_ids, with_kwargs=True)
            body.register_forward_hook(self._keep_last_position, with_kwargs=True)

    def _keep_last_position(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of a causal network: reduce its last hidden state to the positions that are read."""
        hidden = output.last_hidden_state
        positions = self._positions
        if positions is None:  # the network was called directly
            ids = kwargs.get("input_ids", args[0] if args else None)
            ids = kwargs["inputs_embeds"] if ids is None else ids
            positions = last_positions(kwargs.get("attention_mask"), ids)
        output.last_hidden_state = take_positions(hidden, positions)
        return output

    def _body(self) -> nn.Module:
        """Return the network below the head; for T5, which has no such module, the whole language model."""
        if self.config.reading == Reading.LAST.value:
            return causal_network(self.masked_lm)
        return self.masked_lm.base_model

    @property
    def encoder_path(self) -> str:
        """Dotted name of the network below the head."""
        body = self._body()
        return next(name for name, module in self.named_modules() if module is body)

    @property
    def decoder_path(self) -> str:
        """Dotted name of the layer over the vocabulary, or over the label words if those are untied."""
        decoder = self.masked_lm.get_output_embeddings()
        return next(f"masked_lm.{name}" for name, module in self.masked_lm.named_modules() if module is decoder)

    def get_input_embeddings(self) -> nn.Module:
        return self.masked_lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.masked_lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.masked_lm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.masked_lm.set_output_embeddings(value)

    # --- the label words' rows -----------------------------------------------------------------------

    def untie_label_words(self) -> nn.Linear:
        """Replace the output layer by a separate one for the label words, `[words, hidden]`, and return it.

        Logits stay the same. In most models the output rows are tied to the input embeddings, so that training them
        changes how the encoder reads these words in a text. The output rows of all other words, which no class needs,
        are dropped.
        """
        if not self.config.untied_words:
            check_word_scoring(self.config.word_scoring, Reading(self.config.reading), untie_words=True)
            if self.config.reading == Reading.DECODER.value:
                raise InputError(
                    "untie_words: an encoder-decoder's head is scaled and shared with both of its embeddings; leave "
                    "it out"
                )
            self.config.untied_words = True
            # from_pretrained may share the configuration with other models
            self.config.masked_lm = self.masked_lm.config = copy.deepcopy(self.config.masked_lm)
            self.config.masked_lm.tie_word_embeddings = False
            self._own_rows(copy_rows=True)
            self._renew_ties()
        return self.masked_lm.get_output_embeddings()

    def _own_rows(self, copy_rows: bool) -> None:
        path = self.decoder_path.removeprefix("masked_lm.")
        set_word_rows(self.masked_lm, path, self.config.word_ids, copy_rows)

    def _renew_ties(self) -> None:
        self.masked_lm.all_tied_weights_keys = self.masked_lm.get_expanded_tied_weights_keys(all_submodels=False)
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    # --- forward -------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        option_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Return logits `[rows, classes]` (regression: `[rows, 1]`, in the labels' units), and the loss with labels.

        The loss is the cross-entropy over the label words. For a regression it is the Kullback-Leibler divergence of
        the two words' probabilities from the label's position on the scale; its minimum is 0.

        Args:
            input_ids: `[rows, length]`, or `[rows, contexts, length]`; for a masked language model one mask token in
                each row.
            attention_mask, token_type_ids, position_ids: of the same shape. Padding may be on either side.
            past_key_values: keys and values of prefix tuning.
            labels: `[rows]`, class ids or numbers.
            option_ids: tokens of each row's own options instead of label words, `[rows, options, longest]`, padded
                with -100.
            kwargs: for the language model.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
            **kwargs,
        }
        inputs = {key: value for key, value in inputs.items() if value is not None}
        contexts = None
        if input_ids is not None and input_ids.ndim == 3:
            contexts = input_ids.shape[1]
            inputs = {key: v.flatten(0, 1) if torch.is_tensor(v) and v.ndim == 3 else v for key, v in inputs.items()}
        inputs = padding_right(self.config, inputs)
        self._rows_checked = self._rows_checked or warn_of_other_rows(self.config, inputs)
        if self.config.word_scoring == FIRST_TOKEN:
            logits, outputs = first_token_logits(self, inputs)
        else:
            logits, outputs = sequence_logits(self, inputs, option_ids)
        if self.config.word_bias is not None:
            logits = logits - torch.tensor(self.config.word_bias, dtype=logits.dtype, device=logits.device)
        regression = self.config.problem_type == REGRESSION
        if contexts is not None:
            logits = logits.unflatten(0, (-1, contexts)).mean(1)
        loss = None
        if labels is not None:
            loss = scale_loss(logits, labels, self.config.bounds) if regression else class_loss(logits, labels)
        if regression:
            low, high = self.config.bounds
            logits = low + (high - low) * logits.softmax(-1)[:, 1:]
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        hidden, attentions = (
            outputs.get(name, outputs.get(f"decoder_{name}")) for name in ("hidden_states", "attentions")
        )
        return SequenceClassifierOutput(loss, logits, hidden, attentions)

    def trial_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what synthetic rows need besides token ids `[rows, length]`: options, if each row has its own."""
        if self.config.word_scoring == FIRST_TOKEN or self.config.words is not None:
            return {}
        return {"option_ids": ids[:, : self.config.num_labels, None]}

    @torch.no_grad()
    def calibrate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> list[float]:
        """Subtract the logits of a content-free row from all later logits, and return them (contextual calibration).

        These logits show which words the language model prefers regardless of the row.

        Args:
            input_ids: tokens of the template around an empty text, `[1, length]`, or `[1, contexts, length]` to
                average over contexts.
            attention_mask, inputs: for `forward`; without a mask there is no padding.

        Raises:
            InputError: a regression, or each row has its own options and there are no common logits to subtract.
        """
        if self.config.words is None:
            raise InputError("calibrate: each row has its own options, so there are no common logits; leave it out")
        if self.config.problem_type == REGRESSION:
            raise InputError("calibrate is for classes, but this is a regression; leave it out")
        training, self.config.word_bias = self.training, None
        self.eval()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self(input_ids=input_ids, attention_mask=mask, **inputs).logits[0]
        self.train(training)
        self.config.word_bias = logits.float().tolist()
        return self.config.word_bias


def is_prompt_model(model: nn.Module) -> bool:
    """Whether `model`, or the model that PEFT wraps, is a prompt model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return isinstance(inner, PromptForSequenceClassification)


def architecture(model: nn.Module) -> str | None:
    """Return the model type of the network; for a prompt model, that of its language model."""
    config = getattr(model, "config", None)
    return getattr(config.masked_lm if isinstance(config, PromptConfig) else config, "model_type", None)


with contextlib.suppress(ValueError):  # already registered: the module was loaded again
    AutoConfig.register(PromptConfig.model_type, PromptConfig)
    AutoModelForSequenceClassification.register(PromptConfig, PromptForSequenceClassification)
