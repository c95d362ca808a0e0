"""Code as a user writes it, for mypy: every line here has to type-check, and `assert_type` says with which type."""

from collections.abc import Mapping
from typing import Any, assert_type

from hf_ft_ext import (
    AdapterPlan,
    FisherTrainer,
    FisherTrainingArguments,
    InputError,
    KernelTrainer,
    KernelTrainingArguments,
    SparseGradLinear,
    SparseTrainer,
    SparseTrainingArguments,
    convert_to_sparse,
    demo_encoder,
    fit_linear_head,
    select_adapters,
    sparse_layers,
)
from hf_ft_ext.features.linear_probe import LinearHead
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.methods import METHODS, Method, find_method


def sparse(model: Any, data: Any) -> dict[str, SparseGradLinear]:
    args = SparseTrainingArguments("runs/mine", sparse_density=0.012)
    assert_type(args, SparseTrainingArguments)
    assert_type(args.sparse_support, str)
    trainer = SparseTrainer(model, args, train_dataset=data)
    trainer.train()
    layers = sparse_layers(trainer.model)
    assert_type(layers, dict[str, SparseGradLinear])
    return layers


def plan(model: Any, data: Any, candidates: Mapping[str, Any]) -> AdapterPlan:
    trainer = FisherTrainer(model, FisherTrainingArguments("runs/plan", fisher_budget=300_000), train_dataset=data)
    trainer.prepare()
    made = select_adapters(model, data, dict(candidates))
    assert_type(made, AdapterPlan)
    return made


def kernel(model: Any, data: Any) -> float:
    args = KernelTrainingArguments("runs/kernel", kernel_formula=Formula.SGD.value)
    trainer = KernelTrainer(model, args, train_dataset=data)
    assert_type(trainer.regularization, float)
    return trainer.regularization


def head(model: Any, data: Any, collate: Any) -> LinearHead:
    fitted = fit_linear_head(model, data, collate, batch_size=64)
    assert_type(fitted.rows, int)
    return fitted


def names() -> list[str]:
    assert_type(find_method("sparse"), Method)
    assert_type(demo_encoder(), str)
    try:
        convert_to_sparse(None, density=0.01)
    except InputError as error:
        return [str(error), *METHODS]
    return []
