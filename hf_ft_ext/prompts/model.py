"""`PromptForSequenceClassification`: a language model whose word at one position is the class."""

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
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import CONFIG_NAME

from hf_ft_ext.adapters.folder import is_adapter_without_weights
from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import CLASSIFICATION, REGRESSION
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.encode import answer_context, answer_id
from hf_ft_ext.prompts.readout import (
    Reading,
    add_position_ids,
    has_one_head,
    last_positions,
    padded_words,
    reading_of,
    rows_with_words,
    sequence_scores,
    take_positions,
)
from hf_ft_ext.prompts.template import parse_template
from hf_ft_ext.prompts.words import FIRST_TOKEN, SEQUENCE_MEAN, WORD_SCORINGS, word_tokens

PROMPT_FILE = "prompt_config.json"  # beside an adapter; a whole model has it all in its config.json
_OF_THE_PROMPT = (
    "template", "words", "word_ids", "word_sequences", "word_scoring", "word_bias", "mask_token_id", "decoder_prefix",
    "id2label", "label2id",
)  # fmt: skip


class PromptForSequenceClassification(PreTrainedModel):
    """A classifier made of a language model, a template and label words.

    Logits are the vocabulary's logits of the label words at one position: the mask of a masked language model, the
    last token of a causal one (the word that follows is the class), the first decoder position of an encoder-decoder.
    Only that position goes through the language-model head. With `word_scoring` "sequence" a logit is the log
    probability of the whole label word, which may be several tokens; "sequence_mean" divides it by their number. A
    regression gives `low + (high - low) * p`, where `p` is the probability of the upper of its two words against the
    lower one.

    Rows of several contexts, `input_ids` of shape `[rows, contexts, length]`, give the mean of the contexts' logits.

    `from_pretrained` loads what `save_pretrained` wrote, template and words included; `from_language_model` makes one.

    Raises:
        InputError: the configuration is of a model without language-model head; in `forward`: a row has no mask, or
            two.

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
        reading = reading_of(config.masked_lm, config.masked_lm.name_or_path or config.masked_lm.model_type)
        if config.untied_words:
            config.masked_lm.tie_word_embeddings = False
        self._adopt(reading.auto_class.from_config(config.masked_lm))
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
        """Make a classifier of a pretrained language model: masked, causal, or an encoder-decoder.

        Args:
            language_model: Hub id, folder, or the model itself (which is taken over, not copied).
            tokenizer: of the model.
            template: see `parse_template`. Of a causal model `*mask*` ends it: there the answer goes.
            words: label words by label id, or the two words of a regression, the lower end first; `None` = each row
                brings its options along (`option_ids`), which are scored as sequences.
            labels: label names by id; needed without words.
            bounds: ends of the scale; makes it a regression.
            untie_words: give the label words output rows of their own (see `untie_label_words`).
            word_scoring: "first_token", "sequence" (sum of the tokens' log probabilities) or "sequence_mean".
            kwargs: for `from_pretrained` of the language model's Auto class.

        Raises:
            InputError: words that the tokenizer cannot tell apart or that are several tokens, a template without a
                place that the model can read, or a model without language-model head (or without its weights).
        """
        if isinstance(language_model, str):
            language_model = load_language_model(language_model, **kwargs)
        inner, name = language_model.config, language_model.name_or_path or type(language_model).__name__
        reading = reading_of(inner, name)
        if bounds is not None and len(words or ()) != 2:
            raise InputError(f"a regression has two words, but {len(words)} were passed: {', '.join(words)}")
        parts = parse_template(template, reading=reading.value)
        check_word_scoring(word_scoring, reading, untie_words)
        if words is None:
            if reading is Reading.MASK or not labels:
                raise InputError(
                    "without words each row brings its own options, which needs a causal language model or an "
                    "encoder-decoder, and label names; pass words"
                )
            tokens, names = None, list(labels)
            word_scoring = word_scoring if word_scoring != FIRST_TOKEN else "sequence"
        else:
            before = None if reading is Reading.MASK else answer_context(parts)
            tokens, names = word_tokens(tokenizer, words, before, word_scoring), list(labels or words)
        config = PromptConfig(
            masked_lm=inner,
            template=template,
            reading=reading.value,
            word_scoring=word_scoring,
            words=None if words is None else list(words),
            word_ids=None if tokens is None else [token[0] for token in tokens],
            word_sequences=tokens,
            mask_token_id=answer_id(tokenizer, parts, reading),
            decoder_prefix=_decoder_prefix(inner, tokenizer, parts, name) if reading is Reading.DECODER else None,
            bounds=None if bounds is None else list(bounds),
            pad_token_id=tokenizer.pad_token_id,
            problem_type=CLASSIFICATION if bounds is None else REGRESSION,
            id2label=dict(enumerate(names)) if bounds is None else {0: "LABEL_0"},
            label2id={label: i for i, label in enumerate(names)} if bounds is None else {"LABEL_0": 0},
            dtype=language_model.dtype,
        )
        model = cls._around(language_model, config)
        if untie_words:
            model.untie_label_words()
        return model.eval()

    @classmethod
    def from_masked_lm(cls, masked_lm: str | PreTrainedModel, *args, **kwargs) -> "PromptForSequenceClassification":
        """`from_language_model`, by its name of the time when prompts took masked language models only."""
        return cls.from_language_model(masked_lm, *args, **kwargs)

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
            raise InputError(f"the adapter in {str(folder)!r} names no base model; make it with from_language_model")
        if isinstance(AutoConfig.from_pretrained(name, **kwargs), PromptConfig):
            model = cls.from_pretrained(name, **kwargs)
            for part in _OF_THE_PROMPT:  # a run may change all of them
                setattr(model.config, part, getattr(config, part))
        else:
            model = cls._around(load_language_model(name, **{"dtype": config.dtype, **kwargs}), config)
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

    def _adopt(self, language_model: PreTrainedModel) -> None:
        self.masked_lm = language_model
        self._positions: torch.Tensor | None = None  # of a forward pass that scores sequences
        if not has_one_head(language_model):
            raise InputError(
                f"{type(language_model).__name__} has no linear layer over its vocabulary; pass another model"
            )
        reading, body = Reading(self.config.reading), self._body()
        if reading is Reading.MASK:
            hook = functools.partial(_keep_mask_position, self.config.mask_token_id)
            body.register_forward_hook(hook, with_kwargs=True)
        elif reading is Reading.LAST:
            body.register_forward_pre_hook(add_position_ids, with_kwargs=True)
            body.register_forward_hook(self._keep_last_position, with_kwargs=True)

    def _keep_last_position(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of a causal network: of its last hidden state those positions stay that are read."""
        hidden = output.last_hidden_state
        positions = self._positions
        if positions is None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            ids = kwargs["inputs_embeds"] if ids is None else ids
            positions = last_positions(kwargs.get("attention_mask"), ids)
        output.last_hidden_state = take_positions(hidden, positions)
        return output

    def _body(self) -> nn.Module:
        """The network below the head; of T5, which has no such module, all of the language model."""
        if self.config.reading == Reading.LAST.value:
            return self.masked_lm.get_decoder()  # OPT's head reads it past the base model around it
        return self.masked_lm.base_model

    @property
    def encoder_path(self) -> str:
        """Dotted name of the network below the head in this model."""
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
        """Make the label words' output rows a layer of their own; return it (`[words, hidden]`).

        Logits stay the same. In most models the rows are those of the input embeddings, and to change them changes
        what the encoder makes of these words where they occur in a text. The rest of the vocabulary's output rows,
        which no class needs, is dropped.
        """
        if not self.config.untied_words:
            check_word_scoring(self.config.word_scoring, Reading(self.config.reading), untie_words=True)
            if self.config.reading == Reading.DECODER.value:
                raise InputError(
                    "untie_words: an encoder-decoder's head is scaled and shared with both of its embeddings; leave "
                    "it out"
                )
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
        option_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Logits `[rows, classes]` (regression: `[rows, 1]`, in the labels' units), and the loss if there are labels.

        The loss is the cross-entropy over the label words. A regression's is the Kullback-Leibler divergence between
        the two words' probabilities and the label's place on the scale, 0 at best.

        Args:
            input_ids: `[rows, length]`, or `[rows, contexts, length]`; for a masked language model one mask token in
                each row.
            attention_mask, token_type_ids, position_ids: of the same shape. Padding may be on either side.
            past_key_values: of prefix tuning.
            labels: `[rows]`: class ids, or numbers.
            option_ids: tokens of each row's own options in place of the label words, `[rows, options, longest]`,
                filled with -100.
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
        if self.config.word_scoring == FIRST_TOKEN:
            outputs = self.masked_lm(**inputs, **self._decoder_inputs(inputs), return_dict=True)
            logits = outputs.logits
            if self.config.reading == Reading.LAST.value and logits.shape[1] > 1:  # its head goes another way
                ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
                logits = take_positions(logits, last_positions(inputs.get("attention_mask"), ids))
            logits = logits[:, -1]
            if not self.config.untied_words:
                logits = logits[:, self.config.word_ids]
        else:
            logits, outputs = self._sequence_logits(inputs, option_ids)
        if self.config.word_bias is not None:
            logits = logits - torch.tensor(self.config.word_bias, dtype=logits.dtype, device=logits.device)
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
        hidden, attentions = (
            outputs.get(name, outputs.get(f"decoder_{name}")) for name in ("hidden_states", "attentions")
        )
        return SequenceClassifierOutput(loss, logits, hidden, attentions)

    def _decoder_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a causal model or an encoder-decoder gets besides the rows."""
        if self.config.reading == Reading.MASK.value:
            return {}
        # keys and values are of no use behind the one position that is read
        own = {} if "past_key_values" in inputs or "use_cache" in inputs else {"use_cache": False}
        if self.config.reading == Reading.DECODER.value and "decoder_input_ids" not in inputs:
            first = next(value for key, value in inputs.items() if key in ("input_ids", "inputs_embeds"))
            own["decoder_input_ids"] = torch.tensor(self.config.decoder_prefix, device=first.device).expand(
                first.shape[0], -1
            )
        return own

    def _sequence_logits(self, inputs: dict[str, Any], options: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
        """Log probabilities of whole label words, or of the rows' own options: `[rows, words]`, and the outputs."""
        ids = inputs.pop("input_ids", None)
        if ids is None or "past_key_values" in inputs:
            raise InputError(
                "label words are scored as sequences behind the rows' tokens, so virtual tokens (prefix and prompt "
                "tuning) and inputs_embeds do not go with it; pass word_scoring=first_token, or use LoRA"
            )
        if options is None:
            if self.config.word_sequences is None:
                raise InputError("each row has options of its own here; pass them as option_ids")
            options = padded_words(self.config.word_sequences, ids.device)
        words = options if options.ndim == 3 else options[None].expand(ids.shape[0], -1, -1)
        if len(words) != ids.shape[0]:  # several contexts of each row
            words = words.repeat_interleave(ids.shape[0] // len(words), 0)
        mean = self.config.word_scoring == SEQUENCE_MEAN
        if self.config.reading == Reading.DECODER.value:
            outputs = self._behind_decoder_start(ids, inputs, words)
        else:
            wide_ids, wide_mask, positions = rows_with_words(ids, inputs.pop("attention_mask", None), words)
            inputs.pop("position_ids", None)  # they are counted anew, the words included
            self._positions = positions
            try:
                outputs = self.masked_lm(
                    input_ids=wide_ids, attention_mask=wide_mask, **{"use_cache": False, **inputs}, return_dict=True
                )
            finally:
                self._positions = None
            if outputs.logits.shape[1] != positions.shape[1]:
                outputs.logits = take_positions(outputs.logits, positions)
        return sequence_scores(outputs.logits[:, -words.shape[-1] :], words, mean), outputs

    def _behind_decoder_start(self, ids: torch.Tensor, inputs: dict[str, Any], words: torch.Tensor) -> Any:
        """The encoder once a row, the decoder once a word."""
        count = words.shape[1]
        mask = inputs.pop("attention_mask", None)
        encoded = self.masked_lm.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
        encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(count, 0)
        prefix = torch.tensor(self.config.decoder_prefix, device=ids.device).expand(ids.shape[0] * count, -1)
        fed = torch.cat([prefix, words.flatten(0, 1)[:, :-1].clamp(min=0)], 1)
        return self.masked_lm(
            encoder_outputs=encoded,
            attention_mask=None if mask is None else mask.repeat_interleave(count, 0),
            decoder_input_ids=fed,
            **{"use_cache": False, **inputs},
            return_dict=True,
        )

    def trial_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What made-up rows need besides token ids `[rows, length]`: options, where each row has its own."""
        if self.config.word_scoring == FIRST_TOKEN or self.config.words is not None:
            return {}
        return {"option_ids": ids[:, : self.config.num_labels, None]}

    @torch.no_grad()
    def calibrate(self, input_ids: torch.Tensor) -> list[float]:
        """Subtract from all logits those of a row without content, from now on; return them.

        A language model prefers some words whatever the row says. The logits of the template with an empty text show
        by how much (contextual calibration).

        Args:
            input_ids: of the template around an empty text, `[1, length]`.

        Raises:
            InputError: each row has options of its own, so that there is nothing common to subtract.
        """
        if self.config.words is None:
            raise InputError("calibrate: each row has options of its own, with no common preference; leave it out")
        if self.config.problem_type == REGRESSION:
            raise InputError("calibrate is about label words of classes, and this is a regression; leave it out")
        training, self.config.word_bias = self.training, None
        self.eval()
        logits = self(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[0]
        self.train(training)
        self.config.word_bias = logits.float().tolist()
        return self.config.word_bias

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


def check_word_scoring(word_scoring: str, reading: Reading, untie_words: bool) -> None:
    """Refuse a way of scoring label words that the model or another option rules out.

    Raises:
        InputError: an unknown one, or sequences with a masked language model or untied words.
    """
    if word_scoring not in WORD_SCORINGS:
        raise InputError(f"word_scoring={word_scoring!r} is unknown; choose from: {', '.join(WORD_SCORINGS)}")
    if word_scoring == FIRST_TOKEN:
        return
    if reading is Reading.MASK:
        raise InputError(
            f"word_scoring={word_scoring} reads several tokens, and a masked language model's mask is one; pass "
            "first_token, or a causal language model"
        )
    if untie_words:
        raise InputError(
            f"word_scoring={word_scoring} needs the output rows of the whole vocabulary, and untie_words keeps "
            "those of the label words; leave out one of the two"
        )


def _decoder_prefix(config: Any, tokenizer: PreTrainedTokenizerBase, parts: list, name: str) -> list[int]:
    """Decoder tokens in front of the answer: the start token, then the sentinel of the template, if it has one."""
    start = config.decoder_start_token_id
    start = getattr(config, "bos_token_id", None) if start is None else start
    if start is None:
        raise InputError(f"model {name!r} does not say with which token its decoder starts (decoder_start_token_id)")
    sentinel = answer_id(tokenizer, parts, Reading.DECODER)
    return [start] if sentinel is None else [start, sentinel]


def _prompt_of(folder: Path) -> PromptConfig:
    """The prompt model's configuration beside an adapter."""
    for name in (PROMPT_FILE, CONFIG_NAME):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            if found.get("model_type") == PromptConfig.model_type:
                return PromptConfig.from_dict(found)
    raise InputError(f"{str(folder)!r} holds no {PROMPT_FILE}: it is no adapter of a prompt model; check the path")


def load_language_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """The pretrained language model of whichever kind `name` is.

    Args:
        name: Hub id or folder.
        kwargs: for `from_pretrained`; `config` if it is loaded already.

    Raises:
        InputError: it is no language model, or its weights lack the head.
    """
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name, **kwargs)
    kind = reading_of(config, name).auto_class
    model, info = kind.from_pretrained(name, config=config, output_loading_info=True, **kwargs)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing:
        raise InputError(
            f"the weights of model {name!r} have no language-model head ({missing[0]} is missing); pass the "
            "pretrained language model itself, not a classifier or sentence encoder made of it"
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
