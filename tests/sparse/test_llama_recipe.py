"""The LLaMA-2 recipe, on a tiny Llama and a handful of made-up messages."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_families import build
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_ft_ext import InputError

SCRIPT = Path(__file__).parents[2] / "recipes" / "sparse" / "llama2_openassistant.py"
MESSAGES = [
    {"message_id": "a", "parent_id": None, "role": "prompter", "text": "good film"},
    {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "a great plot"},
    {"message_id": "c", "parent_id": "b", "role": "prompter", "text": "bad film"},
    {"message_id": "d", "parent_id": "c", "role": "assistant", "text": "a dull plot"},
    {"message_id": "e", "parent_id": "a", "role": "assistant", "text": "fine"},
]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("llama2_openassistant", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inputs(tmp_path):
    model, _ = build("llama", AutoModelForCausalLM)
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, MESSAGES)))
    return ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]


def test_every_reply_comes_with_the_turns_before_it(recipe):
    texts = list(recipe.dialogues(MESSAGES))
    assert texts == [
        "User: good film\nAssistant: a great plot",
        "User: good film\nAssistant: a great plot\nUser: bad film\nAssistant: a dull plot",
        "User: good film\nAssistant: fine",
    ]


def test_trains_up_and_down_of_every_third_layer_only(recipe, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--output_dir", str(out), "--bf16", "false", "--use_cpu", "true", "--disable_tqdm", "true"]
    options += ["--warmup_steps", "0", "--learning_rate", "1e-2", "--gradient_accumulation_steps", "2"]
    recipe.main([*inputs, *options, "--report_to", "none", "--num_train_epochs", "3"])
    printed = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj.sparse_grad_values" in printed and "eval_loss" in printed
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    after = PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"}


def test_another_model_is_an_error_before_training(recipe):
    with pytest.raises(InputError, match=r"no layers\.0\.mlp\.up_proj; pass sparse_target_modules"):
        recipe.every_third(torch.nn.Linear(2, 2))
