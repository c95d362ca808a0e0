"""LOZO and FZOO on decoders through the launcher: the first steps are those of written-out directions, runs resume."""

import json

import pytest
import torch
from decoders import save_decoder
from safetensors.torch import load_file
from tiny import text_dataset

import run_glue
from hf_ft_ext import PromptForSequenceClassification

pytest.importorskip("trl")

WAYS = {
    "lozo": ("--search_direction", "lozo", "--search_renew", "2", "--learning_rate", "1e-3"),
    "fzoo": ("--search_direction", "rademacher", "--search_estimate", "one-sided", "--learning_rate", "1e-3"),
    "fzoo-outer": (
        "--search_direction", "rademacher-outer", "--search_estimate", "one-sided", "--search_directions", "4",
        "--learning_rate", "1e-3",
    ),
}  # fmt: skip
FAMILIES = ("llama", "gpt2", "t5")
TEMPLATE = "*cls**sent_0*_it_was*mask*"
PROMPT = ("--few_shot_type", "prompt", "--template", TEMPLATE, "--mapping", "{'no': 'bad', 'yes': 'great'}")
PAIRS = [("the film was", " great"), ("a dull plot, and", " not the ending"), ("we hated it and really", " bad")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("decoders")
    for family in FAMILIES:
        save_decoder(root / family, family)
    data = text_dataset(12)
    labels = [data.features["label"].names[i] for i in data["label"]]
    lines = [{"sentence": s, "label": label} for s, label in zip(data["sentence"], labels, strict=True)]
    (root / "prompt.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS * 4]
    (root / "language.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return root


def launch(folder, family, way, task, out, *more):
    file = str(folder / f"{task}.jsonl")
    kind = ("--task_type", "seq2seq_lm" if family == "t5" else "causal_lm") if task == "language" else PROMPT
    status = run_glue.main(
        [
            "--model_name_or_path", str(folder / family), "--method", "gradientless", "--search_method", "spsa",
            "--search_target", "all", "--train_file", file, "--validation_file", file, "--do_train",
            "--max_steps", "4", "--save_steps", "2", "--warmup_steps", "0", "--use_cpu", "--disable_tqdm", "true",
            "--output_dir", str(out), *WAYS[way], *kind, *more,
        ]
    )  # fmt: skip
    assert status == 0


@pytest.mark.parametrize("task", ["prompt", "language"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_search_resumes_with_the_same_bits(folder, tmp_path, way, family, task):
    launch(folder, family, way, task, tmp_path / "out", "--do_eval")
    launch(folder, family, way, task, tmp_path / "resumed", "--resume_from_checkpoint",
           str(tmp_path / "out" / "checkpoint-2"))  # fmt: skip
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    half = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    start = load_file(folder / family / "model.safetensors")
    prefix = "masked_lm." if task == "prompt" else ""
    moved = [name for name in whole if name.removeprefix(prefix) in start]
    # every tensor that the forward pass reads moves, in both halves of the run
    same = [n for n in moved if torch.equal(whole[n], half[n]) or torch.equal(half[n], start[n.removeprefix(prefix)])]
    assert not same, same


def test_a_search_of_a_prompt_model_loads_as_one(folder, tmp_path):
    launch(folder, "gpt2", "lozo", "prompt", tmp_path, "--do_eval")
    model = PromptForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.words == ["bad", "great"]
