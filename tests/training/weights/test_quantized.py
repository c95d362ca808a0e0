"""Quantized base models: adapters and heads train on them, whatever needs the weights refuses."""

import copy
import functools
import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import labels_only, tiny_dataset, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForSequenceClassification

from hf_ft_ext import SparseGradConfig, compute_bases
from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers
from hf_ft_ext.arguments import ModelArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.methods import METHODS
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.structure.find import find_structure

PACKAGES = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "torchao-8bit": "torchao"}
QUICK = {"output_dir": "out", "use_cpu": True, "do_train": True, "report_to": [], "disable_tqdm": True}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def is_packed(parameter) -> bool:
    return parameter.dtype in (torch.int8, torch.uint8) or is_traceable_wrapper_subclass(parameter)


def trainer_on(folder, method: str, quantization: str | None = None, model=None, **settings):
    method = METHODS[method]
    args = method.arguments_class()(**QUICK, **settings)
    if model is None:
        arguments = ModelArguments(model_name_or_path=str(folder), quantization=quantization)
        _, model = load_tokenizer_and_model(arguments, labels_only("a", "b"), seed=0, args=args)
    rows = {"train_dataset": tiny_dataset(16), "eval_dataset": tiny_dataset(8, seed=1)}
    return method.trainer_class()(model, args, processing_class=tiny_tokenizer(), **rows)


@pytest.fixture(scope="module")
def plain_loss(folder):
    """`plain_loss(method, **settings)`: after training on the model as it is, made once."""

    @functools.cache
    def run(method: str, **settings) -> float:
        trainer = trainer_on(folder, method, **settings)
        trainer.train()
        return trainer.evaluate()["eval_loss"]

    return run


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("full", {}, "plain fine-tuning changes the model's weights, and they are quantized"),
        ("sparse", {"sparse_support": "dynamic"}, "sparse training with sparse_support=dynamic changes"),
        ("fisher", {"fisher_mode": "mask"}, "a mask trains entries of"),
        ("kernel", {}, "a kernel is computed in float32 or float64 from"),
        ("kernel", {"kernel_peft": "lora"}, "a kernel is computed in float32 or float64 from"),
    ],
    ids=["full", "sparse", "fisher", "kernel", "kernel-lora"],
)
def test_methods_that_need_the_weights_refuse(method, settings, message):
    model = tiny_model()
    model.is_quantized = True  # what transformers sets
    with pytest.raises(InputError, match=message + ".*train adapters"):
        trainer_on(None, method, model=model, **settings)


@pytest.mark.parametrize("quantization", PACKAGES)
def test_a_missing_library_is_one_line(folder, monkeypatch, quantization):
    found, package = importlib.util.find_spec, PACKAGES[quantization]
    extra = {"bitsandbytes": "quantization", "torchao": "torchao"}[package]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))
    message = rf'quantization={quantization} needs {package}: pip install "hf_ft_ext\[{extra}\]"'
    with pytest.raises(InputError, match=message):
        trainer_on(folder, "lora", quantization)


@pytest.mark.parametrize("quantization", PACKAGES)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"max_steps": 3}),
        ("sparse", {"max_steps": 3, "sparse_basis_steps": 2}),
        ("full", {"max_steps": 3, "peft": "ia3"}),
        ("fisher", {"max_steps": 3, "fisher_examples": 4}),
        ("gradientless", {"max_steps": 3}),
        ("linearhead", {"linearhead_c": 1.0}),
    ],
    ids=["lora", "sparse", "full", "fisher", "gradientless", "linearhead"],
)
def test_adapters_and_heads_train_on_a_quantized_base(folder, plain_loss, method, settings, quantization):
    pytest.importorskip(PACKAGES[quantization])
    trainer = trainer_on(folder, method, quantization, **settings)
    trainer.train()
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    loss = trainer.evaluate()["eval_loss"]
    assert model.is_quantized and loss == pytest.approx(plain_loss(method, **settings), abs=0.02)
    packed = {name for name, p in model.named_parameters() if is_packed(p)}
    assert len(packed) == 12 and not any("classifier" in name or "pooler" in name for name in packed)
    if method == "linearhead":
        trainer.save_model()
        batch = {"input_ids": torch.randint(5, 30, (4, 9))}
        with torch.no_grad():
            theirs = AutoModelForSequenceClassification.from_pretrained("out")(**batch).logits
            assert torch.allclose(model(**batch).logits, theirs, atol=2e-3)


@pytest.mark.usefixtures("fresh_structures")
@pytest.mark.parametrize("quantization", PACKAGES)
def test_reading_the_structure_leaves_a_quantized_model_as_it_is(folder, quantization):
    pytest.importorskip(PACKAGES[quantization])
    batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
    logits = []
    for read in (False, True):
        arguments = ModelArguments(model_name_or_path=str(folder), quantization=quantization)
        _, model = load_tokenizer_and_model(arguments, labels_only("a", "b"), seed=0)
        if read:
            find_structure(model)
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("quantization", PACKAGES)
def test_sparse_grad_on_a_quantized_base_equals_the_dequantized_computation(folder, quantization):
    pytest.importorskip(PACKAGES[quantization])
    trainer = trainer_on(folder, "sparse", quantization, max_steps=3, sparse_basis_steps=2, learning_rate=1e-2)
    trainer.train()
    for _, layer in sparse_grad_layers(trainer.model):
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            added = layer(x) - layer.base_layer(x)
        change = layer.get_delta_weight("default")
        assert change.abs().max() > 0
        # bitsandbytes' 8-bit product gives 16 bits
        torch.testing.assert_close(added, x @ change.T, rtol=1e-2, atol=2e-3 if quantization == "8bit" else 1e-5)
        weight = layer.oriented_weight().float()
        torch.testing.assert_close(layer.base_layer(x), x @ weight.T + layer.bias, rtol=0.1, atol=0.05)
    trainer.save_model()
    arguments = ModelArguments(model_name_or_path=str(folder), quantization=quantization)
    _, base = load_tokenizer_and_model(arguments, labels_only("a", "b"), seed=0)
    loaded, batch = PeftModel.from_pretrained(base, "out"), {"input_ids": torch.arange(5, 25).view(2, 10)}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits)
    with pytest.raises(InputError, match=r"dense is quantized \(Linear\w*\), and merging would round the weight"):
        trainer.model.merge_adapter()


def test_sparse_grad_on_torchao_weights_trains_as_on_dequantized_ones(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    plain = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def in_encoder(module, name):
        return isinstance(module, torch.nn.Linear) and "encoder" in name

    bases = [copy.deepcopy(plain) for _ in range(3)]
    for base in bases[:2]:
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig(), filter_fn=in_encoder)
    for name, module in bases[2].named_modules():
        if in_encoder(module, name):
            module.weight.data = bases[0].get_submodule(name).weight.dequantize().clone()
    rows = {"input_ids": torch.arange(5, 25).view(2, 10), "labels": torch.tensor([0, 1])}
    models = [get_peft_model(base, SparseGradConfig(task_type="SEQ_CLS", density=0.1)) for base in bases[::2]]
    compute_bases(models[0], [rows] * 2)
    columns = {name: tensor for name, tensor in models[0].state_dict().items() if "_columns." in name}
    models[1].load_state_dict(columns, strict=False)
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(**rows).loss.backward()
            optimizer.step()
    quantized, dequantized = (model.state_dict() for model in models)
    values = [name for name in quantized if "sparse_grad_values" in name]
    assert all(quantized[name].abs().max() > 1e-4 for name in values)
    for name in values:
        torch.testing.assert_close(quantized[name], dequantized[name], rtol=1e-4, atol=1e-7)
    models[0].save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bases[1], tmp_path)
    assert torch.equal(loaded.eval()(**rows).logits, models[0].eval()(**rows).logits)
    with pytest.raises(InputError, match=r"is quantized .*, and merging would round the weight"):
        models[0].merge_adapter()


def test_an_evaluation_does_not_cut_the_gradients(folder):
    """On processors with AVX512-BF16 bitsandbytes packs 4-bit weights then, for a kernel without gradients."""
    pytest.importorskip("bitsandbytes")
    trainer = trainer_on(folder, "lora", "4bit", max_steps=1)
    batch = {"input_ids": torch.randint(5, 30, (4, 9)), "labels": torch.tensor([0, 1, 0, 1])}

    def gradients() -> list[torch.Tensor]:
        trainer.model.zero_grad()
        torch.manual_seed(0)  # of dropout
        trainer.model.train()(**batch).loss.backward()
        return [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        trainer.model.eval()(**batch)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True)) and any(g.any() for g in before)


def test_a_quantized_weight_cannot_be_searched(folder):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(InputError, match=r"search_target='all' includes .*quantized and cannot be searched"):
        trainer_on(folder, "gradientless", "4bit", search_target="all")
