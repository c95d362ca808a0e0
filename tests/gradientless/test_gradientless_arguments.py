"""What cannot work is refused before anything is searched, in one line that says what to do."""

import pytest
import torch
from heads import make
from tiny import one_layer_model, tiny_dataset
from torch import nn

import run_glue
from hf_ft_ext import GradientlessTrainer, GradientlessTrainingArguments, InputError, LoraTrainingArguments
from hf_ft_ext.gradientless.optimizers.options import parse_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search_method": "cma"}, "search_method='cma' is unknown; choose from: gld, spsa, node, activity, adam"),
        ({"search_candidates": 0}, "search_candidates must be 1 or more, got 0"),
        ({"search_sampling_size": 0}, "search_sampling_size must be 1 or more, got 0"),
        ({"search_sampling_steps": 0}, "search_sampling_steps must be 1 or more, got 0"),
        (
            {"search_options": "3*2"},
            "options must be 'none' or options per level x levels, such as '3x2', got '3\\*2'",
        ),
        ({"search_selection": "best"}, "search_selection='best' is unknown"),
        ({"search_selection": "all", "search_sampling_size": 5}, "search_selection=all changes every entry; leave"),
        ({"search_block": 0}, "search_block must be 1 or more, got 0"),
        (
            {"search_block": 32},
            "search_block=32 changes consecutive entries together, and search_selection=random selects",
        ),
        (
            {"search_method": "adam", "search_block": 2},
            "search_block=2 groups entries of a weight perturbation, and adam draws none",
        ),
        ({"search_direction": "lozo"}, "search_direction=lozo applies to search_method=spsa, not to gld"),
        (
            {"search_method": "node", "search_carry": True},
            "search_carry=True applies to search_method=spsa, not to node",
        ),
        (
            {"search_method": "spsa", "search_rank": 4},
            "search_rank=4 applies to direction=lozo or subzero, not to gaussian",
        ),
        (
            {"search_method": "spsa", "search_direction": "lozo", "search_block": 2},
            "search_direction=lozo is low-rank and cannot be combined with blocks of entries",
        ),
        (
            {"search_method": "spsa", "search_estimate": "one-sided", "search_directions": 1},
            "search_directions must be 2 or more for estimate=one-sided, .*, got 1",
        ),
        (
            {"search_method": "spsa", "search_update": "momentum", "search_small": 0.5},
            "search_small=0.5 depends on the current weights",
        ),
        (
            {"search_method": "spsa", "search_moments": "buffer"},
            "search_moments=buffer applies to update=momentum or adam, not to sgd",
        ),
        (
            {"search_method": "spsa", "search_masks": "run", "search_target": "all"},
            "search_target=all and search_masks both select what is searched",
        ),
        (
            {"search_method": "spsa", "search_masks": "run", "search_direction": "lozo"},
            "search_direction=lozo is low-rank and cannot be combined with masks",
        ),
        (
            {"search_method": "spsa", "search_masks": "run", "search_trajectory": True},
            "search_trajectory stores seeds, and search_masks cannot be recomputed",
        ),
        (
            {"search_node_directions": "signs"},
            "search_node_directions=signs applies to search_method=node, not to gld",
        ),
        ({"search_masks": "run"}, "search_masks=run applies to search_method=spsa, not to gld"),
        (
            {"search_method": "spsa", "search_estimate": "both"},
            "search_estimate='both' is unknown; choose from: two-sided",
        ),
        (
            {"search_method": "spsa", "search_estimate": "forward", "search_objective": "accuracy"},
            "search_estimate=forward differentiates, and search_objective=accuracy has no derivative",
        ),
        (
            {"search_method": "spsa", "search_dropout": True, "search_candidates_per_forward": 2},
            "search_dropout needs the same dropout mask for all candidates",
        ),
        (
            {"search_method": "node", "search_update": "rms"},
            "search_update=rms is not available for node and activity perturbation; choose from",
        ),
        ({"search_method": "node", "search_objective": "accuracy"}, "search_method=node needs the loss of each row"),
        ({"search_fisher": "gradient"}, "search_fisher=gradient needs search_selection=fisher"),
        ({"search_objective": "recall"}, "search_objective='recall' is unknown; choose from: loss, accuracy, f1"),
        ({"search_target": "("}, r"search_target='\(' is not a regular expression"),
        (
            {"search_eps": 0.1},
            "search_eps=0.1 applies to search_method=spsa, node or activity, not to gld; leave one of them out",
        ),
        (
            {"search_method": "spsa", "search_eps": 0.0},
            "search_eps must be a finite number above 0, such as 1e-3, got 0.0",
        ),
        ({"search_method": "spsa", "search_pool": True}, "search_pool=True applies to search_method=gld, not to spsa"),
        ({"search_method": "spsa", "search_momentum": 0.5}, "search_momentum=0.5 needs search_update=momentum"),
        ({"adam_beta1": 0.5}, "adam_beta1=0.5 needs search_update=adam; leave it out"),
        ({"adam_beta2": 0.5}, "adam_beta2=0.5 needs search_update=adam or rms"),
        (
            {"search_method": "spsa", "search_update": "rms", "adam_beta1": 0.5},
            "adam_beta1=0.5 needs search_update=adam; leave it out",
        ),
        (
            {"search_method": "spsa", "search_estimate": "forward", "search_eps": 0.1},
            "search_eps=0.1 is the size of a perturbation, and search_estimate=forward makes none",
        ),
        (
            {"search_selection": "all", "search_sampling_steps": 4},
            "search_sampling_steps=4 says how often entries are selected, and search_selection=all selects none",
        ),
        (
            {"search_objective": "accuracy", "label_smoothing_factor": 0.1},
            "label_smoothing_factor=0.1 changes the loss, which search_objective=accuracy does not read",
        ),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 adds noise in training mode"),
        ({"search_peft_config": {"r": 1}}, "search_peft_config needs search_peft; pass a peft method"),
        ({"search_method": "adam", "search_objective": "f1"}, "search_method=adam needs the derivative of the loss"),
        (
            {"max_grad_norm": 1.0},
            "max_grad_norm=1.0 clips gradients, and a search computes none; leave it out or pass 0",
        ),
        pytest.param(
            {"gradient_checkpointing": True},
            "gradient_checkpointing saves memory of the backward pass",
            id="gradient_checkpointing",
        ),
        ({"optim": "adafactor"}, "optim='adafactor' needs gradients; leave it out: search_method selects"),
        ({"fp16": True}, "fp16 scales gradients, and a search computes none; pass bf16"),
        ({"torch_compile": True}, "torch_compile does not support weights that change"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"feature_cache_gb": -1.0}, "feature_cache_gb must be 0 or more, got -1.0"),
        ({"candidate_parallel": "both"}, "candidate_parallel='both' is unknown; choose from: data, candidates"),
        ({"max_evaluations_per_step": 0}, "max_evaluations_per_step must be 1 or more, got 0"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        GradientlessTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_rates_have_defaults_of_their_own(tmp_path):
    def rate(method, **options):
        return GradientlessTrainingArguments(
            str(tmp_path), search_method=method, use_cpu=True, report_to="none", **options
        ).learning_rate

    assert [rate(method) for method in ("gld", "node", "adam")] == [5e-3, 1e-4, 1e-3]
    assert [rate("spsa", **o) for o in ({}, {"search_peft": "lora"}, {"search_target": "all"})] == [1e-2, 1e-4, 1e-6]
    assert rate("spsa", search_target="all", search_estimate="one-sided") == 1e-5
    assert rate("spsa", search_update="adam") == 1e-3
    assert (parse_options("3x2"), parse_options((1, 1)), parse_options("none")) == ((3, 2), (1, 1), None)


def test_the_default_rate_of_a_head_learns(tmp_path):
    trainer = make(tmp_path, search_method="spsa", max_steps=30, learning_rate=None, per_device_train_batch_size=32)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before - 1e-4  # at 1e-6, before: 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"search_target": "nothing"},
            r"search_target='nothing' matches no parameter; pass a pattern that .*parameters of this model: .*cl",
        ),
        ({"search_options": "5x6"}, r"would need 375,0\d\d evaluations, more than max_evaluations_per_step=10,000"),
        ({"search_candidates": 5, "max_evaluations_per_step": 20}, "would need 29 evaluations, more than max_eval"),
        ({"search_method": "spsa", "search_directions": 9, "max_evaluations_per_step": 17}, "would need 18 eval"),
        (
            {"search_selection": "fisher", "search_target": r"output\.dense\.weight"},
            "search_selection=fisher needs a search of head tensors only",
        ),
        ({"search_peft": "loda"}, "search_peft='loda' is not a peft method; choose from: .*lora"),
        ({"search_peft": "lora", "search_peft_config": {"rank": 1}}, "does not work: .*unexpected keyword"),
        ({"search_peft": "lora", "search_peft_config": "{r"}, "is not valid JSON"),
    ],
)
def test_arguments_that_do_not_fit_the_model_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, **options).train()


def test_other_refusals(tmp_path):
    model = one_layer_model()
    args = GradientlessTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    optimizers = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(InputError, match="makes its own optimizer"):
        GradientlessTrainer(model, args, optimizers=optimizers)
    with pytest.raises(InputError, match="makes its own optimizer"):
        GradientlessTrainer(model, args, None, None, None, None, None, None, None, None, optimizers)
    with pytest.raises(InputError, match="LoraTrainingArguments, which belongs to another method"):
        GradientlessTrainer(model, LoraTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(InputError, match="objective and search_objective=f1 were both passed"):
        make(tmp_path, objective=lambda logits, labels: 0.0, search_objective="f1")
    with pytest.raises(InputError, match="search_objective=f1 is for two classes, but the model has 3; use matthews"):
        make(tmp_path, one_layer_model(num_labels=3), search_objective="f1").train()
    several = one_layer_model(num_labels=2, problem_type="multi_label_classification")
    with pytest.raises(InputError, match="search_positive_label='LABEL_1' is for two classes, but rows have several"):
        make(tmp_path, several, search_objective="f1", search_positive_label="LABEL_1").train()
    regression = one_layer_model(num_labels=1, problem_type="regression")
    with pytest.raises(InputError, match="search_objective=accuracy is for classes, but this task is regression"):
        make(tmp_path, regression, search_objective="accuracy").train()


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path):
    model = one_layer_model()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[0] = float("nan")
    trainer = make(tmp_path, model)
    with pytest.raises(InputError, match="the loss at the current weights is nan in step 1; look for bad rows"):
        trainer.train()


def test_candidates_that_are_not_finite_are_counted(tmp_path):
    trainer = make(tmp_path, learning_rate=1e38, logging_steps=1, max_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["rejected_candidates"] > 0
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_sampling_size_larger_than_every_tensor_warns(tmp_path, caplog):
    make(tmp_path, search_sampling_size=5000, max_steps=1).train()
    assert "sampling_size=5000 is more than the 1024 entries of the largest tensor" in caplog.text


@pytest.mark.parametrize(("dtype", "used"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_carried_rounding_error_without_16_bit_matrices_is_logged(tmp_path, caplog, dtype, used):
    make(tmp_path, one_layer_model().to(dtype), search_method="spsa", search_carry=True).create_optimizer()
    assert ("search_carry is not used" in caplog.text) != used


def test_two_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(GradientlessTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match="one process sees 2 GPUs and would copy the model to all of them"):
        make(tmp_path)


def test_metrics_of_parts_of_a_batch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(GradientlessTrainingArguments, "world_size", property(lambda self: 2))
    for options in ({"search_objective": "f1"}, {"objective": lambda logits, labels: 0.0}):
        with pytest.raises(InputError, match=r"is not the mean over its parts.*pass --candidate_parallel candidates"):
            make(tmp_path, **options)


def test_labels_are_needed(tmp_path):
    from tiny import tiny_dataset

    with pytest.raises(InputError, match="the rows have no labels; add a column"):
        make(tmp_path, dataset=tiny_dataset(16).remove_columns("labels")).train()


def test_a_module_without_a_base_model_needs_a_target(tmp_path):
    with pytest.raises(InputError, match=r"'head' matches no parameter; pass all, a pattern .*untie_words; param"):
        GradientlessTrainer(
            nn.Linear(2, 2), GradientlessTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim", "adamw_torch"], "optim='adamw_torch' needs gradients; leave it out"),
        (["--max_grad_norm", "0.5"], "max_grad_norm=0.5 clips gradients"),
        (["--search_candidates", "0"], "search_candidates must be 1 or more, got 0"),
        (["--search_method", "gldd"], "search_method cannot be 'gldd'; did you mean 'gld'"),
    ],
)
def test_the_launcher_prints_errors_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run_glue.main(["--method", "gradientless", *words, "--use_cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_search_on_f1_takes_the_tasks_positive_class():
    args = GradientlessTrainingArguments("unused", search_objective="f1", use_cpu=True)
    assert args.take_positive_label("spam") and args.search_positive_label == "spam"
    assert args.take_positive_label("ham") and args.search_positive_label == "spam"  # the user's own stays
    assert not GradientlessTrainingArguments("unused", use_cpu=True).take_positive_label("spam")
    with pytest.raises(InputError, match="search_positive_label='spam' applies to search_objective=f1, not to loss"):
        GradientlessTrainingArguments("unused", search_positive_label="spam", use_cpu=True)


def test_a_search_on_f1_needs_the_positive_class_by_name(tmp_path):
    names = ["ham", "spam"]
    still = {"search_method": "spsa", "search_eps": 1e-7, "learning_rate": 1e-12, "max_steps": 1}

    def trainer(**settings):
        model = one_layer_model(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
        options = {"search_objective": "f1", "per_device_train_batch_size": 16, **still, **settings}
        return make(tmp_path, model, dataset=tiny_dataset(16), **options)

    with pytest.raises(InputError, match=r"metric 'f1' needs a positive class, .*ham, spam"):
        trainer()
    output = trainer(search_positive_label="ham").predict(tiny_dataset(16))
    predicted, labels = output.predictions.argmax(-1) == 0, output.label_ids == 0
    f1 = 2 * (predicted & labels).sum() / (predicted.sum() + labels.sum())
    of_spam = 2 * (~predicted & ~labels).sum() / ((~predicted).sum() + (~labels).sum())
    assert f1 != of_spam
    assert trainer(search_positive_label="ham").train().training_loss == pytest.approx(1 - f1)
