"""Which files of a run go to the Hub, and what they say of the machine that they are from."""

import json
import os
from pathlib import Path

import pytest
from run_records import model_run, run_record

from hf_ft_ext.hub.__main__ import main as push_main
from hf_ft_ext.hub.files import public_record, shared_files
from hf_ft_ext.launch.folder import clear_old_run
from hf_ft_ext.methods import METHODS

STRAY = (
    "checkpoint-3/model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", ".hidden",
    "predictions.tsv", "x.log", "notes.txt", "secrets.json", "train.csv", "run.lock", "old.safetensors", "utils.py",
    "runs/events.out.tfevents.1.my-laptop.7.0", "wandb/run-1/config.yaml", "kernels/sgd/rows.safetensors.tmp",
    "kernels/sgd/rows-0.safetensors", "kernels/sgd/kernel.json",
)  # fmt: skip
SOLVED = ("kernel_solution.json", "kernel_solution.safetensors", "kernel_training.safetensors")
OF_METHODS = {
    "sparse": ("sparse_delta.safetensors",),
    "fisher": ("entries_delta.safetensors", "adapter_plan.json", "adapter_plan.png"),
    "kernel": SOLVED,
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def names_of(folder: Path, **options) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in shared_files(folder, **options)}


@pytest.mark.parametrize("method", [*METHODS, "of-a-package-that-is-not-installed"])
def test_nothing_is_shared_that_neither_the_list_nor_the_method_names(tmp_path, tiny_bert_dir, method):
    folder = model_run("mine", tiny_bert_dir, method=method)
    put(folder, *STRAY, *(name for names in OF_METHODS.values() for name in names), "trainer_state.json", "README.md")
    own = {"run.json", "trainer_state.json", "README.md", *os.listdir(tiny_bert_dir)} - {"training_args.bin"}
    assert names_of(folder) == own | set(OF_METHODS.get(method, ()))


def test_code_of_a_model_is_shared_and_links_are_not(tiny_bert_dir, tmp_path):
    folder = model_run("mine", tiny_bert_dir)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_x.X", "AutoConfig": "owner/repo--configuration_y.Y"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text("from .parts import part\n")
    put(folder, "parts.py", "stray.py")
    put(tmp_path, "private.txt")
    (folder / "vocab.json").symlink_to(tmp_path / "private.txt")
    shared = names_of(folder, include=["*.txt", "../*.txt"])
    assert {"modeling_x.py", "parts.py"} <= shared and not shared & {"stray.py", "vocab.json", "../private.txt"}


def test_files_left_out_are_listed_and_can_be_included(hub, tiny_bert_dir, caplog):
    folder = model_run("mine", tiny_bert_dir)
    put(folder, "figure.png", "notes.txt", "checkpoint-3/x", "training_args.bin")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert push_main([str(folder), "--keep_readme"]) == 0
    files = hub.repositories["me/mine"].files
    assert files["README.md"].endswith(b"mine") and not files.keys() & {"figure.png", "notes.txt"}
    command = "hf-ft-ext push mine --hub_model_id me/mine --include NAME"
    assert f"Not pushed: figure.png, notes.txt. To push a file of these too: {command}" in caplog.text
    assert push_main([str(folder), "--include", "*.png"]) == 0
    assert "figure.png" in files and "notes.txt" not in files and files["README.md"].endswith(b"settings.\n")


def test_a_new_run_deletes_what_the_old_ones_method_calls_its_own(tiny_bert_dir):
    for name, record in (("known", True), ("killed", False)):
        folder = model_run(name, tiny_bert_dir, method="fisher")
        put(folder, *OF_METHODS["fisher"], "notes.txt", "trainer_state.json", "predictions_mm.tsv")
        if not record:
            (folder / "run.json").unlink()
        clear_old_run(folder, "full")
        left = set(os.listdir(folder))
        assert "notes.txt" in left and not left & {*OF_METHODS["fisher"], "run.json", "trainer_state.json"}, name


def test_the_record_that_is_pushed_names_neither_folders_of_this_machine_nor_tokens():
    home = "/home/alice/work"
    record = run_record(
        "full", 1, 0.5, model=f"{home}/my model", output_dir=f"{home}/runs/x", labels=["/home/a/label", "b"],
        command=["/usr/bin/run_glue.py", "--train_file", f"{home}/t.csv", f"--cache_dir={home}", "--hub_token", "hf_q",
                 "--dataset_name", "../alice/data", "--model_revision", "~alice/x", "--task_name", "a/b"],
        load=f"X.from_pretrained('{home}/runs/x', base='{home}/my model')",
        data={"files": {"train_file": "C:\\Users\\alice\\t.csv"}, "hub_id": "https://alice:pass@hub/x", "splits": {}},
        arguments={"note": f"see {home}/notes", "given": "hf_abcdefghijklmnopqrstuv", "ratio": "1/2", "page": "https://x/y"},
    )  # fmt: skip
    public = public_record(record)
    text = json.dumps({key: value for key, value in public.items() if key != "labels"})
    assert not [word for word in ("alice", "/home", "hf_abc", "pass") if word in text], text
    assert public["labels"] == record["labels"], "labels are data"
    assert public["load"] == "X.from_pretrained('x', base='my model')" and public["model"] == "my model"
    kept = {"ratio": "1/2", "page": "https://x/y", "note": "see notes"}
    assert kept.items() <= public["arguments"].items() and "a/b" in public["command"]


def test_configurations_keep_their_labels_and_lose_their_paths(hub, tiny_bert_dir, tmp_path):
    folder = model_run("mine", tiny_bert_dir, data=None)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(tmp_path / "base"), "id2label": {"0": "/home/x", "1": "b"}}
    (folder / "config.json").write_text(json.dumps(config))
    put(folder, "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    assert push_main([str(folder)]) == 0
    files = hub.repositories["me/mine"].files
    pushed = json.loads(files["config.json"])
    assert pushed["id2label"] == config["id2label"] and pushed["_name_or_path"] == "base"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert (folder / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
