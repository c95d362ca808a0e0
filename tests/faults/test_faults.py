"""A sample of the fault campaign (`make faults`), and its parts that have to hold for each run."""

import json
import os
import re
import shutil
import signal
from random import Random

import damages
import disks
import interruptions
import nan_runs
import pytest
import ranks
from kills import Events
from outcomes import new_folder, recover
from processes import launch, launch_two
from tiny import tiny_model, tiny_tokenizer
from workload import differences

import run_glue
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.folder import checkpoint_to_resume
from hf_ft_ext.training.saved.checkpoints import (
    CHECKSUM_FILE,
    checkpoint_folders,
    checkpoint_problem,
    last_complete_checkpoint,
)


def assert_recovered(fault):
    assert fault.injected and not fault.hung, fault
    assert fault.recovered, fault.found


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_step_it_came_in(unbroken, name):
    run = unbroken("full")
    folder = new_folder(run, name, 0)

    def send():
        os.kill(os.getpid(), signal.Signals[name])

    # 441 module calls, of which a training step makes some 50: in the middle of the third.
    ended = launch(run.workload.argv, folder, Events("work", 130, send).install)
    assert ended.status == {"SIGTERM": 143, "SIGINT": 130}[name] and ended.clean, ended.err
    latest = checkpoint_folders(folder / "out")[0]
    step = json.loads((latest / "trainer_state.json").read_text())["global_step"]
    assert step % 2 == 1 and latest.name == f"checkpoint-{step}"  # save_steps is 2: this one is the signal's
    said = (
        f"stopped by {name}: out/{latest.name} is complete; run the same command again with --resume_from_checkpoint"
    )
    assert said in ended.err and not (folder / "out/run.json").exists()
    assert recover(run.workload, folder).status == 0
    assert not differences(folder, run.folder)


def test_after_a_search_a_run_is_resumed_with_what_it_chose(unbroken):
    pytest.importorskip("optuna")
    workload = unbroken("full").workload
    folder, other = (new_folder(unbroken("full"), "search", i) for i in (0, 1))
    words = [*workload.argv, "--hp_search", "1"]
    assert launch(words, other).status == 0

    def send():
        from hf_ft_ext.launch import search

        found = search.search_hyperparameters

        def search_and_send(*arguments):
            values = found(*arguments)
            Events("work", 130, lambda: os.kill(os.getpid(), signal.SIGTERM)).install()
            return values

        search.search_hyperparameters = search_and_send

    ended = launch(words, folder, send)
    assert ended.status == 143, ended.err
    advice = re.search("--resume_from_checkpoint true, and (.*) in place of --hp_search", ended.err).group(1)
    assert launch([*workload.resumed, *advice.split()], folder).status == 0
    assert not differences(folder, other)


def test_the_same_signal_twice_ends_the_run_at_once(unbroken):
    run = unbroken("full")
    folder = new_folder(run, "twice", 0)

    def send():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    ended = launch(run.workload.argv, folder, Events("work", 130, send).install)
    assert ended.status == 130 and ended.clean
    assert [path.name for path in checkpoint_folders(folder / "out")] == ["checkpoint-2"]


def test_without_checkpoints_a_signal_ends_the_run_at_once(unbroken):
    run = unbroken("full")
    folder = new_folder(run, "no", 0)
    words = [*run.workload.argv, "--save_strategy", "no"]
    ended = launch(words, folder, Events("work", 130, lambda: os.kill(os.getpid(), signal.SIGTERM)).install)
    assert ended.status == 143 and ended.clean and not checkpoint_folders(folder / "out")
    assert "stopped by SIGTERM: there is no checkpoint to resume; run the same command again" in ended.err


@pytest.mark.parametrize(
    ("file", "how", "fault"),
    [
        ("trainer_state.json", "removed", "no trainer_state.json, so the run was ended while it was written"),
        ("trainer_state.json", "emptied", "trainer_state.json cannot be read"),
        ("optimizer.pt", "truncated", "optimizer.pt has .* bytes and had .*: truncated or replaced"),
        ("model.safetensors", "bit flipped", "model.safetensors is not what was saved"),
        ("scheduler.pt", "removed", "scheduler.pt is missing"),
        (CHECKSUM_FILE, "emptied", "checkpoint_checksums.json cannot be read"),
        (CHECKSUM_FILE, "wrong JSON", "checkpoint_checksums.json is not a file of checksums of this version"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(unbroken, tmp_path, file, how, fault):
    shutil.copytree(unbroken("full").folder / "out", tmp_path / "out")
    damages.damage(tmp_path / "out/checkpoint-6" / file, how, Random(1))
    with pytest.raises(InputError, match=rf"(?s)checkpoint-6.*({fault}|no trainer_state.json in it)"):
        checkpoint_to_resume(str(tmp_path / "out/checkpoint-6"), "")
    faults = []
    assert last_complete_checkpoint(tmp_path / "out", faults).name == "checkpoint-4" and len(faults) == 1
    for path in checkpoint_folders(tmp_path / "out"):
        (path / "trainer_state.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"no complete checkpoint.*checkpoint-2.*start again with --overwrite"):
        checkpoint_to_resume("true", str(tmp_path / "out"))


def test_a_checkpoint_with_checksums_under_the_former_name_is_checked(unbroken, tmp_path):
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(unbroken("full").folder / "out/checkpoint-6", folder)
    (folder / CHECKSUM_FILE).rename(folder / "checkpoint_seal.json")
    assert checkpoint_problem(folder) is None
    damages.damage(folder / "model.safetensors", "bit flipped", Random(1))
    assert checkpoint_problem(folder).startswith("model.safetensors is not what was saved")


@pytest.mark.parametrize(("file", "how"), [("optimizer.pt", "truncated"), ("model.safetensors", "truncated"),
                                           ("scheduler.pt", "truncated"), ("config.json", "emptied")])  # fmt: skip
def test_without_checksums_each_file_is_checked_for_being_readable(unbroken, tmp_path, file, how):
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(unbroken("full").folder / "out/checkpoint-6", folder)
    (folder / CHECKSUM_FILE).unlink()
    assert checkpoint_problem(folder) is None
    damages.damage(folder / file, how, Random(3))
    assert f"{file}" in checkpoint_problem(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "sparse"), "holds a whole model, but method 'sparse' trains an adapter"),
        (("--model_name_or_path", "wide"), "was written with another model or other settings: its .* has shape"),
        (("--optim", "sgd"), "the optimizer's state in .* does not fit|is of another"),
    ],
)
def test_a_foreign_checkpoint_is_refused(unbroken, words, message, tmp_path, monkeypatch, capsys):
    run = unbroken("full")
    monkeypatch.chdir(tmp_path)
    tiny_model("bert", intermediate_size=64).save_pretrained("wide")
    tiny_tokenizer().save_pretrained("wide")
    checkpoint = str(run.folder / "out/checkpoint-4")
    status = run_glue.main([*run.workload.argv, "--resume_from_checkpoint", checkpoint, *words])
    error = capsys.readouterr().err
    assert status == 2 and re.search(message, error), error


def test_output_that_cannot_be_written_is_found_before_training(unbroken):
    run = unbroken("full")
    folder = new_folder(run, "file", 0)
    (folder / "file").write_text("")
    ended = launch([*run.workload.argv, "--output_dir", "file/out"], folder)
    assert ended.status == 2 and ended.clean
    assert "output_dir 'file/out' cannot be written to (Not a directory); pass another --output_dir" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind", "seed"),
    [
        ("full", "write", 1), ("lora", "file", 1), ("sparse", "work", 1), ("sparse", "file", 0),
        ("gradientless", "work", 1), ("gradientless", "write", 1), ("fisher", "work", 1), ("fisher", "file", 2),
        ("kernel", "work", 0), ("linearhead", "file", 1),
    ],
)  # fmt: skip
def test_ten_kills(unbroken, method, kind, seed):
    assert_recovered(interruptions.kill_and_recover(unbroken(method), kind, seed))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "kernel"])
def test_interrupted(unbroken, method):
    assert_recovered(interruptions.interrupt_and_recover(unbroken(method), "SIGTERM", 0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", disks.KINDS)
def test_disks(unbroken, kind, tmp_path):
    if kind == "full disk" and not disks.can_mount(tmp_path):
        pytest.skip("a tmpfs needs the right to mount")
    assert_recovered(disks.fill_and_recover(unbroken("gradientless"), kind, 0))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [("damaged cache", 10), ("damaged model", 3)])
def test_damaged_files(unbroken, kind, seed):
    other = unbroken("kernel", "-other", ("--seed", "7", "--max_seq_length", "12"))
    assert_recovered(damages.damage_and_run(unbroken("kernel"), kind, seed, other))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "gradientless", "kernel"])
def test_nan(unbroken, method):
    assert_recovered(nan_runs.run_with_nan(unbroken(method), "NaN", 0))


def test_a_diverging_run_stops_and_saves_no_nan(unbroken):
    run = unbroken("full")
    ended = launch([*run.workload.argv, "--learning_rate", "1e20"], new_folder(run, "diverges", 0))
    assert ended.status == 2 and ended.clean
    assert "error: the loss is nan in step 2: lower --learning_rate (1e+20) or check the data" in ended.err


@pytest.mark.slow
def test_one_of_two_processes_dies(unbroken):
    assert_recovered(ranks.lose_one_and_recover(ranks.two(unbroken("lora")), "rank dies", 0))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(unbroken):
    run = ranks.two(unbroken("full"))
    folder = new_folder(run, "signal", 0)
    send = Events("work", 130, lambda: os.kill(os.getpid(), signal.SIGTERM)).install
    ended = launch_two(run.workload.argv, folder, (None, send))
    assert [e.status for e in ended] == [143, 143], [e.err[-1000:] for e in ended]
    assert sum("stopped by SIGTERM" in e.err for e in ended) == 1
    assert [e.status for e in launch_two(run.workload.resumed, folder)] == [0, 0]
    assert not differences(folder, run.folder)
