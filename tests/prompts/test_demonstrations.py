"""Demonstrations: which rows, in what form, averaged how."""

import hashlib
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from prompt_models import masked_lm, prompt_model
from tiny import tiny_tokenizer
from transformers import T5Config, T5Model

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.data.tasks import TASKS, Task
from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import REGRESSION
from hf_ft_ext.prompts import demonstrations, similarity
from hf_ft_ext.prompts.calibration import calibrate
from hf_ft_ext.prompts.collator import ContextCollator
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.loading import check_prompt_options
from hf_ft_ext.prompts.preprocess import tokenize_prompts

TEMPLATE = "*cls**sent_0*_it_was*mask*.*sep+*"
TEXTS = ["the film", "the plot", "the cast", "the music", "a scene", "the ending"]
LABELS = [0, 1, 0, 1, 0, 1]


def config(labels=("negative", "positive"), words=("bad", "good"), **kwargs):
    ids = tiny_tokenizer().convert_tokens_to_ids(list(words))
    return PromptConfig(
        template=TEMPLATE, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
        words=list(words), word_ids=ids, mask_token_id=tiny_tokenizer().mask_token_id, **kwargs,
    )  # fmt: skip


def encode(texts=TEXTS, labels=LABELS, seed=None, prompt=None, regression=False, **options):
    rows = Dataset.from_dict({"sentence": list(texts), "label": list(labels)})
    dev = Dataset.from_dict({"sentence": ["the whole part", "it was great"], "label": list(labels[:2])})
    task = Task("own", (("sentence",),), None, problem_type=REGRESSION) if regression else TASKS["sst2"]
    names = None if regression else ["negative", "positive"]
    data = TaskData(task, rows, {"dev": dev}, {}, names, task.problem_type, task.metric, ("sentence",))
    arguments = DataArguments(few_shot_type="prompt-demo", **{"max_seq_length": 60, "num_sample": 3, **options})
    return tokenize_prompts(data, tiny_tokenizer(), arguments, prompt or config(), data_seed=seed)


def decoded(ids):
    return tiny_tokenizer().decode(ids)


def test_a_context_is_the_row_and_one_answered_row_of_each_class():
    data = encode()
    for i, ids in enumerate(data.train["input_ids"][:]):
        text = decoded(ids)
        own, first, second = re.fullmatch(
            r"\[CLS\] (.*) it was \[MASK\] \. \[SEP\] (.*) it was bad \. \[SEP\] (.*) it was good \. \[SEP\]", text
        ).groups()
        assert own == TEXTS[i] and own not in (first, second)
        assert LABELS[TEXTS.index(first)] == 0 and LABELS[TEXTS.index(second)] == 1
    assert data.train["labels"][:] == LABELS


def test_rows_to_evaluate_have_several_contexts():
    rows = encode(num_sample=8).validation["dev"]
    contexts = rows["input_ids"][:][0]
    assert len(contexts) == 8 and len({decoded(ids) for ids in contexts}) > 3
    assert all(decoded(ids).startswith("[CLS] the whole part it was [MASK] .") for ids in contexts)
    assert isinstance(encode(num_sample=1).validation["dev"]["input_ids"][:][0][0], int)


def test_the_data_seed_alone_decides():
    first = encode().validation["dev"]["input_ids"][:]
    assert encode(seed=13).validation["dev"]["input_ids"][:] == first
    assert encode(seed=21).validation["dev"]["input_ids"][:] != first


def test_several_demonstrations_of_a_class_differ():
    for ids in encode(num_demo=2).train["input_ids"][:]:
        shown = re.findall(r"\[SEP\] (.*?) it was", decoded(ids))
        assert len(shown) == len(set(shown)) == 4


def test_the_model_s_order_of_the_labels_counts():
    data = encode(prompt=config(labels=("positive", "negative"), words=("good", "bad")))
    assert data.train["labels"][:] == [1 - label for label in LABELS]
    (first, second) = re.findall(r"\[SEP\] (.*?) it was", decoded(data.train["input_ids"][:][0]))
    assert LABELS[TEXTS.index(first)] == 1 and LABELS[TEXTS.index(second)] == 0
    assert "it was good" in decoded(data.train["input_ids"][:][0]).split("[SEP]")[1]


def test_a_regression_shows_both_halves_of_the_scale():
    data = encode(labels=[0.0, 5.0, 1.0, 4.0, 2.0, 3.0], regression=True, prompt=config(bounds=[0.0, 5.0]))
    for ids in data.train["input_ids"][:]:
        first, second = re.findall(r"\[SEP\] (.*?) it was", decoded(ids))
        assert TEXTS.index(first) in (0, 2, 4) and TEXTS.index(second) in (1, 3, 5)


def test_limits_cut_demonstrations_and_the_row_gives_way():
    text = decoded(encode(other_sent_limit=1).train["input_ids"][:][0])
    assert re.fullmatch(
        r"\[CLS\] the film it was \[MASK\] \. \[SEP\] \w+ it was bad .* \w+ it was good \. \[SEP\]", text
    )
    long = encode(texts=["the whole " * 9, *TEXTS[1:]], max_seq_length=24, other_sent_limit=2)
    assert len(long.train["input_ids"][:][0]) == 24 and decoded(long.train["input_ids"][:][0]).count("[MASK]") == 1


def test_logits_of_contexts_are_averaged_over_a_padded_batch():
    model, tokenizer = prompt_model(), tiny_tokenizer()
    rows = encode().validation["dev"]
    batch = ContextCollator(tokenizer)([rows[0], rows[1]])
    assert batch["input_ids"].shape[:2] == (2, 3) and batch["labels"].tolist() == [0, 1]
    found = model(**batch).logits
    for i in range(2):
        single = [
            model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
            for ids in rows[i]["input_ids"]
        ]
        torch.testing.assert_close(found[i], torch.cat(single).mean(0), rtol=1e-4, atol=1e-5)
    plain = ContextCollator(tokenizer)([encode().train[0], encode().train[1]])
    assert plain["input_ids"].ndim == 2


def test_the_filter_keeps_the_most_similar(monkeypatch):
    # similar: texts of the same length
    def lengths(model, texts, others):
        return -np.abs(np.array([[len(a) - len(b) for b in others] for a in texts], dtype=float))

    monkeypatch.setattr(demonstrations, "similarities", lengths)
    data = encode(demo_filter=0.34)  # one of three, or of the two that are left
    for i, ids in enumerate(data.train["input_ids"][:]):
        shown = re.findall(r"\[SEP\] (.*?) it was", decoded(ids))
        for label, text in enumerate(shown):
            others = [j for j in range(6) if LABELS[j] == label and j != i]
            best = min(others, key=lambda j: abs(len(TEXTS[j]) - len(TEXTS[i])))
            assert abs(len(text) - len(TEXTS[i])) == abs(len(TEXTS[best]) - len(TEXTS[i]))


def test_similarity_is_the_cosine_of_mean_hidden_states(tmp_path):
    lm = masked_lm().bert
    lm.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = similarity.similarities(str(tmp_path), ["the film", "a great plot"], ["the film", "music"])
    batch = tiny_tokenizer()(["the film", "music"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(found[0], (means @ means[0]).numpy(), atol=1e-5)
    with pytest.raises(InputError, match=r"demo_filter_model=.*none' cannot be loaded"):
        similarity.embeddings("./none", ("a",))
    T5Model(T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match=r"t5' gives no hidden states of texts \(.*pass an encoder"):
        similarity.embeddings(str(tmp_path / "t5"), ("the film",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_demo": 0}, "num_demo=0 is out of range"),
        ({"num_sample": 0}, "num_sample=0 is out of range"),
        ({"demo_filter": 0.0}, r"demo_filter=0.0 is not in \(0, 1\]"),
        ({"demo_filter_model": "x"}, "--demo_filter_model has no effect without a filter; pass"),
        ({"num_demo": 3}, "class 'negative' has 3 training rows, too few for num_demo=3 and the row itself"),
        ({"max_seq_length": 20}, r"the 2 demonstrations of row 0 .* take 1\d tokens, .* max_seq_length=20"),
        ({"pad_to_max_length": True}, "--pad_to_max_length is not supported with demonstrations"),
    ],
)  # fmt: skip
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        encode(**options)


def test_models_whose_rows_have_their_own_options_have_no_demonstrations():
    with pytest.raises(
        InputError, match=r"has its own options, but demonstrations need common label words; pass --few"
    ):
        encode(prompt=PromptConfig(template=TEMPLATE, mask_token_id=tiny_tokenizer().mask_token_id))


def test_options_of_demonstrations_need_demonstrations():
    for options in ({"num_demo": 2}, {"num_sample": 2}, {"demo_filter": 0.5}):
        with pytest.raises(InputError, match=f"--{next(iter(options))} .* is for prompts, .* pass .* prompt-demo"):
            check_prompt_options(DataArguments(few_shot_type="prompt", **options))
    check_prompt_options(DataArguments(few_shot_type="prompt-demo", num_demo=2, template="x"))


@pytest.mark.parametrize("num_sample", [1, 3])
@torch.no_grad()
def test_calibration_subtracts_the_mean_over_contexts_of_an_empty_text(num_sample):
    model = prompt_model()
    rows = Dataset.from_dict({"sentence": TEXTS, "label": LABELS})
    task = TASKS["sst2"]
    names = ["label bad", "label good"]
    data = TaskData(task, rows, {}, {}, names, task.problem_type, task.metric, ("sentence",))
    arguments = DataArguments(
        few_shot_type="prompt-demo",
        num_sample=num_sample,
        max_seq_length=60,
        demo_filter=0.5,
        demo_filter_model="none",
    )
    ids = torch.tensor([tiny_tokenizer()("the film it was [MASK] .")["input_ids"]])
    before = model(input_ids=ids).logits
    calibrate(model, tiny_tokenizer(), data, arguments, data_seed=7)
    # by hand: each context as one text, without padding
    network, words = masked_lm(), tiny_tokenizer().convert_tokens_to_ids(["bad", "good"])
    total = torch.zeros(2)
    for sample in range(num_sample):
        context = "[CLS] it was [MASK] . [SEP]"
        for label, word in enumerate(["bad", "good"]):
            pool = [text for text, own in zip(TEXTS, LABELS, strict=True) if own == label]
            number = hashlib.sha256(f"7 content-free 0 {sample} {label} 0".encode()).digest()[:8]
            context += f" {pool[int.from_bytes(number) % len(pool)]} it was {word} . [SEP]"
        tokens = tiny_tokenizer()(context, add_special_tokens=False)["input_ids"]
        place = tokens.index(tiny_tokenizer().mask_token_id)
        total += network(input_ids=torch.tensor([tokens])).logits[0, place, words]
    assert torch.allclose(torch.tensor(model.config.word_bias), total / num_sample, atol=1e-5)
    assert torch.allclose(model(input_ids=ids).logits, before - total / num_sample, atol=1e-5)
