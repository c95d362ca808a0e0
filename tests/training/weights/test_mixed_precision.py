"""Mixed precision outside the training loop: pre-passes, features and plans compute in the type of the steps."""

import copy

import pytest
import torch
from classifiers import classifier_rows, tiny_classifier
from datasets import Dataset
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch import nn
from transformers import DataCollatorWithPadding

from hf_ft_ext import compute_bases, empirical_ntk, fisher_information
from hf_ft_ext.adapters.sparse_grad.model import layers_by_columns
from hf_ft_ext.gradientless.trainer import GradientlessTrainer
from hf_ft_ext.methods import METHODS
from hf_ft_ext.sparse.prepass import own_steps
from hf_ft_ext.training.runs.plan import training_plan
from hf_ft_ext.training.weights.precision import training_precision

COLLATE = DataCollatorWithPadding(tiny_tokenizer())
FEATURES = {"search_method": "spsa", "search_target": "head"}
# name -> method, settings, rows that the preparation reads in the type of the run
PREPARED = {
    "sparse": ("sparse", {"sparse_basis_steps": 2, "sparse_density": 0.2}, 16),
    "sparse, micro-batches": (
        "sparse", {"sparse_basis_steps": 2, "sparse_density": 0.2, "gradient_accumulation_steps": 2}, 64
    ),  # they pass twice
    "dynamic": ("sparse", {"sparse_support": "dynamic", "sparse_basis_steps": 2, "sparse_density": 0.2}, 16),
    "static": ("sparse", {"sparse_support": "static", "sparse_basis_steps": 2, "sparse_density": 0.2}, 16),
    "cached features": ("gradientless", FEATURES, 96),
    "linear head": ("linearhead", {"linearhead_c": 1.0}, 96),
    "linear head in memory": ("linearhead", {"linearhead_c": 1.0, "feature_cache_gb": 0.0}, 96),
}  # fmt: skip


def trainer_of(method: str, folder, model=None, dataset=None, *, kind=None, **settings):
    arguments, trainer = METHODS[method].arguments_class(), METHODS[method].trainer_class()
    if hasattr(arguments, "feature_cache_dir"):
        settings.setdefault("feature_cache_dir", str(folder / "features"))
    args = arguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        **({"max_steps": 2, "per_device_train_batch_size": 8} if method != "linearhead" else {}), **settings,
    )  # fmt: skip
    return (kind or trainer)(
        tiny_model() if model is None else model,
        args,
        train_dataset=tiny_dataset(96) if dataset is None else dataset,
        eval_dataset=tiny_dataset(8, seed=1),
        processing_class=tiny_tokenizer(),
    )


def watch(model: nn.Module) -> list[tuple[torch.dtype, int]]:
    """What the encoder's attention computes in, and for how many rows, one entry per pass of its first layer."""
    seen: list[tuple[torch.dtype, int]] = []
    layer = next(module for name, module in model.named_modules() if name.endswith("attention.self.query"))
    layer.register_forward_hook(lambda module, args, output: seen.append((output.dtype, len(output))))
    return seen


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "float32"])
def test_a_preparation_computes_in_the_type_of_the_run(tmp_path, name, bf16):
    method, settings, rows = PREPARED[name]
    trainer = trainer_of(method, tmp_path, bf16=bf16, **settings)
    seen = watch(trainer.model)
    trainer.train()
    before = list(seen)
    steps = [] if method != "sparse" else [8] * 2 * settings.get("gradient_accumulation_steps", 1)
    kinds = [torch.bfloat16, torch.float32] if bf16 else [torch.float32, torch.bfloat16]
    found, other = (sum(n for dtype, n in before if dtype is kind) for kind in kinds)
    # the other ones are trials on a few rows, of the structure and of the head
    assert found - sum(steps) >= rows and other <= 64 * bf16, before


def test_columns_are_those_of_gradients_under_autocast(tmp_path):
    trainer = trainer_of("sparse", tmp_path, bf16=True, sparse_basis_steps=3, sparse_density=0.2)
    trainer.create_optimizer()
    batches = [batch for step in own_steps(trainer, 3) for batch, _ in step]
    found = projectors(trainer.model)
    by_hand = {}
    for half in (True, False):

        def loss(model, batch, half=half):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return model(**batch).loss

        compute_bases(trainer.model, batches, loss, seed=0)
        by_hand[half] = projectors(trainer.model)
    assert len(found) == 8  # two layers of a feed-forward, in and out, in two blocks
    energies = projected_energies(trainer.model, batches, {True: found, False: by_hand[False]})
    for number, (projector, half, full) in enumerate(zip(found, by_hand[True], by_hand[False], strict=True)):
        torch.testing.assert_close(projector, half, rtol=0, atol=1e-4)
        assert (projector - full).abs().max() > 1e-3
        assert energies[True][number] > 0.98 * energies[False][number]


def projectors(model: nn.Module) -> list[torch.Tensor]:
    """`V V^T` and `U U^T` of each set of columns: columns of one span may differ in sign and order."""
    groups = [columns for columns, _ in layers_by_columns(model, "default")]
    return [(side @ side.T).clone() for group in groups for side in (group.out_columns, group.in_columns)]


def projected_energies(model: nn.Module, batches: list[dict], found: dict) -> dict[bool, list[float]]:
    """`sum_i |P G_i|^2` of each projector, over the float32 gradients of the batches."""
    weights = [layer.base_layer.weight for _, layers in layers_by_columns(model, "default") for _, layer in layers]
    energies = {key: [0.0] * len(projectors) for key, projectors in found.items()}
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        for i, gradient in enumerate(torch.autograd.grad(model(**batch).loss, weights)):
            for key, projectors in found.items():
                energies[key][2 * i] += float((projectors[2 * i] @ gradient).square().sum())
                energies[key][2 * i + 1] += float((gradient @ projectors[2 * i + 1]).square().sum())
    return energies


def test_features_are_those_of_autocast(tmp_path):
    trainer = trainer_of("gradientless", tmp_path, bf16=True, **FEATURES)
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [
            model.bert(**{k: v for k, v in COLLATE([row]).items() if k != "labels"}).last_hidden_state[0, 0]
            for row in trainer.train_dataset
        ]
    torch.testing.assert_close(trainer._rows.features[:], torch.stack(expected).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", ["full", "lora", "sparse"])
def test_a_plan_counts_what_the_steps_save(tmp_path, method):
    """After training, the model's own forward has accelerate's autocast, so that count is that of a step."""
    counts = {}
    for bf16 in (True, False):
        settings = {"sparse_density": 0.2, "sparse_basis": "random"} if method == "sparse" else {}
        trainer = trainer_of(method, tmp_path / str(bf16), bf16=bf16, **settings)
        counts[bf16] = training_plan(trainer).activation_bytes
        trainer.train()
        assert training_plan(trainer).activation_bytes == pytest.approx(counts[bf16], rel=0.01)
    assert counts[True] < counts[False]


class OwnLoader(GradientlessTrainer):
    """The head's inputs are found from the first batch, when accelerate has prepared the model."""

    def get_train_dataloader(self):
        return super().get_train_dataloader()


@pytest.mark.parametrize("kind", [GradientlessTrainer, OwnLoader])
@pytest.mark.parametrize("model_type", ["roberta", "gpt2"])
def test_the_inputs_of_a_head_are_found_in_a_prepared_model(tmp_path, kind, model_type):
    """Evaluation prepares the model too: then autocast is around the whole model and not around its encoder."""
    model = tiny_classifier(model_type)
    for parameter in model.parameters():  # so that rounding to 16 bits exceeds the tolerance of float32
        parameter.data *= 4
    rows = {key: value.tolist() for key, value in classifier_rows(16).items()}
    trainer = trainer_of("gradientless", tmp_path, model, Dataset.from_dict(rows), kind=kind, bf16=True, **FEATURES)
    trainer.evaluate(trainer.train_dataset)
    batch = COLLATE([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        rounded, exact = model(**batch).logits, model._original_forward(**batch).logits
    assert (rounded - exact).abs().max() > 1e-4 * max(1.0, exact.abs().max())
    trainer.train()
    assert trainer._reader is not None and type(trainer._evaluation).__name__ == "HeadEvaluation"


class RoundedPasses(GradientlessTrainer):
    """Losses of the repeated batch are off by a thousandth, as in 16 bits with other sizes of the products."""

    def _full_objective(self, batches):
        full = super()._full_objective(batches)
        repeated = full.repeated
        full.repeated = lambda n: repeated(n) * (1 + 1e-3)
        return full


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("bf16", [True, False])
def test_candidates_share_a_pass_although_it_rounds_to_16_bits(tmp_path, bf16, peft):
    """In float32 such a difference means that the model mixes rows, so candidates run one by one."""
    settings = {"search_method": "spsa", "search_candidates_per_forward": 2, "search_directions": 2}
    settings |= {"search_peft": "lora"} if peft else {"search_target": "encoder.*weight"}
    trainer = trainer_of("gradientless", tmp_path, kind=RoundedPasses, bf16=bf16, **settings)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert optimizer.batches is bf16


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_head_on_averaged_logits_in_bf16(tmp_path, evaluated):
    """EuroBERT averages the logits of all tokens, so no reader of one vector per row fits."""
    model = tiny_classifier("eurobert")
    rows = {**classifier_rows(24), "labels": torch.arange(24) % 2}
    dataset = Dataset.from_dict({key: value.tolist() for key, value in rows.items()})
    heads = {}
    for bf16 in (True, False):
        trainer = trainer_of("linearhead", tmp_path, copy.deepcopy(model), dataset, bf16=bf16, linearhead_c=1.0)
        if evaluated:
            trainer.evaluate(dataset)
        trainer.train()
        heads[bf16] = trainer.model.get_submodule(trainer.fitted.layer).weight
    assert not torch.equal(heads[True], heads[False])
    torch.testing.assert_close(heads[True], heads[False], rtol=0.1, atol=0.1 * float(heads[False].abs().max()))


def test_a_head_is_the_same_after_an_evaluation(tmp_path):
    """The head is fitted and searched in float32, whether or not accelerate has wrapped the model's forward."""
    fitted = []
    for evaluated in (False, True):
        model = tiny_model("roberta")
        for parameter in model.parameters():
            parameter.data *= 4
        trainer = trainer_of("linearhead", tmp_path / str(evaluated), model, bf16=True, linearhead_c=1.0)
        if evaluated:
            trainer.evaluate()
        trainer.train()
        fitted.append(model.classifier.out_proj.weight)
    assert torch.equal(*fitted)


def test_losses_of_a_searched_head_have_no_rounding_of_16_bits(tmp_path):
    trainer = trainer_of("gradientless", tmp_path, bf16=True, **FEATURES)
    trainer.train()
    features = trainer._rows.features[:8].clone()
    head = trainer.model.classifier
    assert torch.equal(trainer._reader.logits(features), head(torch.tanh(trainer.model.bert.pooler.dense(features))))


@pytest.mark.parametrize("how", ["evaluate", "train"])
def test_a_model_of_a_bf16_run_has_its_own_kernel_and_information(tmp_path, how):
    """Kernels and Fisher information have the precision of the weights (docs/scaling.md)."""
    trainer = trainer_of("full", tmp_path, bf16=True)
    getattr(trainer, how)()
    model, fresh = trainer.model, tiny_model()
    fresh.load_state_dict(model.state_dict())
    batch = COLLATE([{k: v for k, v in row.items() if k != "labels"} for row in tiny_dataset(6)])
    for engine in ("auto", "jacobian", "projected"):
        kernels = [empirical_ntk(m.eval(), dict(batch), engine=engine) for m in (model, fresh)]
        torch.testing.assert_close(*kernels, rtol=1e-4, atol=1e-5)  # rounding to 16 bits: 1e-3 of the trace
    rows = [COLLATE([tiny_dataset(6)[i] for i in range(6)])]
    found, expected = (fisher_information(m, rows, progress=False) for m in (model, fresh))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("settings", [{"fisher_mode": "mask"}, {}], ids=["mask", "select"])
def test_a_fisher_pre_pass_has_the_precision_of_the_weights(tmp_path, settings):
    for evaluated in (False, True):
        trainer = trainer_of("fisher", tmp_path / str(evaluated), bf16=True, fisher_examples=16, **settings)
        if evaluated:
            trainer.evaluate()
        passes = watch(trainer.model)
        trainer.prepare()
        assert {kind for kind, _ in passes} == {torch.float32} and sum(rows for _, rows in passes) >= 16


@pytest.mark.parametrize("method", ["full", "lora", "sparse", "fisher", "gradientless", "linearhead"])
def test_an_evaluation_in_16_bits_leaves_the_weights_as_they_are(tmp_path, method):
    """It computes in 16 bits, and a training after it goes on in float32."""
    settings = {"sparse": {"sparse_density": 0.2, "sparse_basis_steps": 2}, "fisher": {"fisher_examples": 8}}
    trainer = trainer_of(method, tmp_path, bf16_full_eval=True, **settings.get(method, {}))
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    seen = watch(trainer.model)
    trainer.evaluate()
    assert {kind for kind, _ in seen} == {torch.bfloat16}
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    trainer.train()


def test_gradients_without_a_loss_scale_are_not_computed_in_float16(tmp_path):
    trainer = trainer_of("full", tmp_path)
    trainer.args.mixed_precision = "fp16"  # the arguments refuse it on a CPU
    with training_precision(trainer):
        assert not torch.is_autocast_enabled("cpu")
    with training_precision(trainer, gradients=False):
        assert torch.get_autocast_dtype("cpu") == torch.float16 and torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
