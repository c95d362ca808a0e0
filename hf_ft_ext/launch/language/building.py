"""`--task_type causal_lm` and `seq2seq_lm`: building data, model and trainer, and generating texts.

trl's `SFTTrainer` does data preparation, packing and the loss of causal models; for encoder-decoders it is
transformers' `Seq2SeqTrainer`. The trainer of a run derives from the method's trainer and one of these.
"""

import copy
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hf_ft_ext.arguments import (
    CAUSAL_LM,
    FINETUNE,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    DataArguments,
    MethodTrainingArguments,
    ModelArguments,
    RunArguments,
)
from hf_ft_ext.data.language import (
    Form,
    LanguageData,
    load_language_data,
    prompt_and_references,
    template_values,
)
from hf_ft_ext.errors import InputError
from hf_ft_ext.files import write_text
from hf_ft_ext.launch.language.encoder_decoder import (
    EncoderDecoderCollator,
    encoder_decoder_rows,
    fit_encoder_decoder,
    set_languages,
    token_loss,
    warn_of_read_padding,
)
from hf_ft_ext.launch.language.trainers import (
    NO_CHAT_TEMPLATE,
    CountedTruncation,
    Generation,
    Perplexity,
    generate_texts,
    prompt_ids,
    room_for_prompts,
    template_errors,
)
from hf_ft_ext.launch.search import require_optuna
from hf_ft_ext.launch.trainers import (
    check_model_placement,
    check_trainer,
    run_callbacks,
    trainer_class_for,
    trainer_errors_as_input_errors,
)
from hf_ft_ext.launch.validation import check_splits
from hf_ft_ext.metrics.generation import generation_metrics
from hf_ft_ext.models import decoder_max_length, load_tokenizer_and_language_model, model_max_length
from hf_ft_ext.training.saved.resumed_arguments import compared_arguments

logger = logging.getLogger(__name__)

_LENGTH = 1024  # trl's default
SAMPLE = 5  # generated texts in run.json
_CLASSES_ONLY = ("linearhead", "kernel")
_LANGUAGES = ("source_lang", "target_lang")
_LM_OPTIONS = (
    "packing", "completion_only_loss", "assistant_only_loss", "chat_template_path", "predict_with_generate",
    "max_new_tokens", "num_beams", *_LANGUAGES,
)  # fmt: skip


def check_language_options(run_args: RunArguments) -> None:
    """Refuse options of language modelling for classification, and options of classification for language models.

    Raises:
        InputError: there is such an option, the method cannot train language models, or trl is not installed.
    """
    given = run_args.given
    if run_args.task_type == SEQUENCE_CLASSIFICATION:
        for name in _LM_OPTIONS:
            if name in given:
                task = SEQ2SEQ_LM if name in _LANGUAGES else CAUSAL_LM
                raise InputError(
                    f"--{name} {given[name]} is about language modelling; pass --task_type {task} too, or leave it out"
                )
        return
    if run_args.method in _CLASSES_ONLY:
        raise InputError(
            f"--task_type {run_args.task_type}: method {run_args.method} solves for class scores, and a language "
            "model writes text; pass --method full, lora, sparse, gradientless or fisher, or --few_shot_type prompt "
            "to choose classes"
        )
    refused = {
        "from_linearhead": "fits a classification head",
        "prediction_probabilities": "is about classes",
        "l2_loss": "is a loss of class scores",
    }
    for name, reason in refused.items():
        if given.get(name):
            raise InputError(f"--{name} {reason}; leave it out, or --task_type {run_args.task_type}")
    if given.get("few_shot_type", FINETUNE) != FINETUNE:
        raise InputError("--few_shot_type prompt predicts classes by words; leave it out, or --task_type")
    causal = run_args.task_type == CAUSAL_LM
    if not causal and given.get("packing"):
        raise InputError("--packing: an encoder-decoder's rows cannot share a sequence; leave it out")
    if not causal and given.get("label_smoothing_factor"):  # `token_loss` replaces transformers' smoothed loss
        smoothing = given["label_smoothing_factor"]
        raise InputError(f"--label_smoothing_factor {smoothing} is not supported by seq2seq_lm; leave it out")
    for name in _LANGUAGES if causal else ():
        if given.get(name) is not None:
            raise InputError(
                f"--{name} {given[name]} sets language codes, which only encoder-decoders have; leave it out"
            )
    for name in () if causal else ("completion_only_loss", "assistant_only_loss", "chat_template_path"):
        if given.get(name) is not None:
            raise InputError(f"--{name} is for --task_type causal_lm: seq2seq_lm writes the completion alone")
    if causal and importlib.util.find_spec("trl") is None:
        raise InputError('--task_type causal_lm needs trl: pip install "hf_ft_ext[trl]"')


def load(
    run_args: RunArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MethodTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Any, LanguageData]:
    """Load and check data and model; see `launch.building.load`.

    Raises:
        InputError: something that the user passed cannot work.
    """
    if run_args.hp_search:
        require_optuna()
    check_numbers(data_args)
    with args.main_process_first(desc="loading data"):  # downloads happen once
        data = load_language_data(
            data_args, cache_dir=model_args.cache_dir, token=model_args.token, data_seed=args.data_seed
        )
    check_splits(run_args, args, data)
    _choose_best_metric(run_args, args)
    writes, causal = data_args.predict_with_generate or args.do_predict, run_args.task_type == CAUSAL_LM
    _check_form(data, data_args, writes, causal)
    tokenizer, model = load_tokenizer_and_language_model(model_args, run_args.task_type, args=args)
    _check_chat_template(data, tokenizer, data_args)
    kind = trainer_class_for(run_args.method, model, args)
    check_model_placement(model, args, kind, bool(run_args.hp_search))
    context = model_max_length(model, tokenizer)
    length = _length(data_args, context)
    decoder_length = None if causal else decoder_max_length(model)
    if writes:
        room_for_prompts(context, data_args.max_new_tokens, causal, decoder_length)
    if causal:
        _check_end_token(tokenizer, data)
        train, evaluated = data.train, next(iter(data.validation.values()), None)
    else:
        set_languages(tokenizer, data_args.source_lang, data_args.target_lang)
        fit_encoder_decoder(model, tokenizer)
        warn_of_read_padding(model, args)
        limits = length, min(length, decoder_length or length)
        train = None if data.train is None else encoder_decoder_rows("train", data.train, tokenizer, *limits)
        data.tokenized = {n: encoder_decoder_rows(n, rows, tokenizer, *limits) for n, rows in data.validation.items()}
        evaluated = next(iter(data.tokenized.values()), None)
    trainer_class = _trainer_class(kind, causal)

    def build(args: MethodTrainingArguments) -> Trainer:
        rows = train if args.do_train else evaluated if causal else None
        if rows is None and causal:  # trl requires training rows even without training
            rows = Dataset.from_dict({key: [[tokenizer.pad_token_id] * 2] for key in ("input_ids", "labels")})
        if causal:
            _set_trl_arguments(args, data_args, length)
        with trainer_errors_as_input_errors(args), template_errors():
            trainer = trainer_class(
                model=copy.deepcopy(model) if run_args.hp_search else model,  # each trial needs its own
                args=args,
                train_dataset=rows,
                eval_dataset=evaluated,
                processing_class=tokenizer,
                data_collator=None if causal else EncoderDecoderCollator(tokenizer, model),
                compute_loss_func=None if causal else token_loss,
                callbacks=run_callbacks(run_args, args, callbacks),
            )
        trainer.language = LanguageRun(data, data_args, context)
        _check_prompts(data, trainer.processing_class, args, data_args)
        trainer.launcher_settings = compared_arguments(run_args, model_args, data_args)
        return check_trainer(trainer, run_args.method)

    return build, data


def _check_form(data: LanguageData, data_args: DataArguments, writes: bool, causal: bool) -> None:
    """Raise an `InputError` for rows that cannot be continued if `writes`, or that an encoder-decoder cannot take."""
    if writes and data.form is Form.TEXT:
        option = "predict_with_generate" if data_args.predict_with_generate else "do_predict"
        raise InputError(
            f"--{option} continues a prompt, and rows of text have none; pass data with prompt and completion, or "
            "messages"
        )
    if not causal and (data.form is not Form.PROMPT or _is_chat(data)):
        raise InputError(
            "--task_type seq2seq_lm writes a completion to a prompt, both texts, and the data has "
            f"{Form.MESSAGES if _is_chat(data) else data.form}; pass columns prompt and completion (--text_columns), "
            "or --task_type causal_lm"
        )


def _check_end_token(tokenizer: PreTrainedTokenizerBase, data: LanguageData) -> None:
    if tokenizer.eos_token is None and not _is_chat(data):
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token, which ends each row of {data.form}; set "
            "eos_token in its tokenizer_config.json, or pass another tokenizer (--tokenizer_name)"
        )


def _trainer_class(method: type[Trainer], causal: bool) -> Any:
    """The method's trainer, which prepares rows and computes losses as trl's or transformers' one for texts does."""
    if not causal:
        return type(f"{method.__name__}AndSeq2SeqTrainer", (Perplexity, method, Seq2SeqTrainer), {})
    from trl import SFTTrainer

    return type(f"{method.__name__}AndSFTTrainer", (Perplexity, method, CountedTruncation, SFTTrainer), {})


def _set_trl_arguments(args: MethodTrainingArguments, data_args: DataArguments, length: int) -> None:
    """Set the attributes that `MethodTrainer._complete` takes over into trl's arguments."""
    for name in ("packing", "completion_only_loss", "assistant_only_loss"):
        setattr(args, name, getattr(data_args, name))
    template = data_args.chat_template_path
    args.max_length, args.eval_packing = length, False
    args.chat_template_path = template and os.path.expanduser(template)


class LanguageRun:
    """Evaluation and output of a language-model run besides losses: generated texts and their scores.

    Attributes:
        sample: a few generated texts of the last split: `prompt`, `prediction`, `references`.
    """

    def __init__(self, data: LanguageData, data_args: DataArguments, context: int | None):
        self.data, self.data_args, self.context = data, data_args, context
        self.sample: list[dict[str, Any]] = []

    def rows_of_loss(self, name: str, rows: Dataset) -> Dataset:
        """The rows that `Trainer.evaluate` takes for the split `name`: tokenised ones, or plain ones for trl."""
        return self.data.tokenized.get(name, rows)

    def scored_texts(self, trainer: Trainer, rows: Dataset, prefix: str) -> tuple[list[dict], dict[str, float]]:
        """Generated texts of a split, and their scores where every row has a reference."""
        pairs = [prompt_and_references(row, self.data.form) for row in rows]
        settings = Generation(
            self.data_args.max_new_tokens, self.data_args.num_beams, trainer.args.per_device_eval_batch_size
        )
        values = [template_values(row) for row in rows]
        texts = generate_texts(trainer, [prompt for prompt, _ in pairs], settings, self.context, values)
        found = [
            {"prompt": prompt, "prediction": text, "references": references}
            for (prompt, references), text in zip(pairs, texts, strict=True)
        ]
        self.sample = found[:SAMPLE]
        if not all(references for _, references in pairs):
            return found, {}
        scores = generation_metrics(texts, [references for _, references in pairs])
        return found, {f"{prefix}_{name}": value for name, value in scores.items()}


def write_predictions(folder: str, suffix: str, found: list[dict[str, Any]]) -> None:
    """Write `predictions.jsonl`: one JSON object per row with `index`, `prompt`, `prediction` and `references`."""
    lines = [json.dumps({"index": i, **row}, ensure_ascii=False) for i, row in enumerate(found)]
    file = "_".join(filter(None, ("predictions", suffix))) + ".jsonl"
    write_text(os.path.join(folder, file), "\n".join(lines) + "\n")


def check_numbers(data_args: DataArguments) -> None:
    for name in ("max_new_tokens", "num_beams"):
        if getattr(data_args, name) < 1:
            raise InputError(f"{name} must be 1 or more, got {getattr(data_args, name)}")


def loading_class(model: PreTrainedModel) -> str:
    """The Auto class that loads a saved language model."""
    return "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"


def _is_chat(data: LanguageData) -> bool:
    """Whether rows are messages, or prompts and completions of messages."""
    rows = data.train if data.train is not None else next(iter({**data.validation, **data.test}.values()))
    return data.form is Form.MESSAGES or (data.form is Form.PROMPT and not isinstance(rows[0]["prompt"], str))


def _check_chat_template(data: LanguageData, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> None:
    chat = _is_chat(data)
    if data_args.completion_only_loss and data.form is not Form.PROMPT:
        other = "; --assistant_only_loss trains the assistant's answers alone" if data.form is Form.MESSAGES else ""
        raise InputError(
            f"--completion_only_loss is about prompts and completions, and the data has {data.form}: all tokens "
            f"train; leave it out{other}"
        )
    if chat and tokenizer.chat_template is None and data_args.chat_template_path is None:
        raise InputError(NO_CHAT_TEMPLATE)
    if data_args.assistant_only_loss:
        _check_assistant_rows(data, tokenizer, chat)
    path = data_args.chat_template_path
    if path is not None and not chat:
        raise InputError(f"--chat_template_path {path} is about messages, and the data has {data.form}; leave it out")
    if path is not None and not os.path.exists(os.path.expanduser(path)):
        raise InputError(f"--chat_template_path {path}: there is no such file or folder; check the path")
    if path is not None and os.path.isfile(os.path.expanduser(path)) and not path.endswith((".jinja", ".j2")):
        raise InputError(f"--chat_template_path {path}: trl reads files named .jinja or .j2; rename it")


def _check_assistant_rows(data: LanguageData, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    if not chat:
        raise InputError(
            f"--assistant_only_loss is about the answers in messages, and the data has {data.form}; leave it out "
            "(with prompt and completion the loss is over the completion anyway)"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"--assistant_only_loss: {type(tokenizer).__name__} is written in Python and cannot tell which tokens the "
            "marks of the chat template enclose; pass a fast tokenizer (--tokenizer_name), or leave it out"
        )
    column = "messages" if data.form is Form.MESSAGES else "completion"
    splits = {"train": data.train, **data.validation}
    for name, rows in splits.items():
        for number, messages in enumerate(() if rows is None else rows[column]):
            if not any(message["role"] == "assistant" for message in messages):
                raise InputError(
                    f"--assistant_only_loss: row {number} of split '{name}' has no message of the assistant, so "
                    "nothing in it is trained; remove the row, or leave --assistant_only_loss out"
                )


def _check_prompts(
    data: LanguageData, tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DataArguments
) -> None:
    """Apply the chat template, before training, to all dialogues that the run will continue."""
    evaluated = data.validation if data_args.predict_with_generate else {}
    predicted = data.test if args.do_predict else {}
    for rows in (*evaluated.values(), *predicted.values()) if _is_chat(data) else ():
        for row in rows:
            prompt_ids(tokenizer, prompt_and_references(row, data.form)[0], template_values(row))


def _length(data_args: DataArguments, context: int | None) -> int:
    wanted = data_args.max_seq_length
    if wanted is None:
        return _LENGTH if context is None else min(_LENGTH, context)
    if wanted < 2:
        raise InputError(f"max_seq_length must be 2 or more for a language model, got {wanted}")
    if context is not None and wanted > context:
        raise InputError(
            f"--max_seq_length {wanted} is more than the model can take ({context} tokens); pass --max_seq_length "
            f"{context} or less"
        )
    return wanted


def _choose_best_metric(run_args: RunArguments, args: MethodTrainingArguments) -> None:
    """Set the metric that chooses the best model: loss or perplexity, where lower is better."""
    chosen = run_args.given.get("metric_for_best_model")
    if chosen is not None and chosen.removeprefix("eval_") not in ("loss", "perplexity"):
        raise InputError(
            f"metric_for_best_model cannot be {chosen!r}; a language model has: loss, perplexity (texts are generated "
            "after training only)"
        )
    compares = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST or run_args.hp_search
    if compares or chosen is not None:
        args.metric_for_best_model = chosen or "loss"
        if "greater_is_better" not in run_args.given:
            args.greater_is_better = False
