"""One run at a time in a folder: who is refused, what a killed run leaves, file systems without locks."""

import os
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from tiny import text_dataset

import run_glue
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch import building
from hf_ft_ext.launch.folder import LOCK_FILE, LOCK_HOLDER_FILE, lock_folder


@pytest.fixture
def launch(tmp_path, monkeypatch, tiny_bert_dir):
    monkeypatch.chdir(tmp_path)
    text_dataset(24).select_columns(["sentence", "label"]).to_csv("train.csv")

    def call(*argv):
        return run_glue.main(
            ["--model_name_or_path", tiny_bert_dir, "--train_file", "train.csv", "--do_train", "--max_steps", "1",
             "--max_seq_length", "16", "--use_cpu", "--disable_tqdm", "true", "--output_dir", "out", *argv]
        )  # fmt: skip

    return call


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_works(launch, capsys):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    with lock_folder("out"):
        before = {path: path.read_bytes() for path in Path("out").iterdir()}
        for more in ((), ("--overwrite_output_dir",)):
            assert launch(*more) == 2
            assert f"'out' is in use by another run (process {os.getpid()} on " in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert launch() == 0
    assert Path("out/run.json").exists() and not Path("out", LOCK_HOLDER_FILE).exists()
    with lock_folder("out"):  # released by the run, in this same process
        pass


def test_a_run_that_came_and_went_meanwhile_is_not_overwritten(launch, monkeypatch, capsys):
    load = building.load

    def slow_load(*positional):
        monkeypatch.setattr(building, "load", load)
        assert launch("--seed", "7") == 0
        return load(*positional)

    monkeypatch.setattr(building, "load", slow_load)
    assert launch() == 2
    assert "already holds a run" in capsys.readouterr().err
    assert '"seed": 7' in Path("out/run.json").read_text()


def test_a_killed_run_leaves_no_lock(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_folder(tmp_path):
            os.write(write, b"x")
            signal.pause()
        os._exit(1)
    assert os.read(read, 1) == b"x"
    with pytest.raises(InputError, match=rf"in use by another run \(process {child} on "), lock_folder(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK_FILE).exists()  # a stale file
    with lock_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_HOLDER_FILE).read_text()


@pytest.mark.parametrize("error", [NotImplementedError("no flock here"), OSError(37, "No locks available")])
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog, error):
    def refuse(self, *positional, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with lock_folder(tmp_path):
        pass
    assert "cannot be locked" in caplog.text and "do not start a second run" in caplog.text
