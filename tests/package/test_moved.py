"""Former names of modules lead to today's modules, with a warning."""

import importlib
import sys

import pytest

import hf_ft_ext
from hf_ft_ext.moved import MOVED


@pytest.mark.parametrize("former", MOVED)
def test_a_former_name_warns_and_gives_what_the_module_has(former, monkeypatch):
    monkeypatch.delitem(sys.modules, f"hf_ft_ext.{former}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"hf_ft_ext.{former} has moved to hf_ft_ext.{MOVED[former]}") as seen:
        old = importlib.import_module(f"hf_ft_ext.{former}")
    assert seen[0].filename.endswith("importlib/__init__.py")  # the importer's line, not ours
    new = importlib.import_module(f"hf_ft_ext.{MOVED[former]}")
    names = [name for name in vars(new) if not name.startswith("__")]
    assert names and all(getattr(old, name) is getattr(new, name) for name in names)


def test_a_former_name_is_a_name_of_its_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_ft_ext.feature_cache", raising=False)
    monkeypatch.delattr(hf_ft_ext, "feature_cache", raising=False)
    with pytest.warns(DeprecationWarning, match="has moved to") as seen:
        from hf_ft_ext import feature_cache
    assert seen[0].filename == __file__
    from hf_ft_ext.features.cache import cached_features

    assert feature_cache.cached_features is cached_features


def test_an_unknown_module_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("hf_ft_ext.no_such_module")


@pytest.mark.parametrize(
    ("module", "former", "name"),
    [
        ("fisher.losses", "WholeLoss", "ModelLoss"),
        ("training.solver_trainer", "AtOnceTrainer", "SolverTrainer"),
        ("training.solver_arguments", "AtOnceTrainingArguments", "SolverTrainingArguments"),
    ],
)
def test_a_former_class_name_warns_and_is_the_class(module, former, name):
    found = importlib.import_module(f"hf_ft_ext.{module}")
    with pytest.warns(FutureWarning, match=f"{former} is now {name}"):
        assert getattr(found, former) is getattr(found, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such_class'"):
        found.no_such_class  # noqa: B018
