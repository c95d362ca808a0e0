"""Prompts of decoders: rows, logits and label words against the language model itself, one row and one word a time."""

import math
import types

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from decoders import (
    DECODERS,
    ENCODER_DECODERS,
    OTHER_DECODERS,
    TOKENIZER_OF,
    decoder,
    subword_tokenizer,
    word_tokenizer,
)
from tiny import tiny_masked_lm, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, pipeline

from hf_ft_ext import PromptEncoder, PromptForSequenceClassification
from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.data.tasks import Task
from hf_ft_ext.errors import InputError
from hf_ft_ext.models.peft import wrap_with_peft
from hf_ft_ext.prompts.calibration import calibrate
from hf_ft_ext.prompts.collator import ContextCollator
from hf_ft_ext.prompts.preprocess import tokenize_prompts
from hf_ft_ext.prompts.saving import SavePrompt
from hf_ft_ext.prompts.sequences import sequence_scores
from hf_ft_ext.prompts.templates.words import answer_tokens, word_tokens

TEMPLATE = "*cls**sent_0*_It_was*mask*.*sep+*"
ROWS = ["a great film", "we hated the dull scene, but not the ending!", "a cast"]
WORDS = ["bad", "great"]
RENDERED = {
    TEMPLATE: "{0} It was",
    '*cls**sent_0*\nDoes this mean that "*sent_1*" is true?\n*mask*': '{0}\nDoes this mean that "{1}" is true?\n',
    "*cls*Question:_*sent_0*._Yes?_*mask*": "Question: {0}. Yes?",
    "*cls**sent_1**+sent_0*\\nNo:*mask*": "{1} {0}\nNo:",
}


def rows_of(model, tokenizer, texts=None, template=TEMPLATE, **options):
    encoder = PromptEncoder(tokenizer, template, 1, 120, reading=model.config.reading, **options)
    return encoder([list(texts or ROWS)])


def padded(rows, tokenizer, side):
    tokenizer.padding_side = side
    return dict(tokenizer.pad(rows, return_tensors="pt"))


def prompt_model(family, scoring="first_token", words=WORDS, **settings):
    tokenizer = subword_tokenizer(TOKENIZER_OF[family])
    model = PromptForSequenceClassification.from_language_model(
        decoder(family, len(tokenizer)),
        tokenizer,
        TEMPLATE,
        list(words),
        ["no", "yes"],
        word_scoring=scoring,
        **settings,
    )
    return model, tokenizer


def log_probability(network, ids, tokens, start):
    """`log p(tokens | ids)` by one forward pass of the language model for each token, without padding or mask."""
    total = 0.0
    for j, token in enumerate(tokens):
        if start is None:
            logits = network(input_ids=torch.tensor([[*ids, *tokens[:j]]])).logits
        else:
            logits = network(
                input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *tokens[:j]]])
            ).logits
        total += float(logits[0, -1].double().log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("kind", ["byte-level", "llama", "unigram", "bytes"])
@pytest.mark.parametrize("template", RENDERED)
def test_rows_are_the_tokens_of_the_whole_text(kind, template):
    tokenizer = subword_tokenizer(kind)
    encoder = PromptEncoder(tokenizer, template, 2, 200, reading="last")
    first, second = "a great film", "dull and great"
    ids = encoder([[first], [second]])["input_ids"][0]
    whole = tokenizer(RENDERED[template].format(first, second))["input_ids"]
    if kind in ("unigram", "bytes"):  # their end token follows the answer
        assert whole[-1] == tokenizer.eos_token_id
        whole = whole[:-1]
    assert ids == whole


@pytest.mark.parametrize("kind", ["byte-level", "llama", "unigram", "bytes"])
def test_label_words_are_the_tokens_that_follow_the_text(kind):
    tokenizer = subword_tokenizer(kind)
    for before, word, text in (("It was", "great", "a It was great"), ("?\n", "Yes", "a?\nYes"), ("?", "No", "a? No")):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = answer_tokens(tokenizer, word, before)
        assert whole[-len(tokens) :] == tokens
        assert tokenizer.decode(tokens).strip() == word


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("scoring", ["first_token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("family", [*DECODERS, *OTHER_DECODERS])
@torch.no_grad()
def test_logits_are_those_of_the_language_model_row_by_row(family, scoring, side):
    words = WORDS if scoring == "first_token" else ["brilliant film", "dull", "not the ending"]
    model, tokenizer = prompt_model(family, scoring, words)
    # A softmax in float32, in which transformers' float64 mask of a row of padding is not finite; products of experts.
    dtype = torch.float32 if family in ("gemma2", "bloom", "mixtral") else torch.float64
    model.to(dtype)
    rows = rows_of(model, tokenizer)
    logits = model(**padded(rows, tokenizer, side)).logits
    tokens = word_tokens(tokenizer, words, "a", scoring)
    start = model.config.masked_lm.decoder_start_token_id if family in ENCODER_DECODERS else None
    network = decoder(family, len(tokenizer)).to(dtype)
    for row, ids in enumerate(rows["input_ids"]):
        scores = [log_probability(network, ids, t[:1] if scoring == "first_token" else t, start) for t in tokens]
        if scoring == "sequence_mean":
            scores = [score / len(t) for score, t in zip(scores, tokens, strict=True)]
        if scoring == "first_token":  # raw logits: the same up to a constant of the row
            scores = [score - scores[0] for score in scores]
            found = logits[row] - logits[row, 0]
        else:
            found = logits[row]
        assert found.tolist() == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_token_types_go_on_with_the_words(side):
    """A GPT-2 with BERT's tokenizer: the words have the type of the row's last token."""
    model, tokenizer = prompt_model("gpt2", "sequence", ["brilliant film", "dull"])
    rows = rows_of(model, tokenizer)
    batch, table, expected = padded(rows, tokenizer, side), model.get_input_embeddings().weight, []
    # GPT-2 adds the embedding of the type to each token
    hook = model.masked_lm.transformer.drop.register_forward_pre_hook(lambda module, args: (args[0] + table[7],))
    for ids in rows["input_ids"]:
        row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        expected.append(model(**row).logits[0])
    hook.remove()
    types = torch.full_like(batch["input_ids"], 7)
    torch.testing.assert_close(model(**batch, token_type_ids=types).logits, torch.stack(expected))


def test_a_gap_within_the_row_is_t5s_sentinel():
    tokenizer = subword_tokenizer("unigram")
    template = "*cls**sent_0*?*mask*,*+sentl_1**sep+*"
    model = PromptForSequenceClassification.from_language_model(
        decoder("t5", len(tokenizer)), tokenizer, template, WORDS, ["no", "yes"]
    )
    gap = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert model.config.decoder_prefix == [0, gap]
    rows = PromptEncoder(tokenizer, template, 2, 60, reading="decoder")([["a film"], ["It was"]])
    assert rows["input_ids"][0].count(gap) == 1 and rows["input_ids"][0][-1] == tokenizer.eos_token_id
    with torch.no_grad():
        ids = torch.tensor(rows["input_ids"])
        network = decoder("t5", len(tokenizer))
        expected = network(input_ids=ids, decoder_input_ids=torch.tensor([[0, gap]])).logits[0, 1]
        assert torch.allclose(model(input_ids=ids).logits[0], expected[model.config.word_ids], atol=1e-5)


@pytest.mark.parametrize("scoring", ["first_token", "sequence_mean"])
@pytest.mark.parametrize("family", [*DECODERS, "bart"])
@torch.no_grad()
def test_a_saved_model_loads_with_its_prompt(family, scoring, tmp_path):
    model, tokenizer = prompt_model(family, scoring)
    batch = padded(rows_of(model, tokenizer), tokenizer, "left")
    model.calibrate(torch.tensor(rows_of(model, tokenizer, [""])["input_ids"]))
    model.save_pretrained(tmp_path)
    for kind in (PromptForSequenceClassification, AutoModelForSequenceClassification):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.config.template == TEMPLATE and loaded.config.words == WORDS
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@torch.no_grad()
def test_calibration_leaves_a_row_without_content_undecided(family):
    model, tokenizer = prompt_model(family)
    batch, empty = padded(rows_of(model, tokenizer), tokenizer, "right"), rows_of(model, tokenizer, [""])["input_ids"]
    before, bias = model(**batch).logits, model(input_ids=torch.tensor(empty)).logits
    model.calibrate(torch.tensor(empty))
    assert torch.allclose(model(input_ids=torch.tensor(empty)).logits, torch.zeros(1, 2), atol=1e-6)
    assert torch.allclose(model(**batch).logits, before - bias, atol=1e-6)


@torch.no_grad()
def test_untied_words_keep_the_logits_of_a_decoder():
    model, tokenizer = prompt_model("qwen3")
    batch = padded(rows_of(model, tokenizer), tokenizer, "left")
    before = model(**batch).logits
    layer = model.untie_label_words()
    assert layer.weight.shape == (2, 16)
    assert torch.allclose(model(**batch).logits, before, atol=1e-6)


def data_of(columns, labels, task=None):
    features = Features({**dict.fromkeys(columns, Value("string")), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({**columns, "label": labels}, features=features)
    task = task or Task("own", (tuple(columns),), ("no", "yes"))
    return TaskData(task, rows, {"dev": rows}, {}, ["no", "yes"], task.problem_type, "accuracy", tuple(columns))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_demonstrations_stand_in_front_of_the_row(family):
    model, tokenizer = prompt_model(family)
    data = data_of({"sentence": ["a film", "a cast", "a scene", "the plot"]}, [0, 1, 0, 1])
    data_args = DataArguments(few_shot_type="prompt-demo", num_sample=1, max_seq_length=100)
    rows = tokenize_prompts(data, tokenizer, data_args, model.config, 120)
    text = tokenizer.decode(rows.validation["dev"][0]["input_ids"], skip_special_tokens=True)
    shown, _, own = "".join(text.split()).rpartition("afilmItwas")
    assert own == ""  # the answer is what comes next
    assert shown.count("Itwasbad.") == 1 and shown.count("Itwasgreat.") == 1
    ids = rows.validation["dev"][0]["input_ids"]
    start, end = [1] if family == "llama" else [], [2] if family == "t5" else []
    assert ids[: len(start)] == start and ids.count(1) == len(start) and ids[len(ids) - len(end) :] == end


@torch.no_grad()
def test_calibration_with_demonstrations_reads_the_end_of_each_context():
    model, tokenizer = prompt_model("gpt2")
    data = data_of({"sentence": ["a film", "a cast", "a film", "a cast"]}, [0, 1, 0, 1])  # one text for each class
    data_args = DataArguments(few_shot_type="prompt-demo", num_sample=2, max_seq_length=100)
    calibrate(model, tokenizer, data, data_args)
    ids = tokenizer("a film It was bad.\na cast It was great.\n It was", return_tensors="pt")["input_ids"]
    words = [tokenizer(f" {word}")["input_ids"][0] for word in WORDS]
    expected = decoder("gpt2", len(tokenizer))(input_ids=ids).logits[0, -1, words]
    assert torch.allclose(torch.tensor(model.config.word_bias), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "t5"])
@torch.no_grad()
def test_rows_with_options_of_their_own_are_scored_as_in_a_loop(family):
    tokenizer = subword_tokenizer(TOKENIZER_OF[family])
    task = Task("copa", (("premise", "first", "second"),), ("no", "yes"), options=("first", "second"))
    columns = {
        "premise": ["a film so", "the cast"],
        "first": ["it was great", "dull"],
        "second": ["no", "we hated it"],
    }
    data = data_of(columns, [0, 1], task)
    model = PromptForSequenceClassification.from_language_model(
        decoder(family, len(tokenizer)), tokenizer, "*cls**sent_0**mask*", None, ["no", "yes"]
    ).double()
    rows = tokenize_prompts(data, tokenizer, DataArguments(few_shot_type="prompt"), model.config, 120).train
    logits = model(**ContextCollator(tokenizer)(list(rows))).logits
    network, start = decoder(family, len(tokenizer)).double(), 0 if family == "t5" else None
    for row in range(2):
        ids = tokenizer(columns["premise"][row])["input_ids"]
        options = [answer_tokens(tokenizer, columns[c][row], "a") for c in ("first", "second")]
        scores = [log_probability(network, ids, tokens, start) for tokens in options]
        assert logits[row].tolist() == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("kind", ["ia3", "prefix_tuning"])
@pytest.mark.parametrize("family", DECODERS)
def test_peft_finds_its_way_into_a_prompt_model(family, kind):
    model, tokenizer = prompt_model(family)
    settings = {"num_virtual_tokens": 2} if kind == "prefix_tuning" else None
    if kind == "prefix_tuning" and family == "t5":
        with pytest.raises(InputError, match=r"puts keys and values in front of a decoder's tokens.*use lora"):
            wrap_with_peft(model, kind, settings, 0)
        return
    wrapped = wrap_with_peft(model, kind, settings, 0).eval()
    rows = rows_of(model, tokenizer)
    with torch.no_grad():
        alone = torch.cat([wrapped(input_ids=torch.tensor([ids])).logits for ids in rows["input_ids"]])
        for side in ("right", "left"):
            torch.testing.assert_close(wrapped(**padded(rows, tokenizer, side)).logits, alone, rtol=0, atol=1e-5)
    wrapped.train()(**padded(rows, tokenizer, "left"), labels=torch.tensor([0, 1, 0])).loss.backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    reached = [p for p in trained if p.grad is not None and p.grad.abs().max() > 1e-7]  # what is zero may be rounded
    # T5's decoder attends to the one position that there is, whatever its keys are
    assert len(reached) == len(trained) - (2 if family == "t5" else 0)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_the_language_model_keeps_its_attention(family, tmp_path):
    if family == "bert":
        model, tokenizer = tiny_masked_lm(), tiny_tokenizer()
    else:
        tokenizer = subword_tokenizer(TOKENIZER_OF[family])
        model = decoder(family, len(tokenizer))
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    prompt = (tokenizer, "*cls**sent_0*_it_was*mask*", WORDS)
    made = PromptForSequenceClassification.from_language_model(model, *prompt)
    assert model.config._attn_implementation == made.masked_lm.config._attn_implementation == "eager"
    name = str(tmp_path)
    made = PromptForSequenceClassification.from_language_model(name, *prompt, attn_implementation="eager")
    assert made.masked_lm.config._attn_implementation == "eager"
    made = PromptForSequenceClassification.from_language_model(name, *prompt)
    assert made.masked_lm.config._attn_implementation == type(model).from_pretrained(name).config._attn_implementation


@pytest.mark.parametrize("scoring", ["first_token", "sequence"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_rows_without_the_template_are_named(family, scoring, tmp_path, caplog):
    caplog.set_level("WARNING")
    model, tokenizer = prompt_model(family, scoring)
    rows = rows_of(model, tokenizer)
    for side in ("right", "left"):
        model(**padded(rows, tokenizer, side))
    assert "do not end as those of the template" not in caplog.text
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    classify(ROWS)
    assert caplog.text.count(f"do not end as those of the template {TEMPLATE!r} do") == 1
    classify(ROWS)
    assert caplog.text.count("do not end as those of the template") == 1  # once for each model


@pytest.mark.parametrize("template", ["*cls**sent_0**mask*", "*sent_0*?*mask*"])
def test_rows_that_end_with_their_own_text_are_not_compared(template, caplog):
    caplog.set_level("WARNING")
    tokenizer = subword_tokenizer("byte-level")
    model = PromptForSequenceClassification.from_language_model(
        decoder("gpt2", len(tokenizer)), tokenizer, template, WORDS
    )
    model(input_ids=torch.tensor([tokenizer("a film was it not?!")["input_ids"]]))
    assert model.config.row_end is None and not caplog.text


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("*cls**sent_0*_It_was", "has no mask; put \\*mask\\* in it once"),
        ("*cls**sent_0*?*mask*,*+sentl_1**sep+*", "has text 1 after \\*mask\\*; a causal language model"),
        ("*cls**sent_0*_It_was*mask*_indeed.", "has 'indeed.' after \\*mask\\*.*put \\*mask\\* last"),
    ],
)
def test_a_decoder_answers_at_the_end(template, reason):
    with pytest.raises(InputError, match=reason):
        PromptEncoder(subword_tokenizer("byte-level"), template, 2, 60, reading="last")


def test_words_that_begin_alike_are_named():
    tokenizer = subword_tokenizer("bytes")
    network = decoder("gpt2", len(tokenizer))
    with pytest.raises(
        InputError, match=r"'great' and 'dull' begin with the same token .*' '.*--word_scoring sequence"
    ):
        PromptForSequenceClassification.from_language_model(network, tokenizer, TEMPLATE, ["great", "dull"])
    model = PromptForSequenceClassification.from_language_model(
        network, tokenizer, TEMPLATE, ["great", "dull"], word_scoring="sequence"
    )
    assert [len(tokens) for tokens in model.config.word_sequences] == [6, 5]


@pytest.mark.parametrize("words", [["great", "great film"], ["great film", "great"]])
def test_a_word_that_begins_another_is_named(words, caplog):
    tokenizer = word_tokenizer()
    with caplog.at_level("WARNING", "hf_ft_ext.prompts"):
        word_tokens(tokenizer, words, "a", "sequence_mean")
        assert "are a prefix of those of" not in caplog.text
        word_tokens(tokenizer, words, "a", "sequence")
    assert "The tokens of label word 'great' are a prefix of those of 'great film'" in caplog.text
    caplog.clear()
    word_tokens(tokenizer, ["great film", "great plot"], "a", "sequence")
    assert "are a prefix of those of" not in caplog.text


def test_the_same_tokens_for_two_words_are_no_choice():
    with pytest.raises(InputError, match="'GREAT' and 'great' are the same tokens"):
        word_tokens(word_tokenizer(), ["GREAT", "great"], "a", "sequence")
    with pytest.raises(InputError, match="'terrific' is unknown to this tokenizer"):
        word_tokens(word_tokenizer(), ["terrific", "great"], "a")
    # SentencePiece's tokens are a space and the unknown token
    with pytest.raises(InputError, match="'日' is unknown to this tokenizer"):
        word_tokens(subword_tokenizer("unigram"), ["great", "日"], "It was")


def test_unsupported_scorings_of_words_are_refused():
    with pytest.raises(InputError, match="word_scoring='all' is unknown; choose from: first_token"):
        prompt_model("gpt2", "all")
    with pytest.raises(InputError, match="untie_words keeps only those of the label words"):
        prompt_model("gpt2", "sequence", untie_words=True)
    with pytest.raises(InputError, match="encoder-decoder's head is scaled"):
        prompt_model("t5", untie_words=True)
    model, tokenizer = prompt_model("gpt2")
    rows = padded(rows_of(model, tokenizer), tokenizer, "right")
    rows["attention_mask"] = rows["attention_mask"][:, None, None]
    with pytest.raises(InputError, match="attention mask \\[rows, length\\], got \\[3, 1, 1"):
        model(**rows)


def test_an_impossible_token_gives_minus_infinity_and_no_nan():
    logits = torch.zeros(2, 3, 5)
    logits[0, 0, 1] = -math.inf
    scores = sequence_scores(logits, torch.tensor([[[1, -100, -100], [2, 3, 4]]]), mean=False)
    assert scores[0, 0] == -math.inf and scores[0, 1] == pytest.approx(3 * math.log(1 / 5))


def test_an_adapter_s_folder_keeps_infinity_in_the_configuration(tmp_path):
    tokenizer = subword_tokenizer("byte-level")
    decoder("mamba2", len(tokenizer)).save_pretrained(tmp_path / "base")
    model = PromptForSequenceClassification.from_language_model(
        str(tmp_path / "base"), tokenizer, TEMPLATE, ["bad", "great"], ["no", "yes"]
    )
    assert model.config.masked_lm.time_step_limit[1] == math.inf
    wrapped = wrap_with_peft(model, "lora", {"target_modules": ["in_proj"]}, seed=0)
    wrapped.save_pretrained(tmp_path / "adapter")
    args = types.SimpleNamespace(should_save=True, output_dir=str(tmp_path / "adapter"))
    SavePrompt().on_train_end(args, None, None, model=wrapped)
    loaded = PromptForSequenceClassification.from_adapter(tmp_path / "adapter")
    assert loaded.config.masked_lm.time_step_limit[1] == math.inf
