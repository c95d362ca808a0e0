"""Settings, arguments and uses of KernelTrainer that are refused."""

import pytest
import torch
from kernel_runs import make
from tiny import one_layer_model, tiny_dataset

from hf_ft_ext import KernelTrainer, KernelTrainingArguments
from hf_ft_ext.errors import InputError


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kernel_formula": "adam"}, "kernel_formula='adam'; choose from: sgd, signgd"),
        (
            {"kernel_regularization": "-1"},
            "kernel_regularization must be a number of 0 or more, auto or loo, got '-1'",
        ),
        (
            {"kernel_regularization": "auto", "kernel_solver": "logistic"},
            "the logistic solver cross-validates its own",
        ),
        ({"kernel_lambda": 1.5}, r"kernel_lambda must be in \[0, 1\], got 1.5"),
        ({"kernel_gamma": 0}, "kernel_gamma must be above 0 and finite, got 0"),
        ({"f0_scaling": 2.0}, "f0_scaling=2.0 needs adjust_for_init"),
        ({"load_kernels": "x", "overwrite_kernels": True}, "leave overwrite_kernels out"),
        ({"load_kernels": "x", "only_biases": True}, "only_biases=True is about computing them; leave one of the two"),
        ({"load_kernels": "x", "kernel_dir": "y"}, "kernel_dir=y is about computing them"),
        ({"kernel_task_name": "x"}, "kernel_task_name=x is part of the names of files; pass load_kernels or export"),
        ({"kernel_peft_config": {"r": 1}}, "kernel_peft_config needs kernel_peft"),
        ({"kernel_peft_config": "{"}, "is not valid JSON"),
        ({"kernel_solver": "asym"}, "which kernel_formula=sgd does not give"),
        ({"kernel_regularization": "loo", "kernel_solver": "svr"}, "pass auto or a number, or leave it out"),
        (
            {"kernel_regularization": "loo", "kernel_formula": "asymmetric_signgd"},
            "loo needs kernel_solver=lstsq, a symmetric kernel",
        ),
        ({"kernel_classes": "some"}, "kernel_classes='some'; choose from: auto, full, by_class, shared, pseudo"),
        ({"kernel_time": 0.0, "adjust_for_init": True}, "kernel_time must be above 0 and finite, got 0.0"),
        ({"kernel_time": 1.0}, "pass adjust_for_init too"),
        ({"function": torch.sum, "kernel_dir": "x"}, "kernel_dir=x: kernels of a user's function are not stored"),
        ({"function": torch.sum, "kernel_solver": "svc"}, "kernel_solver=svc classifies, but the task is regression"),
        ({"function": torch.sum, "binary_classification": True}, "but the task has scores"),
        ({"kernel_parameters": "none at all"}, "no trainable parameter is left"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, **settings)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"learning_rate": 1e-3}, "learning_rate=0.001 steers a training loop"),
        ({"bf16": True}, "bf16=True steers"),
        ({"kernel_gamma": 2.0}, "kernel_gamma applies only to kernel_solver=asym, not lstsq"),
    ],
)
def test_arguments_without_effect_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        KernelTrainingArguments("x").check_given(given)
    with pytest.raises(InputError, match="random_model_init would undo from_linearhead"):
        KernelTrainingArguments("x", random_model_init=True).check_given({"from_linearhead": True})


def test_invalid_uses_are_refused(tmp_path):
    with pytest.raises(InputError, match="takes no steps; leave `optimizers` out"):
        KernelTrainer(one_layer_model(), optimizers=(torch.optim.SGD(one_layer_model().parameters()), None))
    with pytest.raises(InputError, match="call train"):
        make(tmp_path).evaluate()
    trainer = make(tmp_path)
    trainer.train()
    with pytest.raises(InputError, match="known length, but this is a stream"):
        trainer.evaluate(trainer.eval_dataset.to_iterable_dataset())
    with pytest.raises(InputError, match="leaves no checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="has no optimizer"):
        make(tmp_path).create_optimizer()
    data = tiny_dataset(8)
    one_class = data.select([i for i, label in enumerate(data["labels"]) if label == 0])
    with pytest.raises(InputError, match="no example of 'LABEL_1'"):
        make(tmp_path, train=one_class).train()
    model = one_layer_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient_checkpointing_disable"):
        make(tmp_path, model)


def with_labels(change, n=12, seed=0, **options):
    data = tiny_dataset(n, seed=seed, **options)
    return data.remove_columns("labels").add_column(
        "labels", [change(i, label) for i, label in enumerate(data["labels"])]
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_a_class_id_in_a_list_is_the_class_id(tmp_path, classes):
    found = []
    for number, change in enumerate((lambda i, label: label, lambda i, label: [label])):
        train, rows = (with_labels(change, 18, seed, num_labels=classes) for seed in (0, 1))
        trainer = make(
            tmp_path / str(number), one_layer_model(num_labels=classes), train, rows, kernel_regularization="auto"
        )
        found.append((trainer.train().training_loss, trainer.regularization, trainer.evaluate()["eval_loss"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("label", [-1, 7, -100])
def test_labels_to_evaluate_that_are_no_class_ids_are_named(tmp_path, label):
    rows = with_labels(lambda i, own: label if i == 3 else own)
    trainer = make(tmp_path, evaluation=rows)
    trainer.train()
    for evaluate in (trainer.evaluate, lambda: trainer.predict(rows)):
        with pytest.raises(InputError, match=f"label {label} of row 3 is not a class id"):
            evaluate()
    assert len(trainer.predict(rows.remove_columns("labels")).predictions) == 12


def test_several_labels_per_row_need_the_problem_type(tmp_path):
    rows = with_labels(lambda i, label: [1.0, float(label)])
    with pytest.raises(InputError, match=r"labels of shape \(12, 2\) .* set config.problem_type = "):
        make(tmp_path, train=rows).train()


def test_ratings_in_whole_numbers_are_read_back_from_files(tmp_path):
    settings = {"num_labels": 1, "problem_type": "regression"}
    data = tiny_dataset(12, num_labels=5)
    make(tmp_path, one_layer_model(**settings), data, export_kernels=str(tmp_path / "files")).train()
    make(tmp_path, one_layer_model(**settings), data, load_kernels=str(tmp_path / "files")).train()
