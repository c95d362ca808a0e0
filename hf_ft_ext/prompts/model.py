"""`PromptForSequenceClassification`: a masked language model whose word at the mask is the class."""

import contextlib
import copy
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import CONFIG_NAME

from hf_ft_ext.adapters.folder import is_adapter_without_weights
from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import CLASSIFICATION, REGRESSION
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.encode import special_id
from hf_ft_ext.prompts.template import MASK
from hf_ft_ext.prompts.words import word_ids

PROMPT_FILE = "prompt_config.json"  # beside an adapter; a whole model has it all in its config.json


class PromptForSequenceClassification(PreTrainedModel):
    """A classifier made of a masked language model, a template and label words.

    Logits are the vocabulary's logits of the label words at the mask position. Only that position goes through the
    language-model head. A regression gives `low + (high - low) * p`, where `p` is the probability of the upper of its
    two words against the lower one.

    Rows of several contexts, `input_ids` of shape `[rows, contexts, length]`, give the mean of the contexts' logits.

    `from_pretrained` loads what `save_pretrained` wrote, template and words included; `from_masked_lm` makes one.

    Raises:
        InputError: the configuration is of a model without masked-LM head; in `forward`: a row has no mask, or two.

    Source: LM-BFF (Gao et al., ACL 2021, arXiv 2012.15723).
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
        check_masked_lm(config.masked_lm, config.masked_lm.name_or_path or config.masked_lm.model_type)
        if config.untied_words:
            config.masked_lm.tie_word_embeddings = False
        self._adopt(AutoModelForMaskedLM.from_config(config.masked_lm))
        if config.untied_words:
            self._own_rows(copy_rows=False)
        self.post_init()

    @classmethod
    def from_masked_lm(
        cls,
        masked_lm: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        words: Sequence[str],
        labels: Sequence[str] | None = None,
        bounds: tuple[float, float] | None = None,
        untie_words: bool = False,
        **kwargs: Any,
    ) -> "PromptForSequenceClassification":
        """Make a classifier of a pretrained masked language model.

        Args:
            masked_lm: Hub id, folder, or the model itself (which is taken over, not copied).
            tokenizer: of the model.
            template: see `parse_template`.
            words: label words by label id, or the two words of a regression, the lower end first.
            labels: label names by id.
            bounds: ends of the scale; makes it a regression.
            untie_words: give the label words output rows of their own (see `untie_label_words`).
            kwargs: for `AutoModelForMaskedLM.from_pretrained`.

        Raises:
            InputError: a label word is not one token, there is no mask token, or the model has no masked-LM head (or
                its weights file lacks it).
        """
        if isinstance(masked_lm, str):
            masked_lm = _load_masked_lm(masked_lm, **kwargs)
        if bounds is not None and len(words) != 2:
            raise InputError(f"a regression has two words, but {len(words)} were passed: {', '.join(words)}")
        config = PromptConfig(
            masked_lm=masked_lm.config,
            template=template,
            words=list(words),
            word_ids=word_ids(tokenizer, words),
            mask_token_id=special_id(tokenizer, MASK),
            bounds=None if bounds is None else list(bounds),
            pad_token_id=tokenizer.pad_token_id,
            problem_type=CLASSIFICATION if bounds is None else REGRESSION,
            id2label=dict(enumerate(labels or words)) if bounds is None else {0: "LABEL_0"},
            label2id={label: i for i, label in enumerate(labels or words)} if bounds is None else {"LABEL_0": 0},
            dtype=masked_lm.dtype,
        )
        check_masked_lm(masked_lm.config, masked_lm.name_or_path or type(masked_lm).__name__)
        model = cls._around(masked_lm, config)
        if untie_words:
            model.untie_label_words()
        return model.eval()

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *positional, **kwargs: Any) -> "PromptForSequenceClassification":
        """As for every model of transformers; of an adapter's folder: its base model with the adapter."""
        if os.path.isdir(name) and is_adapter_without_weights(name):
            model = cls.from_adapter(name)
            model.load_adapter(os.fspath(name))
            return model
        return super().from_pretrained(name, *positional, **kwargs)

    @classmethod
    def from_adapter(cls, folder: str | os.PathLike, **kwargs: Any) -> "PromptForSequenceClassification":
        """The base model of a PEFT adapter that was trained on a prompt model and saved by the launcher.

        `PeftModel.from_pretrained(PromptForSequenceClassification.from_adapter(folder), folder)` is the trained model.

        Args:
            folder: of the adapter; it holds `prompt_config.json` or the prompt model's `config.json`.
            kwargs: for `from_pretrained` of the base model.

        Raises:
            InputError: the folder has no such file, or the adapter does not name its base model.
        """
        config = _prompt_of(Path(folder))
        name = PeftConfig.from_pretrained(folder).base_model_name_or_path
        if not name:
            raise InputError(f"the adapter in {str(folder)!r} names no base model; make it with from_masked_lm")
        if isinstance(AutoConfig.from_pretrained(name, **kwargs), PromptConfig):
            model = cls.from_pretrained(name, **kwargs)
            for part in ("template", "words", "word_ids", "id2label", "label2id"):  # a run may change all of them
                setattr(model.config, part, getattr(config, part))
        else:
            model = cls._around(_load_masked_lm(name, **{"dtype": config.dtype, **kwargs}), config)
        if config.untied_words:
            model.untie_label_words()
        return model.eval()

    @classmethod
    def _around(cls, masked_lm: PreTrainedModel, config: PromptConfig) -> "PromptForSequenceClassification":
        """A model of `masked_lm` itself, its label words' rows where they are."""
        config = copy.deepcopy(config)
        config.untied_words, config.masked_lm = False, masked_lm.config
        config.name_or_path = masked_lm.name_or_path
        with torch.device("meta"):  # its weights are those of masked_lm
            model = cls(config)
        model._adopt(masked_lm)
        model._renew_ties()
        return model

    def _adopt(self, masked_lm: PreTrainedModel) -> None:
        self.masked_lm = masked_lm
        if not isinstance(masked_lm.get_output_embeddings(), nn.Linear):
            raise InputError(f"{type(masked_lm).__name__} has no linear layer over its vocabulary; pass another model")
        masked_lm.base_model.register_forward_hook(
            functools.partial(_keep_mask_position, self.config.mask_token_id), with_kwargs=True
        )

    @property
    def encoder_path(self) -> str:
        """Dotted name of the encoder in this model."""
        return f"masked_lm.{self.masked_lm.base_model_prefix}"

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
        """Make the label words' output rows a layer of their own; return it (`[words, hidden]`).

        Logits stay the same. In most models the rows are those of the input embeddings, and to change them changes
        what the encoder makes of these words where they occur in a text. The rest of the vocabulary's output rows,
        which no class needs, is dropped.
        """
        if not self.config.untied_words:
            self.config.untied_words = True
            # from_pretrained may have shared the configuration with other models
            self.config.masked_lm = self.masked_lm.config = copy.deepcopy(self.config.masked_lm)
            self.config.masked_lm.tie_word_embeddings = False
            self._own_rows(copy_rows=True)
            self._renew_ties()
        return self.masked_lm.get_output_embeddings()

    def _own_rows(self, copy_rows: bool) -> None:
        old, path = self.masked_lm.get_output_embeddings(), self.decoder_path.removeprefix("masked_lm.")
        holder = self.masked_lm.get_submodule(path.rpartition(".")[0])
        # Some heads keep the vocabulary's bias beside the layer, tied to it or added behind it.
        loose = getattr(holder, "bias", None)
        loose = loose if isinstance(loose, nn.Parameter) and loose.shape == old.weight.shape[:1] else None
        bias = old.bias if old.bias is not None else loose
        rows = self.config.word_ids
        new = nn.Linear(
            old.in_features, len(rows), bias=bias is not None, device=old.weight.device, dtype=old.weight.dtype
        )
        if copy_rows:
            with torch.no_grad():
                new.weight.copy_(old.weight[rows])
                if bias is not None:
                    new.bias.copy_(bias[rows])
        self.masked_lm.set_submodule(path, new)
        if loose is not None:
            if old.bias is None:  # it is added in the head's forward
                holder.bias, new.bias = new.bias, None
            else:
                del holder.bias

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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Logits `[rows, classes]` (regression: `[rows, 1]`, in the labels' units), and the loss if there are labels.

        The loss is the cross-entropy over the label words. A regression's is the Kullback-Leibler divergence between
        the two words' probabilities and the label's place on the scale, 0 at best.

        Args:
            input_ids: `[rows, length]`, one mask token in each row, or `[rows, contexts, length]`.
            attention_mask, token_type_ids, position_ids: of the same shape.
            past_key_values: of prefix tuning.
            labels: `[rows]`: class ids, or numbers.
            kwargs: for the masked language model.
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
        outputs = self.masked_lm(**inputs, return_dict=True)
        logits = outputs.logits[:, 0]
        if not self.config.untied_words:
            logits = logits[:, self.config.word_ids]
        regression = self.config.problem_type == REGRESSION
        if contexts is not None:
            logits = logits.unflatten(0, (-1, contexts)).mean(1)
        loss = None
        if labels is not None:
            loss = self._scale_loss(logits, labels) if regression else _class_loss(logits, labels)
        if regression:
            low, high = self.config.bounds
            logits = low + (high - low) * logits.softmax(-1)[:, 1:]
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)

    def _scale_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        low, high = self.config.bounds
        place = ((labels.float().reshape(-1) - low) / (high - low)).clamp(0, 1)
        target = torch.stack([1 - place, place], -1)
        return functional.kl_div(logits.float().log_softmax(-1), target, reduction="batchmean")


def _class_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels.reshape(-1))


def _keep_mask_position(mask_token_id: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of the encoder: its last hidden state becomes that of the mask position, `[rows, 1, hidden]`."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise InputError("a prompt model finds its mask in input_ids; pass them, not inputs_embeds")
    is_mask = ids == mask_token_id
    _check_one_mask(is_mask)
    position = is_mask.to(torch.int8).argmax(-1)
    hidden = output.last_hidden_state
    index = position[:, None, None].expand(-1, 1, hidden.shape[-1])
    output.last_hidden_state = torch.take_along_dim(hidden, index, 1)
    return output


def _check_one_mask(is_mask: torch.Tensor) -> None:
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(is_mask):
        return  # values cannot be looked at there
    count = is_mask.sum(-1)
    if bool((count != 1).any()):
        row = int((count != 1).nonzero()[0, 0])
        raise InputError(
            f"row {row} of the batch has {int(count[row])} mask tokens, but a prompt model reads one; tokenise the "
            "rows by the model's template (PromptEncoder)"
        )


def check_masked_lm(config: PreTrainedConfig, name: str) -> None:
    """Refuse a model that fills no masks.

    Raises:
        InputError: transformers has no masked-LM head for it, or it is an encoder-decoder.
    """
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        raise InputError(
            f"model {name!r} is of type {config.model_type!r}, which has no masked-LM head over its encoder; prompts "
            "need one, such as roberta-base or bert-base-uncased: pass one with --model_name_or_path"
        )


def _prompt_of(folder: Path) -> PromptConfig:
    """The prompt model's configuration beside an adapter."""
    for name in (PROMPT_FILE, CONFIG_NAME):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            if found.get("model_type") == PromptConfig.model_type:
                return PromptConfig.from_dict(found)
    raise InputError(f"{str(folder)!r} holds no {PROMPT_FILE}: it is no adapter of a prompt model; check the path")


def _load_masked_lm(name: str, **kwargs: Any) -> PreTrainedModel:
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name, **kwargs)
    check_masked_lm(config, name)
    model, info = AutoModelForMaskedLM.from_pretrained(name, config=config, output_loading_info=True, **kwargs)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing:
        raise InputError(
            f"the weights of model {name!r} have no masked-LM head ({missing[0]} is missing); pass the pretrained "
            "masked language model itself, not a classifier or sentence encoder made of it"
        )
    return model


def is_prompt_model(model: nn.Module) -> bool:
    """Whether `model`, or what PEFT wraps in it, is a prompt model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return isinstance(inner, PromptForSequenceClassification)


def architecture(model: nn.Module) -> str | None:
    """Model type of the network: of a prompt model, that of its masked language model."""
    config = getattr(model, "config", None)
    return getattr(config.masked_lm if isinstance(config, PromptConfig) else config, "model_type", None)


with contextlib.suppress(ValueError):  # registered already: the module was loaded again
    AutoConfig.register(PromptConfig.model_type, PromptConfig)
    AutoModelForSequenceClassification.register(PromptConfig, PromptForSequenceClassification)
