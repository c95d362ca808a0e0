"""`--packing`: rows in one sequence train as rows of one batch do, or are refused where they would read each other."""

import json

import pytest
import torch
from decoders import DECODERS, OTHER_DECODERS, TOKENIZER_OF, save_decoder, subword_tokenizer
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import run_glue

pytest.importorskip("trl")

TEXTS = [
    "a film with a great plot",
    "we hated the dull scene, but not the ending!",
    "it was",
    "in paris, bad and dull",
]
_STEP = ("--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0")
WAYS = {
    "full": ("--method", "full", *_STEP),
    "lora": ("--method", "lora", *_STEP),
    "sparse": ("--method", "sparse", "--sparse_basis", "random", "--sparse_density", "0.2", *_STEP),
    "fisher": ("--method", "fisher", "--fisher_mode", "single", "--fisher_candidates", "bottleneck", *_STEP),
    "spsa": (
        "--method", "gradientless", "--search_method", "spsa", "--search_target", "all", "--search_eps", "0.1",
        "--learning_rate", "0.01",
    ),
    "lozo": (
        "--method", "gradientless", "--search_method", "spsa", "--search_target", "all", "--search_eps", "0.1",
        "--search_direction", "lozo", "--learning_rate", "0.01",
    ),
    "fzoo": (
        "--method", "gradientless", "--search_method", "spsa", "--search_target", "all", "--search_eps", "0.1",
        "--search_direction", "rademacher-outer", "--search_estimate", "one-sided", "--learning_rate", "0.01",
    ),
}  # fmt: skip


def launch(folder, out, *options) -> int:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return run_glue.main(
        [
            "--model_name_or_path", str(folder / "model"), "--task_type", "causal_lm", "--train_file", str(file),
            "--do_train", "--max_steps", "2", "--warmup_steps", "0", "--lr_scheduler_type", "constant",
            "--per_device_train_batch_size", "4", "--train_sampling_strategy", "sequential", "--logging_steps", "1",
            "--max_seq_length", "100", "--use_cpu", "--disable_tqdm", "true", "--output_dir", str(folder / out),
            *options,
        ]
    )  # fmt: skip


def weights(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*model.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_packed_rows_train_as_the_rows_of_a_batch(tmp_path, way, family):
    save_decoder(tmp_path / "model", family)
    assert launch(tmp_path, "packed", "--packing", *WAYS[way]) == 0
    assert launch(tmp_path, "batch", *WAYS[way]) == 0
    packed, batch = weights(tmp_path / "packed"), weights(tmp_path / "batch")
    start = weights(tmp_path / "model")
    assert packed.keys() == batch.keys()
    assert any(name not in start or not torch.equal(start[name], tensor) for name, tensor in packed.items())
    for name, tensor in packed.items():
        torch.testing.assert_close(tensor, batch[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "family", [family for family in (*DECODERS, *OTHER_DECODERS) if family not in ("t5", "bart", "pegasus")]
)
def test_packed_rows_do_not_read_each_other_or_are_refused(tmp_path, capsys, family):
    save_decoder(tmp_path / "model", family)
    status = launch(tmp_path, "out", "--packing", "--method", "full")
    if status == 2:
        error = capsys.readouterr().err.splitlines()[-1]
        assert family in ("opt", "bloom", "mamba2", "recurrent_gemma", "rwkv"), error
        assert "read each other; leave packing out" in error or "cannot read packed rows" in error, error
        return
    assert status == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = subword_tokenizer(TOKENIZER_OF[family])
    total = count = 0
    for text in TEXTS:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert next(entry["loss"] for entry in log if "loss" in entry) == pytest.approx(total / count, abs=1e-4)
