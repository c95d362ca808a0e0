"""The Python blocks of README and docs run, each by itself, offline: tiny models stand for those that they name."""

import pytest
from blocks import BLOCKS
from offline import tokenizer_with_label_words, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ft_ext.demo.dataset import demo_dataset

# Elsewhere: files of the worked example (test_add_a_method.py), README's (test_readme.py).
PYTHON = [b for b in BLOCKS if b.language == "python" and b.file is None and b.page.name != "README.md"]
# What stands in for the models that blocks load by name.
DEMO, CAUSAL, MASKED = "demo", "distilbert/distilgpt2", "roberta-base"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, str]:
    causal = tmp_path_factory.mktemp("causal")
    tokenizer = tokenizer_with_label_words()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(causal)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(causal)
    return {
        DEMO: write_model(tmp_path_factory.mktemp("demo")),
        CAUSAL: str(causal),
        MASKED: write_model(tmp_path_factory.mktemp("masked"), "roberta"),
    }


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_blocks_run(block, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_ft_ext.demo_encoder", lambda: stand_ins[DEMO])
    monkeypatch.setattr("hf_ft_ext.demo_dataset", lambda: demo_dataset(train_rows=40, validation_rows=20))
    code = block.code
    if 'model="runs/mine"' in code and "save_model" not in code:  # the result of an earlier command
        write_model(tmp_path / "runs" / "mine")
    for name in (CAUSAL, MASKED):
        code = code.replace(f'"{name}"', repr(stand_ins[name]))
    exec(compile(code, block.name, "exec"), {"__name__": "__main__"})
