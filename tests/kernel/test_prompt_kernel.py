"""Kernels of prompt models, and kernels that start from a linear head."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_masked_lm, text_dataset, tiny_masked_lm, tiny_tokenizer, write_texts

import run_glue
from hf_ft_ext import (
    PromptEncoder,
    PromptForSequenceClassification,
    empirical_ntk,
    example_gradients,
    fisher_information,
)
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows

TEMPLATE = "*cls**sent_0*_it_was*mask*.*sep+*"


def prompt_model(model_type="bert", **options):
    return PromptForSequenceClassification.from_masked_lm(
        tiny_masked_lm(model_type), tiny_tokenizer(), TEMPLATE, ["bad", "good"], **options
    ).double()


def encoded(n, seed):
    tokenizer = tiny_tokenizer()
    sentences = [" ".join(s.split()[: 2 + i]) for i, s in enumerate(text_dataset(n, seed=seed)["sentence"])]
    return dict(tokenizer.pad(PromptEncoder(tokenizer, TEMPLATE, 1, 32)([sentences]), return_tensors="pt"))


@pytest.mark.parametrize("formula", ["sgd", "signgd", "asymmetric_signgd"])
@pytest.mark.parametrize("model_type, untied", [("bert", False), ("roberta", True)])
def test_structured_equals_jacobian(model_type, untied, formula):
    model = prompt_model(model_type, untie_words=untied)
    left, right = encoded(4, 0), encoded(6, 1)
    expected = empirical_ntk(model, left, right, formula, "jacobian")
    found = empirical_ntk(model, left, right, formula, "structured")  # no parameter without a rule
    assert found.shape[-4:] == (4, 2, 6, 2)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert formula != "signgd" or torch.equal(found, expected)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_rows_whose_mask_is_far_from_their_start(model_type):
    """The rules are verified on the first tokens of two rows, without their mask."""
    model, tokenizer = prompt_model(model_type), tiny_tokenizer()
    texts = [" ".join(text.split() * 4) for text in text_dataset(5)["sentence"]]
    rows = PromptEncoder(tokenizer, TEMPLATE, 1, 60)([texts])
    assert all(row.index(tokenizer.mask_token_id) > 30 for row in rows["input_ids"])
    batch = dict(tokenizer.pad(rows, return_tensors="pt"))
    expected = empirical_ntk(model, batch, batch, "sgd", "jacobian")
    torch.testing.assert_close(
        empirical_ntk(model, batch, batch, "sgd", "structured"), expected, rtol=1e-9, atol=1e-12
    )
    (found,) = example_gradients(model, batch, lambda model, inputs: model(**inputs).logits[:, 0])
    model(**{key: value[:1] for key, value in batch.items()}).logits[0, 0].backward()
    for name, parameter in model.named_parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found.gradients[name][0], own, rtol=1e-8, atol=1e-12)

    batch["labels"] = torch.arange(len(texts)) % 2
    information = fisher_information(model, [batch], progress=False)
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for i in range(len(texts)):
        model.zero_grad()
        model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.backward()
        for name, parameter in model.named_parameters():
            expected[name] += 0 if parameter.grad is None else parameter.grad.square()
    torch.testing.assert_close(information, expected, rtol=1e-9, atol=1e-14)


def test_rows_of_several_contexts():
    model = prompt_model()
    batch = encoded(6, 0)
    contexts = {key: value.view(3, 2, -1) for key, value in batch.items()}
    computation = KernelComputation(model, KernelOptions())
    found = computation.run(ExampleRows(contexts))[0]
    single = empirical_ntk(model, batch)
    mean = single.view(3, 2, 2, 3, 2, 2).mean((1, 4))  # logits are means over contexts, and so are gradients
    torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_training_rows_have_one_context_and_rows_to_evaluate_several(engine):
    """As with demonstrations: collated batches are of several lengths, and rows of different batches run together."""
    model = prompt_model()
    train, rows, cut = encoded(4, 1), encoded(6, 0), (8, 7, 9)
    single = empirical_ntk(model, train, rows, engine="jacobian").view(4, 2, 3, 2, 2).mean(3)
    batches = []
    for i, length in enumerate(cut):
        pair = {key: value[2 * i : 2 * i + 2] for key, value in rows.items()}
        length = max(length, int(pair["attention_mask"].sum(1).max()))
        batches.append({key: value[None, :, :length] for key, value in pair.items()})
    for size in (1, 2, 4):
        found = empirical_ntk(model, train, batches, engine=engine, batch_size=size)
        torch.testing.assert_close(found, single, rtol=1e-7, atol=1e-9)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts("train.csv", 80)
    write_texts("test.csv", 12, seed=1)
    save_masked_lm("mlm")

    def call(*argv):
        words = [
            "--method", "kernel", "--model_name_or_path", "mlm", "--train_file", "train.csv", "--test_file",
            "test.csv", "--num_k", "8", "--max_seq_length", "32", "--use_cpu", "--disable_tqdm", "true",
            "--kernel_regularization", "auto", "--do_train", "--do_eval", "--do_predict", "--output_dir", "out",
        ]  # fmt: skip
        return run_glue.main([*words, *argv])

    return call


@pytest.mark.parametrize("start", [(), ("--from_linearhead", "true")])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_launcher_with_prompts_and_with_a_linear_head(launch, prompt, start):
    mapping = ("--template", TEMPLATE, "--mapping", "{'0': 'bad', '1': 'good'}")
    words = ("--few_shot_type", "prompt", *mapping) if prompt else ()
    assert launch(*words, *start) == 0
    metrics = json.loads(Path("out/run.json").read_text())["metrics"]
    assert {"eval_accuracy", "test_accuracy", "kernel_rank"} <= metrics.keys()
    described = [json.loads(path.read_text()) for path in Path("out/kernels").glob("*/kernel.json")]
    assert len(described) == 3 and all(d["about"]["binary_classification"] for d in described)
