"""Reports of what the launcher itself leaves."""

import json
import re
from pathlib import Path

import pytest
from tiny import text_dataset

import run_glue
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.folder import checkpoint_to_resume
from hf_ft_ext.report.__main__ import main as report


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text_dataset(40, seed=0).select_columns(["sentence", "label"]).to_csv("train.csv")
    text_dataset(12, seed=1).select_columns(["sentence", "label"]).to_csv("dev.csv")


def run(model: str, *options: str) -> dict:
    folder = f"out{len(list(Path().glob('out*')))}"
    words = [
        "--method", "full", "--model_name_or_path", model, "--train_file", "train.csv", "--max_seq_length", "16",
        "--use_cpu", "--disable_tqdm", "true", "--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no",
        "--output_dir", folder, "--do_train", "--do_eval", *options,
    ]  # fmt: skip
    assert run_glue.main(words) == 0
    return json.loads(Path(folder, "run.json").read_text())


def test_reports_show_devices_and_loss_curves(tiny_bert_dir, capsys, tmp_path):
    """Twice the same command is one seed; a few drawn rows are not the split that they are drawn from."""
    few = (
        "--num_k",
        "2",
        "--test_file",
        "dev.csv",
        "--do_predict",
        "--max_predict_samples",
        "5",
        "--hub_token",
        "hf_x",
    )
    first, again = run(tiny_bert_dir, *few), run(tiny_bert_dir, *few)
    splits = first["data"]["splits"]
    shown = {key: (s["split"], s["rows"], s["source_rows"], s["selection"]) for key, s in splits.items()}
    assert shown == {
        "train": ("train", 4, 40, "drawn"), "eval": ("train", 4, 40, "drawn"), "test": ("test", 5, 12, "first"),
    }  # fmt: skip
    assert first["data"] == again["data"] and first["quality"] == "eval_accuracy"
    assert first["data"]["files"] == {
        f"{k}_file": str(tmp_path / f"{v}.csv") for k, v in (("train", "train"), ("test", "dev"))
    }
    assert first["model_source"] == {"hub_id": None, "revision": None, "folder": str(Path(tiny_bert_dir).resolve())}
    assert (
        first["command"][-2:] == ["--hub_token", "***"] and b"hf_x" not in Path("out0/training_args.bin").read_bytes()
    )
    log = json.loads(Path("out0/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert [entry["eval_loss"] for entry in log if "eval_loss" in entry] == [first["metrics"]["eval_loss"]]
    capsys.readouterr()
    assert report(["out0", "out1", "--output_dir", "report"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n  full +\d\.\d{4}  ", printed) and "±" not in printed
    assert "seed 42 ran 2 times; only the latest run counts: out1" in printed
    assert Path("report/loss-curve.png").exists()


def test_a_run_folder_with_a_state_is_no_checkpoint(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 3, "log_history": []}')
    for sign in ("model.safetensors", "run.json", "checkpoint-3/x"):
        (folder / sign).parent.mkdir(exist_ok=True)
        header = (2).to_bytes(8, "little") if sign.endswith(".safetensors") else b""
        (folder / sign).write_bytes(header + b"{}")
        with pytest.raises(
            InputError, match=r"is the folder of a run.*--output_dir '.*my run' --resume_from_checkpoint"
        ):
            checkpoint_to_resume(str(folder), "")
    for name in ("checkpoint-3", "best"):  # a renamed one has its optimizer
        copy = tmp_path / name
        copy.mkdir()
        (copy / "trainer_state.json").write_text('{"global_step": 3}')
        if name == "best":
            (copy / "rng_state.pth").write_bytes(b"PK\x05\x06" + bytes(18))
        assert checkpoint_to_resume(str(copy), "") == str(copy)
