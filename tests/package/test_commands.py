"""`hf-ft-ext COMMAND`: what the first word chooses."""

import importlib
import os

import pytest

from hf_ft_ext.__main__ import main


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(argv, capsys):
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: hf-ft-ext COMMAND")
    assert all(f"\n  {name} " in shown for name in ("train", "compare", "report", "recipes", "push"))


def test_an_unknown_command_is_refused(capsys):
    assert main(["compair", "runs"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unknown command 'compair'; did you mean 'compare'") and "report, recipes" in said


def test_a_reader_may_leave_before_the_end(monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text("method: full\n")
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert main(["recipes", "--folder", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["compare", "report", "recipes", "push"])
def test_a_command_gets_the_words_behind_it(name, monkeypatch):
    package = {"push": "hub"}.get(name, name)
    module = importlib.import_module(f"hf_ft_ext.{package}.__main__")
    monkeypatch.setattr(module, "main", lambda words: (name, words))
    assert main([name, "a", "--b"]) == (name, ["a", "--b"])
