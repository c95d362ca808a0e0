"""What runs save writes, in transformers' `pipeline` and `generate`, the texts that the run wrote."""

import json

import pytest
from decoders import save_decoder
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

import run_glue

pytest.importorskip("trl")

PAIRS = [("the film was", " great"), ("a dull plot, and", " not the ending"), ("we hated it and really", " bad")]
WAYS = {
    "full": ("--method", "full", "--learning_rate", "1e-2"),
    "lora": ("--method", "lora", "--learning_rate", "0.05"),
    "sparse": ("--method", "sparse", "--sparse_basis_steps", "2", "--sparse_density", "0.2", "--learning_rate", "0.1"),
    "sparse-dynamic": ("--method", "sparse", "--sparse_basis_steps", "2", "--sparse_support", "dynamic"),
    "lozo": (
        "--method", "gradientless", "--search_method", "spsa", "--search_target", "all", "--search_direction", "lozo",
        "--learning_rate", "1e-2",
    ),
    "search-lora": (
        "--method", "gradientless", "--search_method", "spsa", "--search_peft", "lora", "--learning_rate", "0.1",
    ),
    "fisher": ("--method", "fisher", "--fisher_examples", "4", "--learning_rate", "0.05"),
    "mask": ("--method", "fisher", "--fisher_mode", "mask", "--fisher_examples", "4", "--fisher_keep_ratio", "0.2"),
}  # fmt: skip
FAMILIES = ("llama", "gpt2", "t5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("decoders")
    for family in FAMILIES:
        save_decoder(root / family, family)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_the_folder_writes_the_run_s_texts(folder, tmp_path, way, family):
    file = str(folder / "pairs.jsonl")
    status = run_glue.main(
        [
            "--model_name_or_path", str(folder / family), "--task_type",
            "seq2seq_lm" if family == "t5" else "causal_lm", "--train_file", file, "--test_file", file, "--do_train",
            "--do_predict", "--max_steps", "3", "--warmup_steps", "0", "--max_new_tokens", "5", "--use_cpu",
            "--disable_tqdm", "true", "--output_dir", str(tmp_path), *WAYS[way],
        ]
    )  # fmt: skip
    assert status == 0
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if family == "t5":  # transformers 5 has no pipeline for encoder-decoders
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    else:
        write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    for row in written:
        if family == "t5":
            ids = model.generate(**tokenizer(row["prompt"], return_tensors="pt"), max_new_tokens=5, do_sample=False)
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
        else:
            made = write(row["prompt"], max_new_tokens=5, do_sample=False, return_full_text=False)
            text = made[0]["generated_text"]
        assert text.strip() == row["prediction"]
