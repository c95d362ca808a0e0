"""Files that no run can use, by the names that the table of bad inputs has for them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_ft_ext.fisher.plan import _FORMAT

_PLAN = {"format": _FORMAT, "choice": {"0": "lora"}, "candidates": {"lora": {"peft_type": "LORA", "r": 2}}}
_TEXTS = {
    "empty.csv": "",
    "picture.png": "x",
    "broken.json": "{",
    "list.json": "[]",
    "list.jsonl": "[1, 2]\n[3]\n",
    "noheader.csv": "1\n2\n3\n",
    "comma.csv": "sentence,label\na, b,0\nc, d,1\n",
    "onelabel.csv": "sentence,label\na,0\nb,0\n",
    "otherlabels.csv": "sentence,label\na,7\nb,8\n",
    "recipe-list.yaml": "- method\n- full\n",
    "recipe-twice.yaml": "seed: 1\nseed: 2\n",
    "recipe-unknown.yaml": "learning_rat: 1\n",
    "recipe-type.yaml": "task_name: no\n",
    "noplan.json": '{"choice": {}}',
    "otherplan.json": json.dumps({**_PLAN, "model": {"model_type": "gpt2", "layers": 12, "hidden_size": 768}}),
    "badplan.json": json.dumps({**_PLAN, "candidates": {"lora": {"peft_type": "LORA", "r": -3}}}),
    "layerplan.json": json.dumps({**_PLAN, "choice": {"9": "lora"}}),
}


def write_bad_files(folder: Path, root: Path) -> None:
    """Write all of them into `folder`; `root` holds the undamaged model and data (see `workload.prepare`)."""
    for name, text in _TEXTS.items():
        (folder / name).write_text(text)
    (folder / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (folder / "windows.csv").write_bytes("sentence,label\ncaf\xe9,0\nb,1\n".encode("cp1252"))
    (folder / "folder").mkdir()
    shutil.copy(root / "train.csv", folder / "train.csv")
    for name in ("badconfig", "badweights", "otherweights", "notokenizer", "nanweights"):
        shutil.copytree(root / "model", folder / name)
    (folder / "badconfig/config.json").write_text("{")
    weights = folder / "badweights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    save_file({"a": torch.zeros(2)}, folder / "otherweights/model.safetensors", {"format": "pt"})
    for path in (folder / "notokenizer").glob("tokenizer*"):
        path.unlink()
    tensors = load_file(folder / "nanweights/model.safetensors")
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "nanweights/model.safetensors", {"format": "pt"})
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    (folder / "incomplete").mkdir()
    (folder / "incomplete/trainer_state.json").write_text('{"global_st')
