"""Tokenising by a template, against joining part by part, one row at a time."""

import pytest
from datasets import Dataset
from tiny import WORDS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.preprocess import tokenize_prompts
from hf_ft_ext.prompts.templates.encode import PromptEncoder, shorten

IT_WAS = "*cls**sent_0*_it_was*mask*.*sep+*"
PAIR = "*cls**sent-_0*,*mask*,*+sentl_1**sep+*"
TEXTS = ["a great film", "the plot was dull and very bad", "good", " ".join(WORDS)]


def decoded(encoder, rows):
    return [encoder.tokenizer.decode(ids) for ids in rows["input_ids"]]


def tokenizer_with_segments():
    """As BERT's."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def byte_tokenizer():
    """A byte-level tokenizer without merges, as RoBERTa's: a leading space is a token of its own."""
    vocab = {
        token: i for i, token in enumerate(["<s>", "</s>", "<mask>", "<pad>", *pre_tokenizers.ByteLevel.alphabet()])
    }
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def by_hand(tokenizer, row, limit=None):
    """The tokens of `PAIR`, written out."""
    first, second = row[0].rstrip()[:-1], " " + row[1][:1].lower() + row[1][1:]

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    comma = [tokenizer.convert_tokens_to_ids(",")]
    return [
        tokenizer.cls_token_id, *ids(first)[:limit], *comma, tokenizer.mask_token_id, *comma, *ids(second),
        tokenizer.sep_token_id,
    ]  # fmt: skip


def test_one_text():
    encoder = PromptEncoder(tiny_tokenizer(), IT_WAS, 1, 64)
    rows = encoder([TEXTS[:3]])
    assert decoded(encoder, rows) == [f"[CLS] {text} it was [MASK] . [SEP]" for text in TEXTS[:3]]
    assert rows["attention_mask"] == [[1] * len(ids) for ids in rows["input_ids"]]
    assert rows.keys() == {"input_ids", "attention_mask"}


def test_a_pair_equals_the_parts_joined_by_hand():
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, PAIR, 2, 64, first_sent_limit=4)
    firsts, seconds = [f"{text}x " for text in TEXTS], [text.capitalize() for text in TEXTS[::-1]]
    rows = encoder([firsts, seconds])["input_ids"]
    assert rows[:3] == [by_hand(tokenizer, row, limit=4) for row in zip(firsts, seconds, strict=True)][:3]


def test_spaces_are_kept_for_byte_level_tokenizers():
    encoder = PromptEncoder(byte_tokenizer(), "*cls**sent_0*_it_was*mask*.*+sent_0**sep+*", 1, 64)
    (text,) = decoded(encoder, encoder([["Ab"]]))
    assert text == "<s>Ab it was<mask>. Ab</s>"


def test_segments():
    encoder = PromptEncoder(tokenizer_with_segments(), "*cls**sent_0**sep+**sent_1**mask**sep*", 2, 64)
    rows = encoder([["a film"], ["good"]])
    assert rows["token_type_ids"] == [[0, 0, 0, 0, 1, 1, 1]]
    one = PromptEncoder(tokenizer_with_segments(), IT_WAS, 1, 64)([["a film"]])
    assert one["token_type_ids"] == [[0] * 8]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("length", [8, 9, 12, 20])
def test_long_rows_lose_text_but_keep_the_mask(length, head):
    encoder = PromptEncoder(tiny_tokenizer(), PAIR, 2, length, truncate_head=head)
    first, second = [text + "x" for text in TEXTS], TEXTS
    long = PromptEncoder(tiny_tokenizer(), PAIR, 2, 1000)([first, second])["input_ids"]
    for short, whole in zip(encoder([first, second])["input_ids"], long, strict=True):
        assert len(short) == min(length, len(whole))
        assert short.count(encoder.mask_id) == 1
        assert [i for i in short if i in encoder.fixed[0] + encoder.fixed[1] + encoder.fixed[2]]
        assert short[0] == whole[0] and short[-1] == whole[-1]


@pytest.mark.parametrize("head", [False, True])
def test_one_long_text(head):
    encoder = PromptEncoder(tiny_tokenizer(), IT_WAS, 1, 10, truncate_head=head)
    (text,) = decoded(encoder, encoder([[" ".join(WORDS)]]))
    kept = " ".join(WORDS[-4:] if head else WORDS[:4])
    assert text == f"[CLS] {kept} it was [MASK] . [SEP]"


def test_shorten_takes_from_the_last_text_first_or_from_the_first():
    texts = [[1, 2, 3], [4, 5], []]
    assert shorten(texts, 1, head=False) == [[1, 2, 3], [4], []]
    assert shorten(texts, 3, head=False) == [[1], [4], []]
    assert shorten(texts, 1, head=True) == [[2, 3], [4, 5], []]
    assert shorten(texts, 3, head=True) == [[3], [5], []]
    assert texts == [[1, 2, 3], [4, 5], []]


def test_limits_are_per_text():
    encoder = PromptEncoder(tiny_tokenizer(), PAIR, 2, 64, first_sent_limit=1, other_sent_limit=2)
    assert decoded(encoder, encoder([["great filmx"], ["very good film"]])) == [
        "[CLS] great , [MASK] , very good [SEP]"
    ]
    head = PromptEncoder(tiny_tokenizer(), IT_WAS, 1, 64, first_sent_limit=1, truncate_head=True)
    assert decoded(head, head([["great film"]])) == ["[CLS] film it was [MASK] . [SEP]"]


def test_a_mask_in_a_text_is_no_mask():
    encoder = PromptEncoder(tiny_tokenizer(), IT_WAS, 1, 64)
    (ids,) = encoder([["a [MASK] film"]])["input_ids"]
    assert ids.count(encoder.mask_id) == 1 and ids[2] == encoder.tokenizer.unk_token_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 6}, "takes 6 tokens of its own, so with max_seq_length=6 no sentence limit can keep the mask"),
        ({"first_sent_limit": 0}, "first_sent_limit=0 leaves nothing of the text; pass 1 or more"),
        ({"other_sent_limit": -1}, "other_sent_limit=-1 leaves nothing"),
    ],
)
def test_bad_lengths(options, message):
    with pytest.raises(InputError, match=message):
        PromptEncoder(**{"tokenizer": tiny_tokenizer(), "template": IT_WAS, "texts": 1, "max_length": 64, **options})


def test_a_limit_that_cannot_keep_the_mask():
    PromptEncoder(tiny_tokenizer(), IT_WAS, 1, 16, 10).check_limits(10, None)
    with pytest.raises(
        InputError, match=r"other_sent_limit=50 has no effect: .*_it_was.* no text but the first; leave"
    ):
        PromptEncoder(tiny_tokenizer(), IT_WAS, 1, 16).check_limits(None, 50)
    only_second = IT_WAS.replace("sent_0", "sent_1")
    with pytest.raises(InputError, match=r"first_sent_limit=5 has no effect: .* no place for the first text; leave"):
        PromptEncoder(tiny_tokenizer(), only_second, 2, 16).check_limits(5, None)
    with pytest.raises(
        InputError, match=r"first_sent_limit=11 cannot keep the mask: .* max_seq_length=16; pass .* 10"
    ):
        PromptEncoder(tiny_tokenizer(), IT_WAS, 1, 16, 11).check_limits(11, None)
    with pytest.raises(
        InputError, match=r"other_sent_limit=11 cannot keep the mask: .* pass --other_sent_limit 10 or"
    ):
        PromptEncoder(tiny_tokenizer(), PAIR, 2, 16, None, 11).check_limits(None, 11)


def test_a_tokenizer_without_a_mask():
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="has no mask token, which the template needs; pass a masked language model"):
        PromptEncoder(tokenizer, IT_WAS, 1, 64)


# --- whole data sets --------------------------------------------------------------------------------


def task_data(task="sst2", labels=(0, 1, 1, 0)):
    known = TASKS[task]
    columns = known.text_columns[0]
    rows = Dataset.from_dict({**dict.fromkeys(columns, TEXTS), "label": list(labels)})
    names = list(known.label_names)
    return TaskData(known, rows, {"validation": rows}, {}, names, known.problem_type, known.metric, columns)


def config(template=IT_WAS, labels=("negative", "positive")):
    return PromptConfig(
        template=template,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )


def test_a_data_set_is_tokenised_with_the_task_s_length_and_limits():
    data = tokenize_prompts(task_data(), tiny_tokenizer(), DataArguments(few_shot_type="prompt"), config())
    assert set(data.train.column_names) == {"input_ids", "attention_mask", "labels"}
    assert data.train["labels"][:] == [0, 1, 1, 0]
    assert max(map(len, data.train["input_ids"][:])) <= 64  # the tokenizer's limit is below the task's
    padded = DataArguments(few_shot_type="prompt", pad_to_max_length=True, max_seq_length=20)
    rows = tokenize_prompts(task_data(), tiny_tokenizer(), padded, config()).train
    assert {len(ids) for ids in rows["input_ids"][:]} == {20} and sum(rows[0]["attention_mask"]) == 9


def test_labels_take_the_model_s_order():
    data = tokenize_prompts(
        task_data(), tiny_tokenizer(), DataArguments(few_shot_type="prompt"), config(labels=("Positive", "negative"))
    )
    assert data.label_names == ["positive", "negative"] and data.train["labels"][:] == [1, 0, 0, 1]


def test_limits_of_the_user_win_and_are_checked():
    arguments = DataArguments(few_shot_type="prompt", max_seq_length=30, first_sent_limit=2)
    rows = tokenize_prompts(task_data("mr"), tiny_tokenizer(), arguments, config()).train
    assert {len(ids) for ids in rows["input_ids"][:]} <= {7, 8}
    arguments = DataArguments(few_shot_type="prompt", max_seq_length=30, first_sent_limit=25)
    with pytest.raises(InputError, match="first_sent_limit=25 cannot keep the mask"):
        tokenize_prompts(task_data("mr"), tiny_tokenizer(), arguments, config())
    with pytest.raises(InputError, match="--max_seq_length 65 is more than the tokenizer can take"):
        tokenize_prompts(task_data(), tiny_tokenizer(), DataArguments(max_seq_length=65), config())
