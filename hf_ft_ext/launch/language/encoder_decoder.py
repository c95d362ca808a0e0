"""Rows, batches, loss and first decoder tokens of encoder-decoders (`--task_type seq2seq_lm`)."""

import logging
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_ft_ext.data.preprocess import own_special_ids, without_beginning
from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.launch.language.trainers import report_long_rows
from hf_ft_ext.per_example.state import evaluating
from hf_ft_ext.training.weights.sharding import sharding

logger = logging.getLogger(__name__)


def encoder_decoder_rows(
    name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, target_limit: int | None = None
) -> Dataset:
    """Tokenise prompts (`input_ids`, `attention_mask`) and completions (`labels`), each to at most `limit` tokens.

    A longer prompt loses its beginning, as in generation, because questions come last. A longer completion loses its
    end. A language code behind it is kept, with the end token before it: mBART's decoder begins with this code.

    Args:
        name: the split, for the log.
        target_limit: of completions; `None` = `limit`.
    """
    target_limit = limit if target_limit is None else target_limit
    lengths: dict[str, list[int]] = {"prompts": [], "completions": []}
    start, _ = own_special_ids(tokenizer)
    end = own_special_ids(tokenizer, as_target=True)[1]
    kept = end if end and end[-1] != tokenizer.eos_token_id and len(end) < target_limit else []

    def convert(batch: dict[str, list]) -> dict[str, list]:
        prompts = tokenizer(batch["prompt"])["input_ids"]
        answers = tokenizer(text_target=[text.strip() for text in batch["completion"]])["input_ids"]
        lengths["prompts"].extend(map(len, prompts))
        lengths["completions"].extend(map(len, answers))
        prompts = [without_beginning(ids, limit, start) for ids in prompts]
        return {
            "input_ids": prompts,
            "attention_mask": [[1] * len(ids) for ids in prompts],
            "labels": [
                ids if len(ids) <= target_limit else [*ids[: target_limit - len(kept)], *kept] for ids in answers
            ],
        }

    made = rows.map(convert, batched=True, remove_columns=rows.column_names, keep_in_memory=True)
    report_long_rows(lengths["prompts"], limit, name, "prompts")
    report_long_rows(lengths["completions"], target_limit, name, "completions")
    return made


class EncoderDecoderCollator(DataCollatorForSeq2Seq):
    """Adds `decoder_input_ids` also for models that cannot prepare them from labels (M2M100, Blenderbot).

    transformers prepares them in the model, where the labels do not arrive if the loss is a function of its own. Its
    collator lets the model prepare them from the batch's labels, in which FSMT writes padding tokens over -100.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel):
        super().__init__(tokenizer)
        self.network = model

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        if batch.get("labels") is not None and "decoder_input_ids" not in batch:
            batch["decoder_input_ids"] = decoder_inputs(self.network, batch["labels"])
        return batch


def decoder_inputs(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return the labels one position to the right, behind the token that the model's decoder begins with."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels.clone())
    shifted = labels.new_full(labels.shape, model.config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == -100, model.config.pad_token_id)


def fit_encoder_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad on the right, and let generation begin with the tokens that labels begin with.

    Left padding moves the positions that encoders and decoders count. mBART's decoder begins with the language code.
    Where labels begin with one (mBART-50, M2M100, NLLB), generation is forced to begin with it too.

    Raises:
        InputError: the model cannot make the decoder's inputs from labels, or the tokenizer knows no target language.
    """
    tokenizer.padding_side = "right"
    codes = language_codes(tokenizer)
    if codes and tokenizer.tgt_lang is None:
        logger.warning(
            "The tokenizer has no target language, so completions get the code of the source, %s; pass --target_lang "
            "if they are in another language.", tokenizer.src_lang,
        )  # fmt: skip
    try:
        labels = tokenizer(text_target="a")["input_ids"]
    except KeyError as error:
        raise InputError(
            f"--task_type seq2seq_lm: {type(tokenizer).__name__} marks completions with the code of their language, "
            f"and none is set; pass --target_lang, one of: {_some(codes)}"
        ) from error
    try:
        first = int(decoder_inputs(model, torch.tensor([labels]))[0, 0])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--task_type seq2seq_lm: the configuration of model {model.name_or_path!r} has decoder_start_token_id="
            f"{model.config.decoder_start_token_id}, so its decoder has no first token; set decoder_start_token_id in "
            "config.json"
        ) from error
    generation = model.generation_config
    if generation.decoder_start_token_id != first:
        logger.warning(
            "Texts begin with token %d, as in training, not with decoder_start_token_id=%s of the model's "
            "configuration; pass decoder_start_token_id=%d to `generate` if you load only an adapter.", first,
            generation.decoder_start_token_id, first,
        )  # fmt: skip
        generation.decoder_start_token_id = first
    known = set(codes.values())
    forced, before = labels[0] if labels[0] in known else None, generation.forced_bos_token_id
    if forced != before and (forced is not None or before in known):
        logger.info("Texts begin with forced_bos_token_id=%s, as completions do.", forced)
        generation.forced_bos_token_id = forced


def warn_of_read_padding(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Log a warning if rows of a batch change each other's loss, as padded rows of ProphetNet and FSMT do."""
    train, evaluation = args.per_device_train_batch_size, args.per_device_eval_batch_size
    batches = [size for size, used in ((train, args.do_train), (evaluation, args.do_eval)) if used]
    if max(batches, default=1) > 1 and sharding(args) is None and _reads_padding(model):
        logger.warning(
            "%s reads the padding of shorter rows, so their losses depend on the other rows of the batch; pass "
            "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 (and --gradient_accumulation_steps) for "
            "the loss of each row alone.", type(model).__name__,
        )  # fmt: skip


def language_codes(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The language codes of a translation model's tokenizer (mBART, M2M100, NLLB) with their ids; `{}` for others."""
    if not (hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")):
        return {}
    if codes := getattr(tokenizer, "lang_code_to_id", None):
        return dict(codes)
    return {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.extra_special_tokens}


def set_languages(tokenizer: PreTrainedTokenizerBase, source: str | None, target: str | None) -> None:
    """Set the languages of prompts and completions; `None` = those that the tokenizer was saved with.

    Raises:
        InputError: the tokenizer has no language codes, or not this one.
    """
    codes = language_codes(tokenizer)
    for option, attribute, code in (("source_lang", "src_lang", source), ("target_lang", "tgt_lang", target)):
        if code is None:
            continue
        if not codes:
            raise InputError(
                f"--{option} {code}: {type(tokenizer).__name__} has no language codes; leave it out, and name the "
                "language in the prompts if the model was trained so (T5: 'translate English to German: ')"
            )
        if code not in codes:
            raise InputError(
                f"--{option} cannot be {code!r}{did_you_mean(code, codes)}; {type(tokenizer).__name__} has: "
                f"{_some(codes)}"
            )
        setattr(tokenizer, attribute, code)
        tokenizer.init_kwargs[attribute] = code  # saved with the tokenizer


def token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
    """Cross-entropy over the label tokens: the mean, or this micro-batch's share of the mean over the whole step.

    T5's own loss is the mean within each micro-batch, which gives tokens of short micro-batches more weight.
    """
    sum_of_tokens = functional.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    count = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return sum_of_tokens / count


@torch.no_grad()
def _reads_padding(model: PreTrainedModel) -> bool:
    """Whether a short row beside a longer one gets other logits than alone."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(3, 11, device=device).expand(2, -1)  # eight tokens that any vocabulary has
    real = torch.arange(8, device=device) < torch.tensor([[3], [8]], device=device)
    labels = ids.masked_fill(~real, -100)
    together = {
        "input_ids": ids.masked_fill(~real, model.config.pad_token_id),
        "attention_mask": real.long(),
        "decoder_input_ids": decoder_inputs(model, labels),
    }
    alone = {name: value[:1, :3] for name, value in together.items()}
    alone["decoder_input_ids"] = decoder_inputs(model, labels[:1, :3])
    with evaluating(model):
        first, second = (model(**batch, use_cache=False).logits[0, :3].float() for batch in (alone, together))
    tolerance = 0.1 if model.dtype.itemsize < 4 else 1e-3  # of the largest logit
    return bool((first - second).abs().max() > tolerance * first.abs().max())


def _some(codes: dict[str, int], count: int = 12) -> str:
    return ", ".join(list(codes)[:count]) + (f" and {len(codes) - count} more" if len(codes) > count else "")
