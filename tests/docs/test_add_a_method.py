"""The worked example of docs/add-a-method.md: its files as a package, through the launcher and its tests."""

import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from blocks import EXAMPLE, ROOT, blocks_of
from processes import launch
from tiny import write_texts

import run_glue
from hf_ft_ext import methods
from hf_ft_ext.compare.settings import read_comparison
from hf_ft_ext.hub.push import shared_files
from hf_ft_ext.launch.folder import clear_old_run

FILES = {block.file: block.code for block in blocks_of(EXAMPLE) if block.file}


def test_the_page_has_all_files():
    assert {"bitfit/arguments.py", "bitfit/trainer.py", "bitfit/__init__.py", "pyproject.toml"} < FILES.keys()


def test_the_method_runs_through_the_launcher(entered, package, tiny_bert_dir, monkeypatch, capsys):
    monkeypatch.chdir(package)
    write_texts("train.csv", 16)
    write_texts("dev.csv", 8, seed=1)
    words = ["--method", "bitfit", "--model_name_or_path", tiny_bert_dir, "--train_file", "train.csv"]
    words += [
        "--validation_file",
        "dev.csv",
        "--max_steps",
        "2",
        "--max_seq_length",
        "16",
        "--use_cpu",
        "--output_dir",
        "out",
    ]
    assert run_glue.main(words) == 0
    assert "bitfit on train.csv" in capsys.readouterr().out and Path("out/model.safetensors").is_file()
    assert "classifier.weight" in Path("out/bitfit_parameters.txt").read_text()
    Path("out/notes.txt").write_text("mine")
    assert {"bitfit_parameters.txt", "notes.txt"} & {path.name for path in shared_files("out")} == {
        "bitfit_parameters.txt"
    }
    clear_old_run("out", "full")
    assert Path("out/notes.txt").exists() and not Path("out/bitfit_parameters.txt").exists()
    assert run_glue.main([*words, "--overwrite_output_dir", "--bitfit_pattern", "nowhere"]) == 2
    assert "bitfit_pattern='nowhere' matches none of the" in capsys.readouterr().err
    assert run_glue.main(["--help"]) == 0
    assert "bitfit        biases and the head" in capsys.readouterr().out
    assert [variant.method for variant in read_comparison(["--methods", "bitfit,lora"]).variants] == ["bitfit", "lora"]


@pytest.mark.slow
def test_the_launchers_matrix_and_the_pages_own_tests_pass(entered, package):
    (command,) = [b.code for b in blocks_of(EXAMPLE) if b.language == "bash" and b.code.startswith("pytest")]
    *paths, option, value = command.partition("#")[0].split()[1:]
    *matrix, own = paths
    words = ["-c", str(ROOT / "setup.cfg"), "--rootdir", str(ROOT), "-q", "-x", "-p", "no:cacheprovider"]
    words += ["-p", "no:xdist", *(str(ROOT / path) for path in matrix), str(package / own)]
    words += [option, value]

    def run_pytest(argv: list[str]) -> int:
        for name in ("launched", "quick", *(Path(path).stem for path in matrix)):
            sys.modules.pop(name, None)  # their parameters are the methods of the moment they are imported
        return pytest.main(argv)

    ended = launch(words, package, main=run_pytest, seconds=300)
    assert ended.status == 0, ended.out[-3000:] + ended.err[-2000:]
    passed = int(ended.out.rpartition(" passed")[0].split()[-1])
    assert passed >= 10, ended.out[-500:]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "full",
            "bitfit:METHOD",
            "method 'full' of 'bitfit:METHOD' is left out: there is a method of that name already",
        ),
        ("x", "no_such_package:METHOD", "is left out: ModuleNotFoundError: No module named 'no_such_package'"),
        ("x", "os:environ", "is left out: it needs arguments, trainer, help, and has"),
    ],
)
def test_entries_that_cannot_work_are_left_out_with_a_warning(entered, monkeypatch, caplog, name, value, message):
    before = dict(methods.METHODS)
    monkeypatch.setattr(methods, "entry_points", lambda group: [EntryPoint(name, value, group)])
    with caplog.at_level(logging.WARNING):
        methods.add_methods_of_other_packages()
    assert message in caplog.text and before == methods.METHODS
