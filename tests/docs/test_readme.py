"""The README's example trains, and it names the methods. Its commands and links: tests/docs."""

import pytest
from blocks import ROOT, blocks_of
from transformers import AutoModelForSequenceClassification

import hf_ft_ext
from hf_ft_ext.demo.dataset import demo_dataset
from hf_ft_ext.methods import METHODS

README = (ROOT / "README.md").read_text()


def test_python_example_trains_and_saves(tmp_path, monkeypatch, tiny_bert_dir, capsys):
    (code,) = [block.code for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_ft_ext.demo_encoder", lambda: tiny_bert_dir)
    monkeypatch.setattr("hf_ft_ext.demo_dataset", lambda: demo_dataset(train_rows=40, validation_rows=20))
    exec(compile(code, "README.md", "exec"), {})
    assert "eval_loss" in capsys.readouterr().out
    after = AutoModelForSequenceClassification.from_pretrained("runs/mine")
    assert any("sparse_grad_values" in name and p.any() for name, p in after.named_parameters())
    assert len([line for line in code.splitlines() if line and not line.startswith(("from", "import"))]) <= 12


def test_methods_and_public_names_are_there():
    for name in METHODS:
        assert f"`{name}`" in README
    for name in hf_ft_ext.__all__:
        assert getattr(hf_ft_ext, name) is not None
    assert set(hf_ft_ext.__all__) <= set(dir(hf_ft_ext))
    with pytest.raises(AttributeError, match="SparseTrainner"):
        hf_ft_ext.SparseTrainner  # noqa: B018
