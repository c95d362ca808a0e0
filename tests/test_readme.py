"""The README's example runs, its commands parse, and every recipe is valid."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_ft_ext
from hf_ft_ext.compare.settings import read_comparison
from hf_ft_ext.data.demo import demo_dataset
from hf_ft_ext.methods import METHODS
from hf_ft_ext.parsing import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_python_example_trains_and_saves(tmp_path, monkeypatch, tiny_bert_dir, capsys):
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_ft_ext.models.demo_encoder", lambda: tiny_bert_dir)
    monkeypatch.setattr("hf_ft_ext.data.demo.demo_dataset", lambda: demo_dataset(train_rows=40, validation_rows=20))
    before = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir)
    exec(compile(code, "README.md", "exec"), {})
    assert "eval_loss" in capsys.readouterr().out
    after = AutoModelForSequenceClassification.from_pretrained("runs/mine")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(after.get_parameter(name), before.get_parameter(name))
    assert len([line for line in code.splitlines() if line and not line.startswith(("from", "import"))]) <= 12


@pytest.mark.parametrize(
    "line",
    [
        line
        for text in (README, *(path.read_text() for path in DOCS))
        for block in blocks("bash", text)
        for line in block.splitlines()
        if "run_glue" in line
    ],
)
def test_launcher_commands_parse(line, tmp_path, monkeypatch, capsys):
    argv = line.partition("#")[0].split("run_glue.py")[1].split()
    argv = [str(ROOT / word) if word.startswith("recipes/") else word for word in argv]
    monkeypatch.chdir(tmp_path)
    if "--help" in argv and "--method" not in argv:
        return  # tested with the launcher
    if "--help" in argv:
        with pytest.raises(SystemExit):
            parse_arguments(argv)
        assert argv[argv.index("--method") + 1] in capsys.readouterr().out
        return
    run_args, *_ = parse_arguments(argv)
    assert run_args.method in METHODS


@pytest.mark.parametrize(
    "line",
    [
        line
        for text in (README, *(path.read_text() for path in DOCS))
        for block in blocks("bash", text)
        for line in block.splitlines()
        if "hf_ft_ext.compare" in line
    ],
)
def test_compare_commands_parse(line, tmp_path, monkeypatch):
    argv = line.partition("#")[0].split("hf_ft_ext.compare")[1].split()
    argv = [str(ROOT / word) if word.startswith("recipes/") else word for word in argv]
    monkeypatch.chdir(tmp_path)
    assert read_comparison(argv).variants


def test_methods_and_public_names_are_there():
    for name in METHODS:
        assert f"`{name}`" in README
    for name in hf_ft_ext.__all__:
        assert getattr(hf_ft_ext, name) is not None
    assert set(hf_ft_ext.__all__) <= set(dir(hf_ft_ext))
    with pytest.raises(AttributeError, match="no attribute 'SparseTrainner'"):
        hf_ft_ext.SparseTrainner  # noqa: B018
