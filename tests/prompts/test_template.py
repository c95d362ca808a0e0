"""Templates and label words: what they mean, and every way in which they cannot be used."""

import pytest
from tiny import tiny_tokenizer

from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.readout import Reading
from hf_ft_ext.prompts.templates.defaults import PROMPTS, known_prompt, task_prompt
from hf_ft_ext.prompts.templates.template import Literal, Sentence, Special, parse_template
from hf_ft_ext.prompts.templates.words import parse_mapping, word_ids

POLARITY = ("negative", "positive")


def test_parts():
    assert parse_template("*cls**sent_0*_It_was*mask*.*sep+*") == [
        Special("cls"), Sentence(0), Literal(" It was"), Special("mask"), Literal("."), Special("sep", True),
    ]  # fmt: skip
    assert parse_template("*mask*+sent_0*+sentl_1**sent-_0*x*sentu_1*") == [
        Special("mask"), Literal("+sent 0"), Sentence(1, space=True, first="l"), Sentence(0, cut=True), Literal("x"),
        Sentence(1, first="u"),
    ]  # fmt: skip


def test_forms_of_a_text():
    column = ["Is it good? ", "É", ""]
    assert Sentence(0).texts(column) == column
    assert Sentence(0, cut=True).texts(column) == ["Is it good", "", ""]
    assert Sentence(0, first="l", space=True).texts(column) == [" is it good? ", " é", " "]
    assert Sentence(0, first="u").texts(["aB"]) == ["AB"]
    assert Sentence(0, question=True).texts(["is it", "is it?", "is it? ", "?", ""]) == [
        "is it?", "is it?", "is it? ", "?", "?",
    ]  # fmt: skip
    assert parse_template("*+sentu?_1**mask*")[0] == Sentence(1, space=True, first="u", question=True)


@pytest.mark.parametrize("reading", ["mask", "last", "decoder"])
@pytest.mark.parametrize("task", [name for name in TASKS if name != "wnli"])
def test_every_task_has_a_prompt_for_its_labels(task, reading):
    known = TASKS[task]
    prompt = known_prompt(known, Reading(reading))
    assert parse_template(prompt.template, len(known.text_columns[0]), reading)
    if known.options:
        assert set(known.options) < set(known.text_columns[0]) and len(known.options) == len(known.label_names)
        return
    words = parse_mapping(prompt.words, known.label_names)
    assert len(words) == len(known.label_names or (0, 1))


def test_the_published_prompts():
    assert PROMPTS["sst2"].template == PROMPTS["sst5"].template == "*cls**sent_0*_It_was*mask*.*sep+*"
    assert parse_mapping(PROMPTS["sst5"].words, TASKS["sst5"].label_names) == [
        "terrible", "bad", "okay", "good", "great",
    ]  # fmt: skip
    assert PROMPTS["trec"].template == "*cls**mask*:*+sent_0**sep+*"
    assert parse_mapping(PROMPTS["mnli"].words, TASKS["mnli"].label_names) == ["Yes", "Maybe", "No"]
    assert PROMPTS["rte"].template == PROMPTS["qnli"].template == "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
    assert (PROMPTS["mnli"].max_seq_length, PROMPTS["mnli"].first_sent_limit) == (256, 240)
    assert (PROMPTS["mr"].first_sent_limit, PROMPTS["mr"].other_sent_limit) == (110, 50)
    assert parse_mapping(PROMPTS["stsb"].words, None) == ["No", "Yes"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("*cls**sent_0*_It_was.*sep+*", "has no mask; put \\*mask\\* in it once"),
        ("*cls**sent_0**mask**mask**sep*", "has 2 masks"),
        ("*cls*_It_was*mask*.*sep+*", r"has no text of the row; put \*sent_0\* in it"),
        ("*cls**sent_0**msk**sep*", r"unknown marker \*msk\*; did you mean \*mask\*\?"),
        ("*cls**sent0**mask**sep*", r"unknown marker \*sent0\*; did you mean \*sent_0\*\?"),
        ("*cls**sentx_0**mask**sep*", r"unknown marker \*sentx_0\*"),
        ("*cls**sent_0*mask*.*sep+*", "unpaired asterisk"),
        ("*cls**sent_0**mask**sent_1*", "names text 1, but the rows of this data have one text"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(InputError, match=message):
        parse_template(template, 1)


@pytest.mark.parametrize(
    "mapping",
    [
        {"negative": "bad", "positive": "good"},
        {"1": "good", "0": "bad"},
        {0: "bad", "POSITIVE": "good"},
        "{'negative':'bad','positive':'good'}",
        '{"0": "bad", "1": "good"}',
        "{0: 'bad', 1: 'good'}",
    ],
)
def test_mappings(mapping):
    assert parse_mapping(mapping, POLARITY) == ["bad", "good"]


def test_mappings_of_labels_that_are_numbers_or_differ_in_case():
    for first in (0, 1):
        mapping = {first + i: word for i, word in enumerate(("bad", "so", "good"))}
        assert parse_mapping(mapping, ["1", "2", "3"]) == ["bad", "so", "good"]
    assert parse_mapping({"good": "a", "Good": "b", "BAD": "c"}, ["Good", "bad", "good"]) == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("mapping", "labels", "message"),
    [
        ({"negative": "bad"}, POLARITY, "has no word for label 'positive'; the labels are: negative, positive"),
        ("{'negative': 'a', 'negative': 'b', 'positive': 'c'}", POLARITY, "has label 'negative' twice"),
        ('{"0": "a", "negative": "b", "positive": "c"}', POLARITY, "has label 'negative' twice"),
        ('{"0": "a", "0": "b", "1": "c"}', POLARITY, "has label 'negative' twice"),
        ({"neutral": "a", "positive": "c"}, POLARITY, "unknown label 'neutral'; the labels are: negative, positive"),
        ({"2": "a", "positive": "c"}, POLARITY, "unknown label '2'"),
        ({"negative": "a", "positive": "a"}, POLARITY, "maps both 'negative' and 'positive' to 'a'; choose"),
        ({"negative": "", "positive": "a"}, POLARITY, "maps label 'negative' to '', which is not a word"),
        ({"negative": 3, "positive": "a"}, POLARITY, "maps label 'negative' to 3, which is not a word"),
        ("negative terrible", POLARITY, "cannot be read; pass a dictionary"),
        ("['a', 'b']", POLARITY, "is not a dictionary; pass one"),
        ("__import__('os').getcwd()", POLARITY, "is not a dictionary"),
        ("{'0': __import__('os').getcwd(), '1': 'b'}", POLARITY, "cannot be read"),
        ("{**{'0': 'a'}, '1': 'b'}", POLARITY, "cannot be read"),
        ({"0": "a", "1": "b", "2": "c"}, None, "has 3 words, but a regression needs two"),
        ({"low": "a", "1": "b"}, None, "unknown label 'low'; the labels are: 0, 1"),
    ],
)
def test_mappings_that_cannot_be_used(mapping, labels, message):
    with pytest.raises(InputError, match=message):
        parse_mapping(mapping, labels)


def test_words_are_one_token_each():
    tokenizer = tiny_tokenizer()
    assert word_ids(tokenizer, ["bad", "Good", "."]) == tokenizer.convert_tokens_to_ids(["bad", "good", "."])
    with pytest.raises(InputError, match=r"label word 'very good' is 2 tokens for this tokenizer \(very good\)"):
        word_ids(tokenizer, ["very good", "bad"])
    with pytest.raises(InputError, match="label word 'terrible' is unknown to this tokenizer; choose another"):
        word_ids(tokenizer, ["terrible", "bad"])
    with pytest.raises(InputError, match="'bad' and 'Bad' are the same token for this tokenizer"):
        word_ids(tokenizer, ["bad", "Bad"])


def test_a_task_without_a_prompt_asks_for_one():
    with pytest.raises(InputError, match="'wnli' has no prompt of its own; pass --template and --mapping, such as"):
        task_prompt(TASKS["wnli"], None, None)
    with pytest.raises(InputError, match="pass --mapping, such as"):
        task_prompt(TASKS["wnli"], "*sent_0**mask*", None)
    assert task_prompt(TASKS["wnli"], "*sent_0**mask*", {}) == ("*sent_0**mask*", {})
