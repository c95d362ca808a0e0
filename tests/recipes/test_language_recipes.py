"""The recipes of language models, on tiny decoders and a handful of made-up rows."""

import json
from pathlib import Path

import pytest
import torch
from decoders import MESSAGES, save_decoder
from peft import PeftModel
from transformers import AutoModelForCausalLM

import run_glue
from hf_ft_ext.compare.settings import read_comparison

RECIPES = Path(__file__).parents[2] / "recipes"
SQUAD = {"title": "A film", "context": "it was great", "question": "was it?", "answers": {"text": ["great"]}}


def write_rows(folder, rows):
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.mark.parametrize("support", ["dynamic", "structured"])
def test_the_llama_run_trains_up_and_down_of_every_third_layer_only(tmp_path, support):
    save_decoder(tmp_path / "model", "llama", num_hidden_layers=4)
    out = tmp_path / "out"
    status = run_glue.main(
        [
            str(RECIPES / "sparse" / "llama2-openassistant.yaml"), "--model_name_or_path", str(tmp_path / "model"),
            "--dataset_name", write_rows(tmp_path / "data", MESSAGES), "--output_dir", str(out),
            "--dtype", "float32", "--use_cpu", "--disable_tqdm", "true", "--warmup_steps", "0", "--learning_rate",
            "1e-2", "--gradient_accumulation_steps", "2", "--num_train_epochs", "3", "--max_seq_length", "64",
            *(("--sparse_support", support) if support == "structured" else ()),
        ]
    )  # fmt: skip
    assert status == 0
    record = json.loads((out / "run.json").read_text())
    assert record["quality"] == "eval_perplexity" and record["task"] == "openassistant"
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(out)
    if support == "structured":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        after = PeftModel.from_pretrained(base, out).merge_and_unload()
    after = after.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 3) for part in ("up", "down")]
    assert changed == set(layers)


@pytest.mark.parametrize(
    "address",
    [*(f"gradientless/mezo/opt.yaml#opt-13b-squad-{way}" for way in ("all", "lora", "prefix")),
     *(f"full/mezo/opt.yaml#opt-13b-squad-{way}" for way in ("lora", "prefix"))],
)  # fmt: skip
def test_the_opt_runs_on_squad(tmp_path, address):
    save_decoder(tmp_path / "model", "opt")
    status = run_glue.main(
        [
            str(RECIPES / address), "--model_name_or_path", str(tmp_path / "model"),
            "--dataset_name", write_rows(tmp_path / "data", [SQUAD] * 4), "--output_dir", str(tmp_path / "out"),
            "--max_steps", "2", "--use_cpu", "--disable_tqdm", "true", "--max_new_tokens", "4",
        ]
    )  # fmt: skip
    assert status == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["quality"] == "eval_f1" and record["generations"][0]["references"] == ["great"]


@pytest.mark.parametrize("task", ["sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa"])
def test_the_table_of_mezo_takes_every_task(task):
    comparison = read_comparison([str(RECIPES / "compare" / "mezo-opt.yaml"), "--task_name", task])
    rates = {v.name: float(v.words["learning_rate"][1]) for v in comparison.variants}
    assert rates == {"mezo": 1e-7, "mezo-lora": 5e-5, "mezo-prefix": 1e-3, "full": 1e-5, "lora": 1e-4}
    assert not any(variant.left_out for variant in comparison.variants)
