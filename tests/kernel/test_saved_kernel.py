"""A solved kernel predicts from its folder: in a trainer, in the launcher, and by `load_kernel`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from kernel_runs import make
from safetensors.torch import load_file, save_file
from tiny import (
    one_layer_model,
    save_masked_lm,
    text_dataset,
    tiny_dataset,
    tiny_masked_lm,
    tiny_tokenizer,
    write_texts,
)
from transformers import AutoModelForSequenceClassification, BertModel

import run_glue
from hf_ft_ext import (
    KernelTrainer,
    KernelTrainingArguments,
    PromptEncoder,
    PromptForSequenceClassification,
    load_kernel,
)
from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.saved.record import COEFFICIENTS, SOLUTION, TRAINING

LORA = {"kernel_peft": "lora", "kernel_peft_config": {"r": 2, "target_modules": ["query"]}}
PROJECTED = {"kernel_engine": "projected", "kernel_dimension": 64, "seed": 5}
ASYM = {"kernel_formula": "asymmetric_signgd", "kernel_solver": "asym"}
TEMPLATE = "*cls**sent_0*_it_was*mask*.*sep+*"


def collated(dataset):
    return tiny_tokenizer().pad(dataset.remove_columns("labels").to_dict(), return_tensors="pt")


def multi_label_rows(n: int, seed: int = 0) -> Dataset:
    rows = tiny_dataset(n, seed=seed)
    labels = [[float(sum(ids) % 2), float(ids[1] % 2), float(len(ids) % 2)] for ids in rows["input_ids"]]
    return rows.remove_columns("labels").add_column("labels", labels)


def data(kind: str):
    if kind == "multi-label":
        return {"train": multi_label_rows(12), "evaluation": multi_label_rows(7, seed=1)}
    options = {"num_labels": 3} if kind == "three" else {"regression": kind == "scores"}
    return {"train": tiny_dataset(12, **options), "evaluation": tiny_dataset(7, seed=1, **options)}


def model(kind: str):
    multi = {"num_labels": 3, "problem_type": "multi_label_classification"}
    scores = {"num_labels": 1, "problem_type": "regression"}
    return one_layer_model(**{"three": {"num_labels": 3}, "multi-label": multi, "scores": scores}.get(kind, {}))


def same_predictions(folder: Path, trainer, evaluation, **options):
    """A trainer and a predictor from `folder` predict what the trainer that solved predicts, and compute no kernel of
    training rows with themselves. Returns what the predictor found."""
    wanted = trainer.predict(evaluation)
    again = KernelTrainer.from_folder(
        folder, eval_dataset=evaluation, compute_metrics=trainer.compute_metrics, **options
    )
    computed = []
    projected = again.source.computation.projected
    if projected is None:
        run = again.source.computation.run
        again.source.computation.run = lambda first, other, *rest: computed.append(other) or run(first, other, *rest)
    else:
        project = projected.project
        projected.project = lambda rows, *rest: computed.append(rows) or project(rows, *rest)
    # all but the place in memory is the same, on which the last bit of a matrix product depends
    predicted = again.predict(evaluation)
    np.testing.assert_allclose(predicted.predictions, wanted.predictions, rtol=1e-12, atol=1e-15)
    assert predicted.metrics["test_loss"] == pytest.approx(wanted.metrics["test_loss"], rel=1e-12)
    assert [None if rows is None else len(rows) for rows in computed] == [len(evaluation)]
    assert not (folder / "kernels").exists() or trainer.args.output_dir == str(folder)
    found = load_kernel(folder, batch_size=8, **options)(collated(evaluation))
    np.testing.assert_allclose(found.logits.numpy(), wanted.predictions, rtol=1e-6, atol=1e-9)
    return found


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("two", {}),
        ("two", {"kernel_solver": "logistic"}),
        ("two", {"kernel_solver": "svc", "binary_classification": False}),
        ("two", {"adjust_for_init": True, "f0_scaling": 2.0, "kernel_regularization": "auto"}),
        ("two", {"adjust_for_init": True, "kernel_time": 5.0}),
        ("two", {**LORA, "adjust_for_init": True}),
        ("two", {**LORA, "random_model_init": True, "seed": 7}),
        ("two", {"random_model_init": True, "seed": 7, "only_biases": True}),
        ("two", {"kernel_formula": "asymmetric_signgd", "exclude_head": True, "kernel_regularization": "0.1"}),
        ("two", ASYM),
        ("two", PROJECTED),
        ("two", {**PROJECTED, **LORA, "adjust_for_init": True}),
        ("three", {**PROJECTED, "kernel_classes": "shared", "kernel_regularization": "0.01"}),
        ("three", {**PROJECTED, "kernel_classes": "pseudo", "kernel_solver": "svr"}),
        ("three", {"kernel_classes": "shared"}),
        ("three", {"kernel_classes": "pseudo", "seed": 3}),
        ("three", {"kernel_classes": "by_class", "kernel_solver": "svr"}),
        ("three", {"kernel_solver": "logistic", "kernel_formula": "signgd"}),
        ("three", {"kernel_solver": "svc"}),
        ("three", {**ASYM, "kernel_lambda": 0.2, "kernel_gamma": 2.0}),
        ("scores", {"kernel_solver": "svr", "kernel_svm_c": 3.0}),
        ("scores", {}),
        ("multi-label", {}),
        ("multi-label", {"kernel_solver": "logistic"}),
        ("multi-label", ASYM),
    ],
)
def test_predictions_from_a_folder_equal_those_of_the_trainer_that_solved(tmp_path, kind, settings):
    model(kind).double().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "out", base, **data(kind), **settings)
    trainer.compute_metrics = None
    trainer.train()
    trainer.save_model()
    found = same_predictions(tmp_path / "out", trainer, trainer.eval_dataset)
    names = set(trainer.model.config.id2label.values())
    assert (found.probabilities is not None) == (settings.get("kernel_solver") == "logistic")
    if kind == "scores":
        assert found.labels is None and found.logits.shape == (7, 1)
    elif kind == "multi-label":
        chosen = [[f"LABEL_{c}" for c in range(3) if row[c] >= 0] for row in found.logits]
        assert found.labels == chosen
    else:
        assert found.labels == [f"LABEL_{i}" for i in found.logits.argmax(1)] and set(found.labels) <= names
        if found.probabilities is not None:
            torch.testing.assert_close(found.probabilities.sum(1), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("solved, passed", [({}, PROJECTED), (PROJECTED, {"kernel_engine": "jacobian"})])
def test_engines_that_differ_from_the_solved_kernel_are_refused(tmp_path, solved, passed):
    one_layer_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "out", base, **solved)
    trainer.train()
    trainer.save_model()
    args = KernelTrainingArguments(str(tmp_path / "new"), **passed)
    with pytest.raises(InputError, match=f"kernel_engine={passed['kernel_engine']} was passed, but the kernel"):
        KernelTrainer.from_folder(tmp_path / "out", args)


def test_solved_kernel_can_be_saved_again_and_moved(tmp_path):
    one_layer_model().save_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "out", AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), **LORA)
    trainer.train()
    trainer.save_model()
    KernelTrainer.from_folder(tmp_path / "out").save_model(tmp_path / "second")
    shutil.rmtree(tmp_path / "out" / "kernels")
    shutil.move(tmp_path / "second", tmp_path / "third")
    same_predictions(tmp_path / "third", trainer, trainer.eval_dataset)


def test_prompt_models_and_models_in_bfloat16(tmp_path):
    prompt = PromptForSequenceClassification.from_masked_lm(
        tiny_masked_lm(), tiny_tokenizer(), TEMPLATE, ["bad", "good"]
    )
    encode = PromptEncoder(tiny_tokenizer(), TEMPLATE, 1, 32)

    def rows(n, seed):
        texts = text_dataset(n, seed=seed)
        encoded = encode([[" ".join(t.split()[: 2 + i % 6]) for i, t in enumerate(texts["sentence"])]])
        return Dataset.from_dict({**encoded, "labels": texts["label"]})

    for name, base in (("float32", prompt), ("bfloat16", prompt.to(torch.bfloat16))):
        settings = {"adjust_for_init": True, "kernel_regularization": "1e-2"}
        trainer = make(tmp_path / name, base, rows(12, 0), rows(7, 1), **settings)
        trainer.train()
        trainer.save_model()
        same_predictions(tmp_path / name, trainer, trainer.eval_dataset)
    assert load_file(tmp_path / "bfloat16" / TRAINING)["input_ids.values"].dtype == torch.int64
    assert load_kernel(tmp_path / "bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("columns", [1, 2])
def test_kernel_of_a_user_function_is_saved_and_loaded(tmp_path, columns):
    """Any scalars of any module: the first hidden entries of a base model at the first position."""

    def scalars(model, batch):
        found = model(**batch).last_hidden_state[:, 0, :columns]
        return found[:, 0] if columns == 1 else found

    def rows(n, seed):
        plain = tiny_dataset(n, seed=seed, regression=True)
        if columns == 1:
            return plain
        labels = [[value, -value] for value in plain["labels"]]
        return plain.remove_columns("labels").add_column("labels", labels)

    config = one_layer_model().config
    torch.manual_seed(0)
    settings = {"function": scalars, "adjust_for_init": True, "kernel_regularization": "1e-3"}
    trainer = make(tmp_path, BertModel(config).double(), rows(12, 0), rows(7, 1), **settings)
    trainer.compute_metrics = None
    trainer.train()
    found = trainer.predict(trainer.eval_dataset)
    assert found.predictions.shape == (7, columns) and not (tmp_path / "kernels").exists()
    # the oracle: Jacobians of these scalars by autograd, one row at a time
    base, parameters = trainer.model, [p for p in trainer.model.parameters() if p.requires_grad]

    def jacobian(dataset):
        starts, gradients = [], []
        for row in dataset:
            batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask")}
            values = scalars(base.eval(), batch).reshape(-1)
            starts.append(values.detach().numpy())
            for value in values:
                grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
                gradients.append(torch.cat([g.reshape(-1) for g in flat]).numpy())
        return np.stack(starts), np.stack(gradients)

    (f0, j0), (f1, j1) = jacobian(trainer.train_dataset), jacobian(trainer.eval_dataset)
    k = j0 @ j0.T
    y = np.array(trainer.train_dataset["labels"]).reshape(12, -1)
    alpha = np.linalg.solve(k + 1e-3 * np.linalg.norm(k, 2) * np.eye(len(k)), (y - f0).reshape(-1))
    np.testing.assert_allclose(found.predictions, f1 + (j1 @ j0.T @ alpha).reshape(7, -1), rtol=1e-6, atol=1e-8)

    trainer.save_model()
    with pytest.raises(
        InputError, match=r"scalars of a function \(.*scalars\), which is not saved with it; pass it as function"
    ):
        KernelTrainer.from_folder(tmp_path)
    with pytest.raises(InputError, match="which is not saved with it"):
        load_kernel(tmp_path, model=trainer.model)
    same_predictions(tmp_path, trainer, trainer.eval_dataset, function=scalars)
    wrong = make(tmp_path / "x", base, tiny_dataset(12), function=lambda m, b: m(**b).last_hidden_state[:, 0, :3])
    with pytest.raises(InputError, match="each row has 1 labels, but the kernel has 3 scalars per example"):
        wrong.train()


# --- the launcher -----------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts("train.csv", 40)
    write_texts("test.csv", 12, seed=1)
    one_layer_model().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    save_masked_lm("mlm")

    def call(*argv):
        words = ["--method", "kernel", "--test_file", "test.csv", "--max_seq_length", "32", "--use_cpu"]
        return run_glue.main([*words, "--disable_tqdm", "true", "--do_predict", *argv])

    return call


@pytest.mark.parametrize(
    "words",
    [
        ("--model_name_or_path", "base", "--kernel_solver", "svc"),
        ("--model_name_or_path", "base", "--kernel_peft", "lora", "--kernel_peft_config", '{"r": 2}'),
        ("--model_name_or_path", "mlm", "--few_shot_type", "prompt", "--template", TEMPLATE,
         "--mapping", "{'0': 'bad', '1': 'good'}"),
    ],
)  # fmt: skip
def test_the_launcher_predicts_from_the_folder_of_a_run(launch, words, capsys, caplog):
    train = ("--train_file", "train.csv", "--num_k", "8", "--do_train", "--output_dir", "out")
    assert launch(*words, *train) == 0, capsys.readouterr().err
    assert "load it: load_kernel('out')" in capsys.readouterr().out
    shutil.rmtree("out/kernels")
    Path("train.csv").rename("elsewhere.csv")
    caplog.clear()
    again = ("--model_name_or_path", "out", "--validation_file", "test.csv", "--do_eval", "--output_dir", "again")
    assert launch(*again) == 0, capsys.readouterr().err
    assert "this_model_alone" not in caplog.text
    assert Path("again/predictions.tsv").read_text() == Path("out/predictions.tsv").read_text()
    first, second = (json.loads(Path(f, "run.json").read_text())["metrics"] for f in ("out", "again"))
    assert second["test_loss"] == first["test_loss"] and second["eval_accuracy"] == first["test_accuracy"]
    assert not list(Path("again").glob("*.safetensors"))
    assert launch("--model_name_or_path", "out", "--kernel_formula", "signgd", "--output_dir", "third") == 2
    assert "kernel_formula=signgd was passed, but the kernel in 'out' was solved with kernel_formula=sgd" in (
        capsys.readouterr().err
    )
    # another method would predict with the untrained model
    assert launch("--model_name_or_path", "out", "--method", "full", "--output_dir", "third") == 2
    assert "model_name_or_path='out' is the result of --method kernel, and the model in it is untrained; pass" in (
        capsys.readouterr().err
    )
    with open("test.csv", "a") as file:
        file.write("the film,maybe\n")
    assert launch("--model_name_or_path", "out", "--output_dir", "third") == 2
    assert "was solved for the labels 0, 1, but this data has 0, 1, maybe" in capsys.readouterr().err


# --- folders that cannot predict --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    trainer = make(folder)
    trainer.train()
    trainer.save_model()
    return folder


def damage_json(folder, **changes):
    record = json.loads((folder / SOLUTION).read_text())
    record = {key: value for key, value in {**record, **changes}.items() if value is not ...}
    (folder / SOLUTION).write_text(json.dumps(record))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def other_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "classifier.bias": tensors["classifier.bias"] + 1}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda f: (f / SOLUTION).unlink(),
            "holds no solved kernel .there is no kernel_solution.json.; pass the",
        ),
        (lambda f: (f / SOLUTION).write_text("{"), "kernel_solution.json cannot be read"),
        (lambda f: (f / SOLUTION).write_text("[]"), "it is not a JSON object"),
        (lambda f: damage_json(f, format=...), "was saved without its coefficients"),
        (lambda f: damage_json(f, format=99), "has format 99, but this version of hf_ft_ext reads 1"),
        (lambda f: damage_json(f, scalars=...), "kernel_solution.json lacks 'scalars'"),
        (lambda f: damage_json(f, solution="tree"), "kind 'tree' is unknown"),
        (lambda f: damage_json(f, solver={"solver": "lstsq"}), "does not describe a solved kernel"),
        (lambda f: damage_json(f, parameters=["none"]), "needs parameters that this model lacks .none"),
        (lambda f: (f / TRAINING).unlink(), "lacks kernel_training.safetensors, without which its kernel cannot"),
        (lambda f: flip(f / TRAINING), "kernel_training.safetensors is damaged or from another run"),
        (lambda f: flip(f / COEFFICIENTS), "kernel_solution.safetensors is damaged or from another run"),
        (other_weights, "the weights of this model are not those that the kernel in"),
        (lambda f: (f / "model.safetensors").unlink(), "the model of the kernel in .* cannot be loaded from there"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(tmp_path, finished, harm, message):
    shutil.copytree(finished, tmp_path / "copy")
    harm(tmp_path / "copy")
    with pytest.raises(InputError, match=message):
        load_kernel(tmp_path / "copy")
    with pytest.raises(InputError, match=message):
        KernelTrainer.from_folder(tmp_path / "copy")


def test_invalid_uses_of_a_folder_are_refused(tmp_path, finished):
    with pytest.raises(InputError, match="weights of this model are not those"):
        load_kernel(finished, model=one_layer_model(seed=5))
    with pytest.raises(InputError, match="leave train_dataset out"):
        KernelTrainer.from_folder(finished, train_dataset=tiny_dataset(4))
    with pytest.raises(InputError, match="was solved for the model's logits; leave function out"):
        load_kernel(finished, function=torch.sum)
    args = KernelTrainingArguments(str(tmp_path), kernel_solver="svr", report_to="none", use_cpu=True)
    with pytest.raises(InputError, match=r"kernel_solver=svr was passed, but the kernel in .* was solved .*=lstsq"):
        KernelTrainer.from_folder(finished, args)
    trainer = KernelTrainer.from_folder(finished)
    with pytest.raises(InputError, match="has no labels to solve with; make a KernelTrainer with training data"):
        trainer.train()
    with pytest.raises(InputError, match="linearize needs the train kernel and the labels"):
        trainer.linearize([1.0])
    predictor = load_kernel(finished)
    with pytest.raises(
        InputError, match="hold input_ids, but the kernel was solved with rows of attention_mask, input"
    ):
        predictor({"input_ids": torch.tensor([[1, 2]])})
    shutil.copytree(finished, tmp_path / "alone")
    for file in (tmp_path / "alone").glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        _ = load_kernel(tmp_path / "alone").tokenizer


def test_kernels_from_files_leave_no_solution_to_predict_with(tmp_path):
    first = make(tmp_path / "a", export_kernels=str(tmp_path / "files"))
    first.train()
    first.save_model(tmp_path / "b")
    second = make(tmp_path / "b", load_kernels=str(tmp_path / "files"))
    second.train()
    second.save_model()
    with pytest.raises(InputError, match=r"because it was solved with load_kernels\); solve it again"):
        load_kernel(tmp_path / "b")
    assert not (tmp_path / "b" / TRAINING).exists()
