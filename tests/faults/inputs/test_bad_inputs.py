"""A table of what users get wrong: one line that says what and what to do, before anything is trained."""

import os
import re
import shlex
from pathlib import Path

import pytest
from bad_files import write_bad_files
from quick import SOLVER_METHODS
from workload import Workload

import run_glue
from hf_ft_ext.training.runs.resources import ResourceMonitor

TABLE = [
    line.split(" => ")
    for line in Path(__file__).with_name("bad_inputs.txt").read_text().splitlines()
    if line[0] != "#"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, fault_root) -> Path:
    found = tmp_path_factory.mktemp("bad")
    write_bad_files(found, fault_root)
    return found


def test_the_table_has_no_row_twice():
    assert len({words for words, _ in TABLE}) == len(TABLE) >= 80


@pytest.mark.parametrize(("words", "message"), TABLE, ids=[words for words, _ in TABLE])
def test_one_line_before_training(words, message, folder, fault_root, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ResourceMonitor, "on_step_end", lambda *_, **__: pytest.fail("a step was trained"))
    method, *words = shlex.split(words)
    base = [*Workload(method, fault_root).argv, *(() if method in SOLVER_METHODS else ("--max_steps", "1"))]
    if any("adapter_plan" in word for word in words):  # it settles what these are about
        start = base.index("--fisher_examples")
        del base[start : start + 4]
    recipe = [words.pop(0)] if not words[0].startswith("--") else []
    assert run_glue.main([*recipe, *base, *words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error.rpartition("error: ")[2], flags=re.DOTALL), error
    assert not os.path.exists("out/run.json")
