"""Additions to trainers of language models: perplexity, counted truncation, generated texts."""

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput

from hf_ft_ext.data.preprocess import own_special_ids, without_beginning
from hf_ft_ext.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

_NO_MARKS = (
    "--assistant_only_loss: the chat template does not mark the assistant's answers, and trl has no marked version of "
    "it; enclose them in the template by {% generation %} and {% endgeneration %} and pass it with "
    "--chat_template_path, or leave --assistant_only_loss out"
)
NO_CHAT_TEMPLATE = (
    "the data has messages, and the tokenizer has no chat template to format them; pass "
    "--chat_template_path, a tokenizer with one, or the data as prompt and completion"
)


class Perplexity(_Trainer):
    """Mixin for a `Trainer` of a language model (before it in the bases): evaluation reports the perplexity.

    It is `exp` of the mean negative log-likelihood over all label tokens, each with equal weight. (`eval_loss` is
    transformers' average of the batch means, weighted by rows, which gives tokens of short batches more weight, and
    with label smoothing it is smoothed, and trl adds the balance of a mixture's experts.) With several processes, the
    rows that pad the last batch are counted too.
    """

    _sums: torch.Tensor | None = None  # sums of losses and of tokens, float64, during an evaluation

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._sums is not None and result[0] is not None and "labels" in inputs:
            # an encoder-decoder predicts every label, a causal model all but the first
            labels = inputs["labels"] if isinstance(self, Seq2SeqTrainer) else inputs["labels"][:, 1:]
            tokens = (labels != -100).sum()
            counted = tokens.double().cpu()  # the loss is the mean over these
            if (
                isinstance(self, Seq2SeqTrainer)
                and self.args.world_size > 1
                and self.args.average_tokens_across_devices
            ):
                # transformers scales it to this process's sum * processes / tokens of all processes; trl does not
                counted = self.accelerator.gather(tokens).sum().cpu().double() / self.args.world_size
            if tokens:
                plain = not (self.label_smoother or getattr(self, "aux_loss_enabled", False))
                loss = result[0] if plain else self._likelihood_loss(model, inputs, ignore_keys)
                self._sums += torch.stack([loss.detach().double().cpu() * counted, tokens.double().cpu()])
        return result

    def _likelihood_loss(self, model: Any, inputs: dict[str, Any], ignore_keys: Any) -> torch.Tensor:
        """The batch's mean negative log-likelihood, without smoothing and trl's loss of routers: a second forward."""
        before = {name: getattr(self, name) for name in ("label_smoother", "aux_loss_enabled") if hasattr(self, name)}
        try:
            self.label_smoother, self.aux_loss_enabled = None, False
            inputs = {name: value for name, value in inputs.items() if name != "output_router_logits"}
            return super().prediction_step(model, inputs, True, ignore_keys)[0]
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._sums = torch.zeros(2, dtype=torch.float64)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            loss, tokens = torch.tensor(gather_object([self._sums.tolist()]), dtype=torch.float64).sum(0).tolist()
        finally:
            self._sums = None
        if tokens:
            mean = loss / tokens
            # NaN stays NaN
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.inf if mean >= 700 else math.exp(mean)
        return output


class CountedTruncation(_Trainer):
    """Mixin for trl's `SFTTrainer` (before it in the bases) that logs how many rows are cut to `max_length`.

    trl prepares the rows of an evaluation at the start, and again whenever `evaluate` is given them. Here rows that
    were prepared are found again.
    """

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        known = self.__dict__.setdefault("_prepared_rows", {})  # trl's constructor prepares rows
        options = dataset_name, packing, args.max_length
        if options not in known or known[options][0] is not dataset:
            found = self._prepare_anew(dataset, processing_class, args, packing, formatting_func, dataset_name)
            known[options] = dataset, found
        return known[options][1]

    def _prepare_anew(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if args.max_length is not None and not packing and isinstance(dataset, Dataset):
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
            report_long_rows([len(ids) for ids in dataset["input_ids"]], args.max_length, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if isinstance(dataset, Dataset) and not len(prepared):
            raise InputError(
                f"max_seq_length={args.max_length}: no row of the {dataset_name} data has a token of its completion "
                "left; pass a higher --max_seq_length, or shorten the prompts"
            )
        if isinstance(dataset, Dataset) and not packing and len(prepared) < len(dataset):
            logger.warning(
                "%d of %d rows of the %s data are left out: their prompts alone fill max_seq_length=%d.",
                len(dataset) - len(prepared), len(dataset), dataset_name, args.max_length,
            )  # fmt: skip
        return prepared


def report_long_rows(lengths: Sequence[int], limit: int, name: str, what: str = "rows") -> int:
    """Count rows, prompts or completions beyond `limit` tokens, log how many there are, and return the number."""
    longer = sum(length > limit for length in lengths)
    if longer:
        logger.warning(
            "%d of %d %s of the %s data are longer than %d tokens (the longest has %d) and are cut; pass a higher "
            "--max_seq_length to keep them whole.",
            longer, len(lengths), what, name, limit, max(lengths),
        )  # fmt: skip
    return longer


@dataclass(frozen=True)
class Generation:
    """How texts are generated: greedily or by beam search.

    Attributes:
        max_new_tokens: maximum tokens of a text.
        num_beams: 1 = greedy.
        batch_size: rows per batch.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    batch_size: int = 8


def room_for_prompts(
    context: int | None, max_new_tokens: int, shared: bool, decoder_positions: int | None = None
) -> int | None:
    """Maximum tokens of a prompt; `None` = no limit known.

    Args:
        context: positions of the model.
        shared: whether prompt and generated text share them, as in a causal model.
        decoder_positions: positions of an encoder-decoder's decoder.

    Raises:
        InputError: no position is left for a prompt, or the decoder has too few for the text.
    """
    if decoder_positions is not None and max_new_tokens > decoder_positions:
        raise InputError(
            f"max_new_tokens={max_new_tokens} is more than the {decoder_positions} positions of the model's decoder; "
            f"pass --max_new_tokens {decoder_positions} or less"
        )
    if context is None:
        return None
    room = context - (max_new_tokens if shared else 0)
    if room < 1:
        raise InputError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's {context} positions; pass "
            f"--max_new_tokens {context // 2}"
        )
    return room


@torch.no_grad()
def generate_texts(
    trainer: Any,
    prompts: Sequence[Any],
    settings: Generation,
    context: int | None = None,
    template_values: Sequence[dict[str, Any]] | None = None,
) -> list[str]:
    """Generate a text for each prompt; the processes share the work, and each gets all texts.

    Args:
        prompts: texts, or lists of messages.
        context: positions of the model; a longer prompt loses its beginning, except for a start token.
        template_values: what each prompt of messages passes to the chat template besides, such as `tools`.

    Raises:
        InputError: no room for a prompt, no padding token, or messages without a chat template.
    """
    tokenizer: PreTrainedTokenizerBase = trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    if tokenizer.pad_token is None:
        raise InputError("generation pads prompts to one length, and the tokenizer has no padding token; set one")
    both = getattr(model.config, "is_encoder_decoder", False)
    room = room_for_prompts(context, settings.max_new_tokens, shared=not both)
    start, end = own_special_ids(tokenizer)
    values = template_values or [{}] * len(prompts)
    rows = [prompt_ids(tokenizer, prompt, own) for prompt, own in zip(prompts, values, strict=True)]
    if end and not both:  # a causal model would continue after the end token; chat templates add none
        rows = [ids[: -len(end)] if isinstance(p, str) else ids for ids, p in zip(rows, prompts, strict=True)]
    if room is not None:
        longer = sum(len(ids) > room for ids in rows)
        if longer:
            logger.warning(
                "%d of %d prompts lose their beginning: %d tokens are left for them.", longer, len(rows), room
            )
        rows = [without_beginning(ids, room, start) for ids in rows]
    rank, world = trainer.args.process_index, trainer.args.world_size
    mine = range(rank, len(rows), world)
    training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "right" if both else "left"
    found: list[tuple[int, str]] = []

    def padded(indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return tokenizer.pad({"input_ids": [rows[i] for i in indices]}, return_tensors="pt").to(trainer.args.device)

    try:
        starts = range(0, len(mine), settings.batch_size)
        parts: list[Sequence[int]] = [mine[first : first + settings.batch_size] for first in starts]
        short, long = (choose(mine, key=lambda i: len(rows[i]), default=0) for choose in (min, max))
        unequal = len(mine) > 1 and len(rows[short]) < len(rows[long])
        cached = {}
        if unequal and _changes_a_row(model, padded([short]), padded([short, long]), tokens=1):
            logger.warning(
                "%s reads the padding of shorter prompts, so prompts are generated in batches of equal length, which "
                "takes longer.", type(model).__name__,
            )  # fmt: skip
            parts = list(_of_equal_length(mine, rows, settings.batch_size))
        if (
            getattr(model, "_is_stateful", True)
            and not both
            and len(mine)
            and max(min(len(mine), settings.batch_size), settings.num_beams) > 1
            and _changes_a_row(model, padded([short]), padded([short, short]), tokens=2)
        ):
            logger.warning(
                "%s mixes the rows of a batch in its cache, so %s, which takes longer.", type(model).__name__,
                "prompts are generated one by one" if settings.num_beams == 1 else "beams are searched without it",
            )  # fmt: skip
            if settings.num_beams == 1:
                parts = [[i] for i in mine]
            else:
                cached = {"use_cache": False}
        for indices in parts:
            batch = padded(indices)
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=settings.max_new_tokens,
                num_beams=settings.num_beams,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                **cached,
            )
            new = ids[:, _tokens_before_text(model, ids) if both else batch["input_ids"].shape[1] :]
            found += zip(indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
    finally:
        tokenizer.padding_side = side
        model.train(training)
    texts = dict(gather_object(found))
    return [texts[i].strip() for i in range(len(rows))]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, template_values: dict[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt.

    Args:
        prompt: a text, or messages.
        template_values: what messages pass to the chat template besides, such as `tools`.

    Raises:
        InputError: the prompt consists of messages, and there is no chat template that accepts them.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise InputError(NO_CHAT_TEMPLATE)
    if not prompt:
        raise InputError(
            "a row of messages holds only an answer, so there is no prompt to continue; put the user's message in "
            "front, or remove the row"
        )
    with template_errors():
        made = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, **(template_values or {})
        )
        return list(made["input_ids"])


@contextlib.contextmanager
def template_errors() -> Iterator[None]:
    """Turn an error of a chat template, of its marks, or one it raises about a dialogue, into an `InputError`."""
    try:
        yield
    except TemplateError as error:
        raise InputError(
            f"the chat template rejects this data: {first_line(error)}; change the messages, or pass another "
            "one (--chat_template_path)"
        ) from error
    except (ValueError, RuntimeError) as error:  # trl's
        if "not training-compatible" in str(error):
            raise InputError(_NO_MARKS) from error
        if "no assistant tokens" in str(error):
            raise InputError(
                "--assistant_only_loss: the chat template marks no token of the assistant in some row; enclose all of "
                "its answers by {% generation %} and {% endgeneration %}, or leave --assistant_only_loss out"
            ) from error
        raise


def _tokens_before_text(model: Any, ids: torch.Tensor) -> int:
    """Number of tokens that an encoder-decoder writes before the text: the start token, and a forced first one.

    M2M100's language codes, which are forced, need not be special tokens of its tokenizer.
    """
    forced = model.generation_config.forced_bos_token_id
    return 2 if forced is not None and ids.shape[1] > 1 and bool((ids[:, 1] == forced).all()) else 1


def _changes_a_row(model: Any, alone: dict[str, torch.Tensor], beside: dict[str, torch.Tensor], tokens: int) -> bool:
    """Whether the row in `alone` gets other logits as the first row of `beside`.

    The first new token's logits show whether padding is read, as in RWKV, which ignores the attention mask. The second
    one's, `tokens=2`, come from the cache, whose rows transformers' RWKV mixes in a batch.
    """
    found = []
    for batch in (alone, beside):
        made = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        found.append((made.sequences[0, -tokens:-1].tolist(), made.logits[-1][0].float()))
    (before, first), (others, second) = found
    tolerance = 0.1 if model.dtype.itemsize < 4 else 1e-2  # of the largest logit; what is read moves all
    return before == others and bool((first - second).abs().max() > tolerance * first.abs().max())


def _of_equal_length(indices: Sequence[int], rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i in indices:
        groups.setdefault(len(rows[i]), []).append(i)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
