"""The public names for those who read types: all there, annotated, and mypy agrees with them."""

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ft_ext

ROOT = Path(__file__).resolve().parents[2]


def test_every_name_of_the_stub_can_be_imported():
    tree = ast.parse((ROOT / "hf_ft_ext" / "__init__.pyi").read_text())
    named = [name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(named) == sorted(hf_ft_ext.__all__)
    for name in named:
        assert getattr(hf_ft_ext, name).__name__ == name


def functions_of(name: str):
    thing = getattr(hf_ft_ext, name)
    if inspect.isfunction(thing):
        yield name, thing
    for key, value in vars(thing).items() if inspect.isclass(thing) else ():
        if not key.startswith("_") or key == "__init__":
            value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if (
                inspect.isfunction(value)
                and value.__module__.startswith("hf_ft_ext")
                and "<" not in value.__qualname__
            ):
                yield f"{name}.{key}", value


@pytest.mark.parametrize("name", hf_ft_ext.__all__)
def test_public_functions_are_annotated(name):
    for where, function in functions_of(name):
        signature = inspect.signature(function)
        bare = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty
            and parameter.name not in ("self", "cls")
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        assert not bare, f"{where}: {bare}"
        assert where.endswith("__init__") or signature.return_annotation is not signature.empty, where


@pytest.mark.slow
def test_mypy_catches_what_a_consumer_gets_wrong(tmp_path):
    pytest.importorskip("mypy", reason="make quality installs mypy")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from hf_ft_ext import InputError, SparseTrainingArguments, find_nothing, sparse_layers\n"
        "args = SparseTrainingArguments('runs/x', sparse_density='much')\n"
        "sparse_layers()\n"
        "number: int = sparse_layers(None)\n"
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent",
         "--enable-error-code", "arg-type", str(wrong)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "wrong.py" in line]
    assert done.returncode == 1 and len(lines) >= 3, done.stdout + done.stderr
    for expected in ("find_nothing", "Missing positional argument", "Incompatible types in assignment"):
        assert any(expected in line for line in lines), expected
