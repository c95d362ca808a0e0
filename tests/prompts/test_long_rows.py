"""Rows longer than `max_seq_length` are counted and logged; the place of the answer and the options stay whole."""

import logging

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from decoders import TOKENIZER_OF, decoder, subword_tokenizer
from prompt_models import masked_lm
from tiny import tiny_tokenizer

from hf_ft_ext import PromptEncoder, PromptForSequenceClassification
from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.data.tasks import TASKS, Task
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.collator import ContextCollator
from hf_ft_ext.prompts.preprocess import tokenize_prompts
from hf_ft_ext.prompts.templates.defaults import DECODER_PROMPTS

LOGGER = PromptEncoder.__module__
TEMPLATE = "*cls**sent_0*_it_was*mask*"
SHORT, LONG = "a film", "a great film and the plot was dull and very bad and the cast was great " * 4
FAMILIES = {"bert": "masked", "llama": "llama", "gpt2": "byte-level", "t5": "unigram", "opt": "bytes"}


def messages_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def model_of(family, words=("bad", "great"), scoring="first_token", template=TEMPLATE):
    if family == "bert":
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = 10**30
        return PromptForSequenceClassification.from_language_model(
            masked_lm(), tokenizer, f"{template}.*sep+*", list(words), ["no", "yes"]
        ), tokenizer
    tokenizer = subword_tokenizer(FAMILIES[family])
    tokenizer.model_max_length = 10**30
    scoring = "sequence" if family == "opt" else scoring  # bytes: both words begin with a space
    labels = ["no", "yes"]
    network = decoder(family, len(tokenizer), **({} if family == "t5" else {"max_position_embeddings": 512}))
    made = PromptForSequenceClassification.from_language_model(
        network, tokenizer, template, words and list(words), labels, word_scoring=scoring
    )
    return made, tokenizer


def data_of(texts, more=None, task=None, names=("no", "yes")):
    columns = {"sentence": texts, **(more or {})}
    features = Features({**dict.fromkeys(columns, Value("string")), "label": ClassLabel(names=list(names))})
    rows = Dataset.from_dict({**columns, "label": [i % 2 for i in range(len(texts))]}, features=features)
    task = task or Task("own", (tuple(columns),), tuple(names))
    return TaskData(task, rows, {"dev": rows}, {}, list(names), task.problem_type, "accuracy", tuple(columns))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [False, True])
def test_cut_rows_are_counted_and_keep_the_place_of_the_answer(family, head, caplog):
    model, tokenizer = model_of(family)
    args = DataArguments(few_shot_type="prompt", max_seq_length=30, truncate_head=head)
    (whole,) = PromptEncoder(tokenizer, model.config.template, 1, 1000, reading=model.config.reading)([[LONG]])[
        "input_ids"
    ]
    with caplog.at_level(logging.WARNING, LOGGER):
        caplog.clear()
        rows = tokenize_prompts(data_of([SHORT, LONG, SHORT, LONG]), tokenizer, args, model.config).train["input_ids"]
    lost, room = "beginning" if head else "end", 25 if family == "opt" else 30  # the words take 6 tokens
    assert messages_of(caplog) == [
        f"2 of 4 rows of the {name} data are longer than {room} tokens with the template (the longest has "
        f"{len(whole)}): their texts lose their {lost}. Pass a higher --max_seq_length to keep them whole."
        for name in ("train", "dev")
    ]
    short, long = rows[0], rows[1]
    assert len(short) < room and len(long) == room
    answer = 5 if family == "bert" else 2  # tokens of the template's end at least
    assert long[-answer:] == short[-answer:] == whole[-answer:]
    if family == "bert":
        assert long.count(tokenizer.mask_token_id) == 1


def test_rows_that_fit_are_not_mentioned(caplog):
    model, tokenizer = model_of("gpt2")
    with caplog.at_level(logging.WARNING, LOGGER):
        tokenize_prompts(data_of([SHORT] * 3), tokenizer, DataArguments(max_seq_length=30), model.config)
    assert not messages_of(caplog)


def test_limits_on_texts_are_counted(caplog):
    model, tokenizer = model_of("gpt2")
    args = DataArguments(max_seq_length=200, first_sent_limit=5)
    with caplog.at_level(logging.WARNING, LOGGER):
        tokenize_prompts(data_of([SHORT, LONG, LONG]), tokenizer, args, model.config)
    message = "2 of 3 rows of the train data have a text beyond first_sent_limit=5, which loses its end."
    assert messages_of(caplog)[0] == message


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_beside_demonstrations_are_counted_once(family, caplog):
    model, tokenizer = model_of(family)
    texts = [SHORT, SHORT, SHORT, SHORT, LONG * 2]
    args = DataArguments(few_shot_type="prompt-demo", num_sample=3, max_seq_length=90, other_sent_limit=12, num_demo=1)
    with caplog.at_level(logging.WARNING, LOGGER):
        rows = tokenize_prompts(data_of(texts), tokenizer, args, model.config).validation["dev"]["input_ids"]
    assert all(len(context) <= 90 for row in rows for context in row)
    messages = messages_of(caplog)
    assert messages[0].startswith("1 of 5 rows of the demonstration data have a text beyond other_sent_limit=12")
    assert messages[1].startswith("1 of 5 rows of the train data are longer than")
    assert messages[2].startswith("1 of 5 rows of the dev data are longer than")
    assert len(messages) == 3


def test_a_stream_is_counted_in_doubling_numbers(caplog):
    model, tokenizer = model_of("gpt2")
    data = data_of([SHORT] * 255 + [LONG] * 600)
    data.train = data.train.to_iterable_dataset()
    with caplog.at_level(logging.WARNING, LOGGER):
        rows = tokenize_prompts(data, tokenizer, DataArguments(max_seq_length=30), model.config).train
        caplog.clear()
        assert max(len(row["input_ids"]) for row in rows) == 30
    counts = [message.partition(" are longer")[0] for message in messages_of(caplog)]
    assert counts == [
        "1 of 256 rows so far of the train data", "257 of 512 rows so far of the train data",
        "600 of 855 rows so far of the train data",
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_words_scored_as_sequences_stay_within_the_models_positions(family):
    model, tokenizer = model_of(family, ("not the ending", "brilliant film"), "sequence")
    longest = max(map(len, model.config.word_sequences))
    rows = tokenize_prompts(data_of([LONG]), tokenizer, DataArguments(max_seq_length=60), model.config).train
    assert len(rows[0]["input_ids"]) == 60 - (longest - 1)


COPA = Task("copa", (("sentence", "first", "second"),), ("no", "yes"), options=("first", "second"))


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5"])
@torch.no_grad()
def test_a_rows_options_take_room_of_that_row_alone_and_stay_whole(family):
    model, tokenizer = model_of(family, None, template="*cls**sent_0**mask*")
    first, second = ["a great film"] * 2, ["no", "and the plot was dull and very bad"]
    data = data_of([LONG] * 2, {"first": first, "second": second}, COPA)
    rows = tokenize_prompts(data, tokenizer, DataArguments(max_seq_length=60), model.config).train
    for row, options in zip(rows, zip(first, second, strict=True), strict=True):
        kept = [[i for i in ids if i != -100] for ids in row["option_ids"]]
        assert [tokenizer.decode(ids).strip() for ids in kept] == list(options)
        behind = 0 if family == "t5" else max(map(len, kept)) - 1
        assert len(row["input_ids"]) == 60 - behind
    assert model(**ContextCollator(tokenizer)(list(rows))).logits.isfinite().all()


def test_an_option_that_leaves_no_room_is_refused():
    model, tokenizer = model_of("gpt2", None, template="*cls**sent_0**mask*")
    data = data_of([SHORT] * 2, {"first": ["no", LONG], "second": ["yes", "no"]}, COPA)
    tokens = len(tokenizer(f" {LONG}")["input_ids"])
    message = rf"row 1 of split 'train' has an option of {tokens} tokens, .*max_seq_length=40"
    with pytest.raises(InputError, match=message):
        tokenize_prompts(data, tokenizer, DataArguments(max_seq_length=40), model.config)


@pytest.mark.parametrize("name", ["boolq", "multirc", "rte", "cb", "wsc"])
def test_a_long_passage_leaves_the_question_whole(name):
    """As in MeZO, which cuts the beginning: a question without its end cannot be answered."""
    tokenizer = subword_tokenizer("bytes")
    prompt, task = DECODER_PROMPTS[name], TASKS[name]
    words, network = list(prompt.words.values()), decoder("gpt2", len(tokenizer))
    model = PromptForSequenceClassification.from_language_model(
        network, tokenizer, prompt.template, words, word_scoring="sequence"
    )
    columns = dict(zip(task.text_columns[0], ["long passage " * 60, "the question", "the answer"], strict=False))
    columns = {key: [value] for key, value in columns.items()}
    rows = Dataset.from_dict({**columns, "label": [0]})
    data = TaskData(task, rows, {}, {}, list(prompt.words), task.problem_type, "accuracy", tuple(columns))
    text = tokenizer.decode(
        tokenize_prompts(data, tokenizer, DataArguments(max_seq_length=200), model.config).train[0]["input_ids"]
    )
    assert "the question" in text.lower() and ("the answer" in text or len(columns) == 2) and "long passage" in text
    cut_end = DataArguments(max_seq_length=200, truncate_head=False)
    assert "the question" not in tokenizer.decode(
        tokenize_prompts(data, tokenizer, cut_end, model.config).train[0]["input_ids"]
    )


def test_the_tokenizers_are_of_different_kinds():
    assert {FAMILIES[family] for family in ("llama", "gpt2", "t5")} <= set(TOKENIZER_OF.values())
    assert not subword_tokenizer("bytes").is_fast
