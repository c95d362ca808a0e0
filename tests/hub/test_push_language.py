"""Pushing language models: once, and a fresh process loads them with the card's code."""

import json

import pytest
import torch
from decoders import save_decoder
from huggingface_hub import HfApi
from pushed import QUICK, card_of, fresh_process, snippets

import run_glue

TEXT_INPUTS = {"causal_lm": ["input_ids"], "seq2seq_lm": ["input_ids", "decoder_input_ids"]}


@pytest.mark.slow
def test_language_models_are_pushed_once_and_pulled_into_a_fresh_process(hub, capsys, tmp_path, monkeypatch):
    """Their trainers have arguments of another class than the launcher's."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": "the film was", "completion": " great"}, {"prompt": "a dull plot, and", "completion": " bad"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs * 8)))
    program, own = ["import json, torch"], []
    for family, method in (("llama", "lora"), ("gpt2", "full"), ("t5", "sparse")):
        save_decoder(tmp_path / family, family)
        HfApi().create_repo(f"me/{family}")
        HfApi().upload_folder(repo_id=f"me/{family}", folder_path=tmp_path / family)
        task, name = "seq2seq_lm" if family == "t5" else "causal_lm", f"run-{family}"
        status = run_glue.main(
            [
                "--method", method, "--model_name_or_path", f"me/{family}", "--train_file", "pairs.jsonl",
                "--validation_file", "pairs.jsonl", "--task_type", task, "--max_seq_length", "16", "--use_cpu",
                "--disable_tqdm", "true", "--output_dir", name, "--max_steps", "2", "--learning_rate", "1e-2",
                "--push_to_hub", *QUICK.get(method, ()),
            ]
        )  # fmt: skip
        assert status == 0, capsys.readouterr().err
        repository = hub.repositories[f"me/{name}"]
        assert len(repository.commits) == 1 and {"README.md", "tokenizer.json"} <= repository.files.keys()
        assert json.loads(repository.files["run.json"])["metrics"]["eval_perplexity"] > 0
        assert not [f for f in repository.files if "training_args" in f or "checkpoint" in f]
        (code,) = snippets(card_of(hub, name)[1])
        inputs = ", ".join(f"{key}=torch.tensor([[5, 6, 7]])" for key in TEXT_INPUTS[task])
        outputs = f"print(json.dumps(model.eval()({inputs}).logits.tolist()))"
        program += [code, outputs]
        own += [code.replace(f"me/{name}", name), outputs]
    pulled = fresh_process("\n".join(program), hub, tmp_path / "elsewhere").stdout
    exec("\n".join(own), {"json": json, "torch": torch})
    assert pulled.splitlines() == capsys.readouterr().out.splitlines()[-3:]
