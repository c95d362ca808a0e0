"""Linear heads of full models: changed and unchanged weights, saving, as a method and as an initialization."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import classifier_rows, tiny_classifier
from datasets import Dataset
from decoders import TOKENIZER_OF, decoder, subword_tokenizer
from peft import PeftModel
from processes import two_ranks
from sklearn.linear_model import LogisticRegression
from tiny import (
    CONFIGS,
    save_masked_lm,
    text_dataset,
    tiny_dataset,
    tiny_masked_lm,
    tiny_model,
    tiny_tokenizer,
    write_texts,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    TrainingArguments,
)

import run_glue
from hf_ft_ext import (
    InputError,
    LinearHeadTrainer,
    LinearHeadTrainingArguments,
    PromptForSequenceClassification,
    fit_linear_head,
)
from hf_ft_ext.features.linear_probe import prepare_linear_head
from hf_ft_ext.lora.arguments import LoraTrainingArguments
from hf_ft_ext.lora.trainer import add_lora
from hf_ft_ext.training.runs.plan import training_plan

COLLATE = DataCollatorWithPadding(tiny_tokenizer())


def gpt2():
    config = GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=1, n_head=2, pad_token_id=0, num_labels=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2ForSequenceClassification(config)


def make(folder, model=None, dataset=None, **options):
    options = {"feature_cache_dir": str(folder / "features"), **options}
    args = LinearHeadTrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **options
    )
    return LinearHeadTrainer(
        model or tiny_model(),
        args,
        train_dataset=tiny_dataset(64) if dataset is None else dataset,
        eval_dataset=tiny_dataset(16, seed=1),
        processing_class=tiny_tokenizer(),
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", [*CONFIGS, "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_only_the_last_layer_changes_and_fits(tmp_path, kind, cached):
    model = gpt2() if kind == "gpt2" else tiny_model(kind)
    before = weights(model)
    trainer = make(tmp_path, model, feature_cache_gb=1.0 if cached else 0.0)
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    result = trainer.train()
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {
        f"{trainer.fitted.layer}.{part}" for part, _ in model.get_submodule(trainer.fitted.layer).named_parameters()
    }
    assert result.training_loss == pytest.approx(trainer.evaluate(trainer.train_dataset)["eval_loss"], rel=1e-3)
    assert result.training_loss < first
    assert (tmp_path / "features").exists() == cached
    trainer.save_model()
    inputs = {"input_ids": torch.arange(5, 25).view(2, 10)}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_head_equals_a_logistic_regression_of_its_features(tmp_path):
    model, data = tiny_model("bert").eval(), tiny_dataset(64)
    head = fit_linear_head(model, data, COLLATE, c=0.3)
    read = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    with torch.no_grad():
        for i in range(0, 64, 16):
            model(**{k: v for k, v in COLLATE([data[j] for j in range(i, i + 16)]).items() if k != "labels"})
    handle.remove()
    x, y = torch.cat(read).double().numpy(), np.array(data["labels"][:])
    scaled = (x - x.mean(0)) / x.std(0)
    plain = LogisticRegression(C=0.3, max_iter=5000, tol=1e-8).fit(scaled, y)
    with torch.no_grad():
        ours = model.classifier(torch.cat(read)).softmax(-1).numpy()
    np.testing.assert_allclose(ours, plain.predict_proba(scaled), atol=2e-3)
    assert (head.layer, head.rows, head.fit.c) == ("classifier", 64, 0.3)
    assert model.fresh_parameters == {"classifier.weight", "classifier.bias"}


def test_regression_and_plain_arguments(tmp_path):
    plain = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    model = tiny_model(num_labels=1, problem_type="regression")
    trainer = LinearHeadTrainer(
        model, plain, train_dataset=tiny_dataset(64, regression=True), processing_class=tiny_tokenizer()
    )
    trainer.args.feature_cache_gb = 0.0
    spread = float(np.var(tiny_dataset(64, regression=True)["labels"][:]))
    assert trainer.train().training_loss < spread
    assert isinstance(trainer.args, LinearHeadTrainingArguments)


def test_a_model_that_reads_sequences_is_refused():
    class Mean(type(tiny_model("distilbert"))):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            logits = self.classifier(self.distilbert(input_ids, attention_mask).last_hidden_state)
            return type(super().forward(input_ids=input_ids))(logits=logits.mean(1))

    model = tiny_model("distilbert")
    model.__class__ = Mean
    with pytest.raises(InputError, match="has no linear layer outside its encoder whose output is the logits"):
        fit_linear_head(model, tiny_dataset(16), COLLATE)


@pytest.mark.parametrize(("empty", "message"), [(1, "the logits of row 1"), (70, "the features of row 70")])
def test_a_row_without_tokens_is_named(empty, message):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("modernbert", vocab_size=60, classifier_pooling="mean", pad_token_id=0, **small)
    model = AutoModelForSequenceClassification.from_config(config)

    def collate(rows):
        batch = COLLATE(rows)
        batch["attention_mask"][[row["number"] == empty for row in rows]] = 0
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    data = tiny_dataset(80)
    with pytest.raises(InputError, match=f"{message} are not finite; remove rows without tokens"):
        fit_linear_head(model, data.add_column("number", list(range(80))), collate)


def test_model_init_and_plan(tmp_path):
    trainer = make(tmp_path)
    plan = training_plan(trainer)
    assert plan.trainable == 66 and plan.memory["gradients"] == plan.memory["activations"] == 0 and plan.steps == 1
    args = LinearHeadTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", feature_cache_gb=0.0)
    trainer = LinearHeadTrainer(
        args=args, model_init=lambda: tiny_model(), train_dataset=tiny_dataset(16), processing_class=tiny_tokenizer()
    )
    trainer.train()
    assert not torch.equal(trainer.model.classifier.weight, tiny_model().classifier.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linearhead_c": 0.0}, "linearhead_c must be above 0 and finite, got 0.0"),
        ({"linearhead_folds": 1}, "linearhead_folds must be 2 or more, got 1"),
        ({"linearhead_max_iter": 0}, "linearhead_max_iter must be 1 or more, got 0"),
        ({"feature_cache_gb": -1.0}, "feature_cache_gb must be 0 or more, got -1.0"),
        ({"linearhead_c": 1.0, "linearhead_folds": 3}, "linearhead_folds=3 is for the cross-validation that chooses"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, **options)


@pytest.mark.parametrize("name", ["linearhead_folds", "linearhead_max_iter"])
def test_options_of_logistic_regression_are_refused_in_a_regression(tmp_path, name):
    for problem in (None, "regression"):
        model = tiny_model(num_labels=1, problem_type=problem)
        with pytest.raises(InputError, match=f"{name}=3 is for logistic regression"):
            make(tmp_path, model, tiny_dataset(8, regression=True), **{name: 3})


@pytest.mark.parametrize("classes", [1, 3])
def test_one_label_in_a_list_is_the_label(tmp_path, classes):
    data = tiny_dataset(24, num_labels=3, regression=classes == 1)
    lists = data.remove_columns("labels").add_column("labels", [[label] for label in data["labels"]])
    found = [make(tmp_path, tiny_model(num_labels=classes), rows).train().training_loss for rows in (data, lists)]
    assert found[0] == found[1]


def test_as_many_numbers_as_outputs_are_needed(tmp_path):
    model = tiny_model(num_labels=3, problem_type="regression")
    with pytest.raises(InputError, match="each row has 1 numbers as labels, and the model 3 outputs"):
        make(tmp_path, model, tiny_dataset(8, regression=True)).train()


def test_unsupported_uses_are_refused(tmp_path):
    with pytest.raises(InputError, match="resume_from_checkpoint=True: a linear head is found at once"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="leave `optimizers` out"):
        LinearHeadTrainer(tiny_model(), None, optimizers=(torch.optim.SGD(tiny_model().parameters()), None))
    with pytest.raises(InputError, match="a linear head has no optimizer"):
        make(tmp_path).create_optimizer()
    with pytest.raises(InputError, match="needs a training data set of known length"):
        make(tmp_path, dataset=tiny_dataset(8).to_iterable_dataset()).train()
    with pytest.raises(InputError, match="the model carries PEFT adapters"):
        make(tmp_path, add_lora(tiny_model(), LoraTrainingArguments(str(tmp_path))))
    with pytest.raises(InputError, match="class 'LABEL_2' has no training rows"):
        make(tmp_path, tiny_model(num_labels=3)).train()
    with pytest.raises(InputError, match="the rows have no labels"):
        make(tmp_path, dataset=tiny_dataset(8).remove_columns("labels")).train()
    rows = tiny_dataset(24)
    rows = rows.remove_columns("labels").add_column("labels", [*rows["labels"][:-1], None])
    with pytest.raises(InputError, match="the labels of the rows are not numbers"):
        make(tmp_path, dataset=rows).train()
    for name in ("learning_rate", "num_train_epochs", "optim"):
        with pytest.raises(InputError, match=f"{name}=.* steers a training loop, and method linearhead has none"):
            LinearHeadTrainingArguments(str(tmp_path)).check_given({name: "x"})


# --- prompts, and a start for other methods, through the launcher -------------------------------------


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """The launcher on a tiny masked LM with few shots of made-up data; `launch(*argv) -> status`."""
    monkeypatch.chdir(tmp_path)
    data = text_dataset(80)
    data.select_columns(["sentence", "label"]).to_csv("train.csv")
    write_texts("test.csv", 12, seed=1)
    save_masked_lm("mlm")

    def call(*argv):
        return run_glue.main([*SHARED, *argv])

    return call


SHARED = (
    "--model_name_or_path", "mlm", "--train_file", "train.csv", "--test_file", "test.csv", "--num_k", "16",
    "--max_seq_length", "32", "--use_cpu", "--disable_tqdm", "true", "--do_train", "--do_eval",
)  # fmt: skip
PROMPT = (
    "--few_shot_type", "prompt", "--template", "*cls**sent_0*_it_was*mask*.*sep+*", "--mapping",
    "{'0': 'bad', '1': 'good'}",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "scoring", "message"),
    [
        ("t5", "first_token", "scaled and shared with both of its embeddings; pass a masked or causal language model"),
        ("gpt2", "sequence", "word_scoring=sequence reads .* pass word_scoring=first_token, or another method"),
    ],
)
def test_prompts_without_output_rows_of_their_own_are_refused(family, scoring, message):
    tokenizer = subword_tokenizer(TOKENIZER_OF[family])
    model = PromptForSequenceClassification.from_language_model(
        decoder(family, len(tokenizer)), tokenizer, "*sent_0*_It_was*mask*", ["bad", "great"], word_scoring=scoring
    )
    with pytest.raises(InputError, match=f"a linear head needs output rows for the label words alone.*{message}"):
        prepare_linear_head(model)


def test_prompt_head_is_untied_and_embeddings_do_not_change(launch):
    assert launch("--method", "linearhead", "--feature_cache_gb", "0", *PROMPT, "--output_dir", "out") == 0
    model = PromptForSequenceClassification.from_pretrained("out")
    assert model.config.untied_words and model.get_output_embeddings().weight.shape == (2, 32)
    torch.testing.assert_close(
        model.get_input_embeddings().weight, tiny_masked_lm().get_input_embeddings().weight, rtol=0, atol=0
    )
    record = json.loads(Path("out/run.json").read_text())
    assert record["trainable_parameters"] == 66 and record["metrics"]["train_score"] > 0.5


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("full", ()),
        ("lora", ()),
        ("sparse", ("--sparse_basis_steps", "2", "--sparse_density", "0.2")),
        ("gradientless", ("--feature_cache_gb", "0")),
    ],
)
@pytest.mark.parametrize("prompt", [(), PROMPT], ids=["head", "prompt"])
def test_every_method_starts_from_a_linear_head(launch, method, extra, prompt, capsys):
    """With a learning rate of 0 the method's model is the linear head's, saved and loaded."""
    quiet = ("--max_steps", "1", "--learning_rate", "0", "--save_strategy", "no")
    arguments = (
        "--method",
        method,
        *extra,
        *prompt,
        "--from_linearhead",
        *quiet,
        "--output_dir",
        "out",
        "--do_predict",
    )
    assert launch(*arguments) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("load it: "))
    assert launch("--method", "linearhead", "--feature_cache_gb", "0", *prompt, "--output_dir", "head") == 0
    found = json.loads(Path("out/run.json").read_text())["metrics"]
    expected = json.loads(Path("head/run.json").read_text())["metrics"]
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)

    names = {
        "PromptForSequenceClassification": PromptForSequenceClassification, "PeftModel": PeftModel,
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification, "AutoConfig": AutoConfig,
    }  # fmt: skip
    model = eval(line.removeprefix("load it: "), names).eval()
    plain = eval(
        f"{'Prompt' if prompt else 'AutoModel'}ForSequenceClassification.from_pretrained('head')", names
    ).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 8, 4, 3]])}
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_started_from_a_linear_head_resumes(launch, method):
    options = ("--method", method, *PROMPT, "--from_linearhead", "--max_steps", "4", "--save_steps", "2")
    assert launch(*options, "--output_dir", "a") == 0
    assert launch(*options, "--resume_from_checkpoint", "a/checkpoint-2", "--output_dir", "b") == 0
    (ours,), (theirs,) = (list(Path(name).glob("*.safetensors")) for name in ("a", "b"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_invalid_starts_are_refused(launch, capsys):
    assert launch("--method", "linearhead", "--from_linearhead", "--output_dir", "a") == 2
    assert "method linearhead fits that head itself; leave it out" in capsys.readouterr().err
    assert launch("--method", "full", "--from_linearhead", "--do_train", "false", "--output_dir", "a") == 2
    assert "--from_linearhead fits a head on the training data, to train on from it" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_get_the_head_of_the_first(launch):
    settings = ("--method", "linearhead", "--feature_cache_gb", "0", *PROMPT, "--do_predict")
    assert launch(*settings, "--output_dir", "one") == 0
    two_ranks(run_glue.main, *SHARED, *settings, "--output_dir", "two")
    one, two = (json.loads(Path(name, "run.json").read_text()) for name in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["metrics"]["eval_accuracy"] == two["metrics"]["eval_accuracy"]
    assert Path("one/predictions.tsv").read_text() == Path("two/predictions.tsv").read_text()
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["eurobert", "reformer"])
def test_heads_on_averaged_logits_and_on_wider_features(tmp_path, kind):
    """EuroBERT averages the logits of all tokens; Reformer's head reads twice its hidden size."""
    model = tiny_classifier(kind)
    before, rows = weights(model), {k: v for k, v in classifier_rows(24).items() if k != "labels"}
    dataset = Dataset.from_dict({**{k: v.tolist() for k, v in rows.items()}, "labels": [i % 2 for i in range(24)]})
    trainer = make(tmp_path, model, dataset)
    first = trainer.evaluate(dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(dataset)["eval_loss"] < first
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {f"{trainer.fitted.layer}.{part}" for part in ("weight", "bias")}
    if kind == "eurobert":
        with torch.no_grad():
            hidden = model.model(**rows).last_hidden_state
            features = model.activation(model.dense(hidden)).mean(1)
            torch.testing.assert_close(model.classifier(features), model(**rows).logits)
