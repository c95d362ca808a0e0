"""KernelTrainer: predictions, sources of kernels, options, two processes."""

import gc
import json
import logging
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_runs import SETTINGS, make, run
from peft import LoraConfig, get_peft_model
from processes import two_ranks
from tiny import one_layer_model, tiny_dataset, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_ft_ext import KernelTrainer, empirical_ntk
from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel import store
from hf_ft_ext.kernel.arguments import ASYMMETRIC_REGULARIZATION
from hf_ft_ext.kernel.saved.record import NOT_TRAINED
from hf_ft_ext.kernel.solvers import KernelSystem, SolverOptions
from hf_ft_ext.training.runs.plan import training_plan


def collated(dataset):
    return tiny_tokenizer().pad(dataset.to_dict(), return_tensors="pt")


def test_predictions_are_those_of_the_kernel_and_the_solver(tmp_path):
    trainer = make(tmp_path, one_layer_model().double(), kernel_solver="lstsq", kernel_regularization="1e-3")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    output = trainer.train()
    train, other = collated(trainer.train_dataset), collated(trainer.eval_dataset)
    model = one_layer_model().double()
    kernel = empirical_ntk(model, train, binary_classification=True)[None].numpy()
    cross = empirical_ntk(model, train, other, binary_classification=True)[None].numpy()
    options = SolverOptions(solver=trainer.solved.options.solver, regularization=1e-3)
    expected = KernelSystem(options, kernel, train["labels"].numpy()).solve().predict(cross)
    result = trainer.predict(trainer.eval_dataset)
    np.testing.assert_allclose(result.predictions, np.hstack([-expected, expected]) / 2, rtol=1e-6)
    assert result.label_ids.tolist() == trainer.eval_dataset["labels"]
    accuracy = np.mean((expected[:, 0] > 0) == np.array(trainer.eval_dataset["labels"]))
    assert result.metrics["test_accuracy"] == accuracy == trainer.evaluate()["eval_accuracy"]
    assert {"train_loss", "kernel_rank", "kernel_condition", "train_runtime"} <= output.metrics.keys()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_saved_model_loads_with_a_record_of_the_solution(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, trainer.model.get_parameter(name))
    solution = json.loads((tmp_path / "kernel_solution.json").read_text())
    assert solution["kernel_formula"] == "sgd" and solution["training_rows"] == 12
    assert solution["rank"] == trainer.solved.rank


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_plain_load_reports_that_the_model_is_not_trained(tmp_path, adapter):
    one_layer_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "out", base, kernel_peft=adapter)
    trainer.save_model()
    assert NOT_TRAINED not in reported(tmp_path / "out")  # nothing was solved: an ordinary model
    trainer.train()
    trainer.save_model()
    assert NOT_TRAINED in reported(tmp_path / "out")
    assert trainer.loading_line() == f"load_kernel({str(tmp_path / 'out')!r})"


def reported(folder) -> str:
    """The log of transformers while it loads `folder`."""
    records = []
    logger = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    logging.getLogger("transformers.integrations.peft").addHandler(handler)
    try:
        AutoModelForSequenceClassification.from_pretrained(folder)
    finally:
        logger.removeHandler(handler)
        logging.getLogger("transformers.integrations.peft").removeHandler(handler)
    return "\n".join(records)


def test_a_second_run_computes_nothing(tmp_path, monkeypatch):
    first = make(tmp_path)
    first.train()
    metrics = first.evaluate()
    monkeypatch.setattr("hf_ft_ext.kernel.engines.structured.StructuredEngine.gradient_rows", None)
    again = make(tmp_path)
    again.train()
    assert again.evaluate()["eval_loss"] == metrics["eval_loss"]
    fresh = make(tmp_path, overwrite_kernels=True)
    with pytest.raises(TypeError):
        fresh.train()


def test_three_classes_and_scores_and_random_weights_and_adapters(tmp_path):
    data = {"train": tiny_dataset(15, num_labels=3), "evaluation": tiny_dataset(6, num_labels=3, seed=1)}
    trainer = make(tmp_path / "three", one_layer_model(num_labels=3), **data, kernel_solver="logistic")
    trainer.train()
    assert trainer.predict(data["evaluation"]).predictions.shape == (6, 3)

    scores = {"train": tiny_dataset(15, regression=True), "evaluation": tiny_dataset(6, regression=True, seed=1)}
    model = one_layer_model(num_labels=1, problem_type="regression")
    trainer = make(tmp_path / "scores", model, **scores, kernel_regularization="1e-6")
    trainer.compute_metrics = None
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0 and trainer.predict(data["evaluation"]).predictions.shape == (6, 1)

    trained = one_layer_model(seed=3)
    trainer = make(tmp_path / "random", trained, random_model_init=True, seed=7)
    same = make(tmp_path / "random", one_layer_model(seed=4), random_model_init=True, seed=7)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, same.model.get_parameter(name))
    assert not torch.equal(trainer.model.classifier.weight, trained.classifier.weight)
    trained.bert.embeddings.requires_grad_(False)
    frozen = make(tmp_path / "random", trained, random_model_init=True).trained_weights()
    assert not any("embeddings" in weight.name for weight in frozen) and len(frozen) > 10
    adapted = get_peft_model(one_layer_model(), LoraConfig(target_modules=["query"]))
    with pytest.raises(InputError, match="random_model_init makes the model anew, without its adapters"):
        make(tmp_path / "random", adapted, random_model_init=True)

    trainer = make(tmp_path / "lora", kernel_peft="lora", kernel_peft_config='{"r": 2, "target_modules": ["query"]}')
    trainer.train()
    names = set(trainer.source.computation.parameters)
    assert any("lora_B" in name for name in names) and any("classifier" in name for name in names)
    assert all("lora" in name or "classifier" in name or "pooler" in name for name in names)


def test_adjust_for_init_adds_the_initial_outputs(tmp_path):
    settings = {"adjust_for_init": True, "f0_scaling": 2.0, "kernel_regularization": "1e-2"}
    trainer = make(tmp_path, one_layer_model().double(), **settings)
    trainer.train()
    found = trainer.source.start(trainer.eval_dataset, "dev")
    with torch.no_grad():
        logits = (
            one_layer_model()
            .double()
            .eval()(**{k: v for k, v in collated(trainer.eval_dataset).items() if k != "labels"})
        )
    np.testing.assert_allclose(found[:, 0], (logits.logits[:, 1] - logits.logits[:, 0]).numpy(), rtol=1e-9)
    plain = trainer.solved.predict(trainer.source.kernel(trainer.eval_dataset, "dev"))
    predictions = trainer.predict(trainer.eval_dataset).predictions
    np.testing.assert_allclose(predictions[:, 1] - predictions[:, 0], plain[:, 0] + found[:, 0] / 2, rtol=1e-9)


def test_the_default_regularization(tmp_path):
    for settings, expected in (
        ({"kernel_regularization": "0"}, 0.0),
        ({"kernel_formula": "asymmetric_signgd"}, ASYMMETRIC_REGULARIZATION),
        ({"kernel_solver": "svr"}, 0.0),
        ({"kernel_solver": "svc"}, 0.0),
        ({"kernel_time": 3.0, "adjust_for_init": True}, 0.0),
    ):
        trainer = make(tmp_path, **settings)
        assert trainer.train().metrics["kernel_regularization"] == trainer.regularization == expected
    default, named = (
        make(tmp_path, adjust_for_init=True),
        make(tmp_path, adjust_for_init=True, kernel_regularization="loo"),
    )
    assert default.train().metrics["kernel_regularization"] == named.train().metrics["kernel_regularization"]
    # the oracle: as many trainings as there are rows, each with the norm of the whole kernel
    kernel = default.source.kernel(default.train_dataset, "train")[0, :, 0, :, 0]
    start = default.source.start(default.train_dataset, "train")[:, 0]
    y = 2.0 * np.array(default.train_dataset["labels"]) - 1 - start
    errors = {}
    for r in (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0):
        matrix, residuals = kernel + r * np.linalg.norm(kernel, 2) * np.eye(12), []
        for i in range(12):
            rest = np.arange(12) != i
            alpha = np.linalg.solve(matrix[np.ix_(rest, rest)], y[rest])
            residuals.append(y[i] - kernel[rest, i] @ alpha)
        errors[r] = np.mean(np.square(residuals))
    assert default.regularization == min(errors, key=errors.get)


def test_an_ill_conditioned_kernel_does_not_predict_noise(tmp_path):
    """The kernel over the classifier only: its rank is at most 33, and less to working precision."""
    found = {}
    for value in (None, "0"):
        settings = {} if value is None else {"kernel_regularization": value}
        data = {"train": tiny_dataset(60), "evaluation": tiny_dataset(40, seed=1)}
        trainer = make(tmp_path, kernel_parameters="classifier", **data, **settings)
        trainer.train()
        found[value] = trainer.evaluate()["eval_loss"]
    assert found[None] < 2 < found["0"]


def test_regularization_is_chosen_on_the_evaluation_data(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    chosen = make(tmp_path, kernel_regularization="auto")
    chosen.train()
    assert "the best of 0.0, 1e-06" in caplog.text
    results = {}
    for value in ("0", "1e-3", "1"):
        other = make(tmp_path, kernel_regularization=value)
        other.train()
        metrics = other.evaluate()
        results[value] = (metrics["eval_accuracy"], -metrics["eval_loss"])
    metrics = chosen.evaluate()
    assert (metrics["eval_accuracy"], -metrics["eval_loss"]) >= max(results.values())
    nothing = make(tmp_path, kernel_regularization="auto")
    nothing.eval_dataset = None
    with pytest.raises(InputError, match="auto chooses on evaluation data"):
        nothing.train()


def test_the_pseudo_kernel_is_the_shared_one_on_average(tmp_path):
    data = {"train": tiny_dataset(9, num_labels=3), "evaluation": tiny_dataset(5, num_labels=3, seed=1)}
    model, inputs = one_layer_model(num_labels=3).double(), collated(data["train"])
    inputs.pop("labels")
    whole = empirical_ntk(model, inputs).numpy()
    kernels = []
    for seed in range(3):
        trainer = make(tmp_path, model, **data, kernel_classes="pseudo", seed=seed)
        trainer.train()
        kernels.append(trainer.source.kernel(trainer.train_dataset, "train")[0, :, 0, :, 0])
        assert trainer.predict(trainer.eval_dataset).predictions.shape == (5, 3)
    # all signs of three classes: e and -e give the same kernel, so there are four
    signs = [np.array([1, a, b]) for a in (-1, 1) for b in (-1, 1)]
    expected = [np.einsum("a,iajb,b->ij", e, whole, e) / 3 for e in signs]
    for kernel in kernels:
        assert min(np.abs(kernel - one).max() for one in expected) <= 1e-9 * np.abs(whole).max()
    np.testing.assert_allclose(sum(expected) / 4, np.einsum("icjc->ij", whole) / 3, rtol=1e-9, atol=1e-12)
    assert len({round(float(kernel[0, 1]), 9) for kernel in kernels}) > 1


@pytest.mark.parametrize("name", ["sgd", "projected"])
def test_coefficients_keep_their_training_rows(tmp_path, name):
    """A trainer whose training data are replaced predicts, linearizes and saves with those that it has solved."""
    model = one_layer_model().double()
    trainer = make(tmp_path / "own", model, **SETTINGS[name])
    trainer.train()
    # a folder of its own, so that it computes its kernels itself
    same = make(tmp_path / "replaced", model, **SETTINGS[name])
    same.train()
    same.train_dataset = tiny_dataset(12, seed=5)
    other = tiny_dataset(4, seed=8)
    expected = trainer.predict(other).predictions
    np.testing.assert_array_equal(same.predict(other).predictions, expected)
    np.testing.assert_array_equal(same.linearize([2.0], other), trainer.linearize([2.0], other))
    same.save_model()
    loaded = KernelTrainer.from_folder(tmp_path / "replaced")
    np.testing.assert_allclose(loaded.predict(other).predictions, expected, rtol=1e-9)
    same.train()  # with the new rows
    assert np.abs(same.predict(other).predictions - expected).max() > 1e-3


def test_linearized_model_matches_gradient_descent(tmp_path):
    """Full-batch gradient descent on the linearized model itself, its outputs by `torch.func`."""
    model = one_layer_model().double()
    trainer = make(tmp_path, model)
    trainer.train()
    train, other = collated(trainer.train_dataset), collated(trainer.eval_dataset)
    y = 2.0 * train.pop("labels").double() - 1
    other.pop("labels")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval().set_attn_implementation("eager")

    def scalars(batch):
        def outputs(parameters):
            logits = torch.func.functional_call(model, parameters, kwargs=dict(batch)).logits
            return logits[:, 1] - logits[:, 0]

        return outputs

    kernel = trainer.source.kernel(trainer.train_dataset, "train")[0, :, 0, :, 0]
    rate, steps = 0.02 * 12 / np.linalg.norm(kernel, 2), 150
    jacobian = torch.func.jacrev(scalars(train))(start)
    jacobian = torch.cat([jacobian[name].flatten(1) for name in start], 1)
    values, flat = scalars(train)(start), torch.zeros(jacobian.shape[1], dtype=torch.float64)
    for _ in range(steps):
        # of 1 / (2 N) sum (f - y)^2 with f = f_0 + J (theta - theta_0)
        flat -= rate * jacobian.T @ (values + jacobian @ flat - y) / 12
    parts = flat.split([p.numel() for p in start.values()])
    moved = {name: part.view_as(start[name]) for name, part in zip(start, parts, strict=True)}
    for dataset, batch in ((trainer.eval_dataset, other), (trainer.train_dataset, train)):
        values, change = torch.func.jvp(scalars(batch), (start,), (moved,))
        found = trainer.linearize([0.0, rate * steps, np.inf], dataset)
        assert found.shape == (3, len(dataset), 1)
        np.testing.assert_allclose(found[0, :, 0], values.numpy(), rtol=1e-9)
        # a step is a step, not a flow: 1 - rate k and exp(-rate k) differ by (rate k)^2 / 2 each
        np.testing.assert_allclose(found[1, :, 0], (values + change).numpy(), atol=2e-3)
        assert np.abs(found[1] - found[0]).max() > 0.03 < np.abs(found[1] - found[2]).max()
    np.testing.assert_allclose(found[2, :, 0], y.numpy(), atol=1e-6)  # the training rows, at the end
    solved = make(tmp_path, model, adjust_for_init=True, kernel_time=rate * steps)
    solved.train()
    margin = np.diff(solved.predict(solved.eval_dataset).predictions, axis=1)
    np.testing.assert_allclose(margin, trainer.linearize([rate * steps])[0], rtol=1e-9)
    with pytest.raises(InputError, match="times must be 0 or more, got -1"):
        trainer.linearize([-1])
    signs = make(tmp_path, kernel_formula="signgd")
    with pytest.raises(InputError, match="linearize describes training by sgd, but kernel_formula=signgd"):
        signs.linearize([1.0])


@pytest.mark.parametrize(
    ("formula", "dtype", "stored"),
    [
        ("sgd", torch.float32, torch.bfloat16),
        pytest.param("sgd", torch.float32, torch.float16, id="float16"),
        ("signgd", torch.float64, torch.bfloat16),
    ],
)
def test_outputs_at_the_start_are_computed_as_the_kernel_is(tmp_path, formula, dtype, stored):
    half = one_layer_model().to(stored)
    trainer = make(tmp_path, half, kernel_formula=formula, adjust_for_init=True)
    trainer.train()
    batch = {key: value for key, value in collated(trainer.eval_dataset).items() if key != "labels"}
    with torch.no_grad():
        wide = one_layer_model().to(stored).to(dtype).eval()(**batch).logits.double()
        narrow = one_layer_model().to(stored).eval()(**batch).logits.double()
    found = trainer.source.start(trainer.eval_dataset, "dev")[:, 0]
    np.testing.assert_allclose(found, (wide[:, 1] - wide[:, 0]).numpy(), rtol=1e-4, atol=1e-7)
    assert np.abs(found - (narrow[:, 1] - narrow[:, 0]).numpy()).max() > 1e-5
    assert half.dtype == stored


def test_rows_of_evaluation_data_are_freed(tmp_path):
    settings = {"kernel_regularization": "1e-2", "adjust_for_init": True}
    trainer = make(tmp_path, **settings)
    trainer.train()
    seen, rows_of = [], trainer.source.rows

    def watched(dataset):
        rows = rows_of(dataset)
        seen.append(weakref.ref(rows))
        return rows

    trainer.source.rows = watched
    for seed in range(3):  # each one made where the last one lay, maybe
        data = tiny_dataset(5, seed=seed).to_list()
        fresh = make(tmp_path / "fresh", **settings)
        fresh.train()
        expected = fresh.predict(tiny_dataset(5, seed=seed)).predictions
        np.testing.assert_array_equal(trainer.predict(data).predictions, expected)
        del data, fresh
    gc.collect()
    alive = {id(ref()) for ref in seen if ref() is not None}
    assert alive == {id(rows_of(trainer.train_dataset))} and len(seen) > 4


def test_authors_files_are_loaded_and_exported(tmp_path):
    trainer = make(tmp_path / "a", export_kernels=str(tmp_path / "files"), kernel_task_name="sst-2")
    trainer.train()
    metrics = trainer.evaluate()
    assert sorted(os.listdir(tmp_path / "files")) == ["dev_kernels_sst-2.pt", "train_kernels_sst-2.pt"]
    loaded = make(tmp_path / "b", one_layer_model(seed=5), load_kernels=str(tmp_path / "files"))  # of another model
    loaded.train()
    assert loaded.evaluate()["eval_loss"] == metrics["eval_loss"] and not (tmp_path / "b" / "kernels").exists()

    with pytest.raises(InputError, match=r"holds no test_kernels_<task>.pt"):
        loaded.predict(trainer.eval_dataset)
    kernel, labels = store.read_kernel(tmp_path / "files", "dev", "sst-2")
    store.write_kernel(tmp_path / "files", "dev", "sst-2", kernel, 1 - labels)
    with pytest.raises(InputError, match="has other labels than the dev data"):
        loaded.evaluate()
    store.write_kernel(tmp_path / "files", "dev", "sst-2", kernel[:, :5], labels)
    with pytest.raises(InputError, match=r"holds a kernel of shape \(1, 5, 1, 7, 1\)"):
        loaded.evaluate()
    store.write_kernel(tmp_path / "files", "train", "mr", kernel, labels)
    with pytest.raises(InputError, match=r"holds kernels of several tasks .mr, sst-2."):
        loaded.train()


def test_plain_arguments_and_the_plan(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = KernelTrainer(one_layer_model(), args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer())
    assert isinstance(trainer, Trainer) and trainer.args.kernel_formula == "sgd"
    plan = training_plan(trainer)
    assert plan.trainable == sum(p.numel() for p in trainer.model.parameters())
    assert plan.memory["gradients"] == plan.memory["optimizer state"] == plan.memory["activations"] == 0


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    for name in SETTINGS:
        np.save(tmp_path / f"{name}.npy", run(tmp_path / name, name)[1])
    two_ranks(Path(__file__).with_name("kernel_ranks.py"), str(tmp_path))
