"""Half-precision checkpoints: what trains is float32 and moves as in float32, what stays keeps its format."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from spans import principal_angle, with_changes
from tiny import labels_only, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from hf_ft_ext.arguments import ModelArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.full.arguments import FullTrainingArguments
from hf_ft_ext.full.trainer import FullTrainer
from hf_ft_ext.linearhead.arguments import LinearHeadTrainingArguments
from hf_ft_ext.linearhead.trainer import LinearHeadTrainer
from hf_ft_ext.lora.arguments import LoraTrainingArguments
from hf_ft_ext.lora.trainer import LoraTrainer
from hf_ft_ext.methods import METHODS
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.training.weights.precision import train_in_float32

FLOAT32, STORED = "float32", "stored"
SGD = {"optim": "sgd", "learning_rate": 0.1}  # AdamW turns rounding noise into steps of full size
# name -> method, settings, format of what is saved, largest relative error of the changes against a float32 run
VARIANTS = {
    "full": ("full", SGD, FLOAT32, 1e-6),
    "fixed layers": ("full", {"fix_layers": 1, **SGD}, FLOAT32, 1e-6),
    "prefix": ("full", {"peft": "prefix_tuning", "peft_config": {"num_virtual_tokens": 3}, **SGD}, FLOAT32, 0.05),
    "ia3": ("full", {"peft": "ia3", **SGD}, FLOAT32, 0.05),
    "lora": ("lora", SGD, FLOAT32, 0.05),
    "sparse": (
        "sparse", {"sparse_support": "dynamic", "sparse_basis_steps": 2, "sparse_density": 0.2, "learning_rate": 1e-2},
        FLOAT32, 1e-6,
    ),
    "sparse adapter": ("sparse", {"sparse_basis_steps": 8, "sparse_density": 0.1, **SGD}, FLOAT32, 0.05),
    "fisher": ("fisher", {"fisher_examples": 4, **SGD}, FLOAT32, 0.05),
    "bottleneck": ("fisher", {"fisher_mode": "single", "fisher_candidates": ["bottleneck"], **SGD}, FLOAT32, 0.05),
    "mask": ("fisher", {"fisher_mode": "mask", "fisher_mask": "random", **SGD}, FLOAT32, 1e-6),
    "gld": ("gradientless", {"feature_cache_gb": 0.0}, STORED, None),
    "spsa": ("gradientless", {"search_method": "spsa", "search_target": "all", "learning_rate": 1e-3}, STORED, None),
    "linear head": ("linearhead", {"linearhead_c": 1.0}, STORED, None),
}  # fmt: skip

# Both formats for one variant of each way to train; of the others the one with fewer digits.
STORED_IN = [(variant, "bfloat16") for variant in VARIANTS]
STORED_IN += [(variant, "float16") for variant in ("full", "lora", "sparse", "fisher", "mask", "gld", "linear head")]


def both(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to numbers that bfloat16 and float16 both hold."""
    return tensor.bfloat16().half().float() if tensor.is_floating_point() else tensor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The same model, stored in three formats."""
    root, model = tmp_path_factory.mktemp("formats"), tiny_model(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model.load_state_dict({name: both(tensor) for name, tensor in model.state_dict().items()})
    for kind in ("float32", "bfloat16", "float16"):
        copy.deepcopy(model).to(getattr(torch, kind)).save_pretrained(root / kind)
        tiny_tokenizer().save_pretrained(root / kind)
    return {folder.name: folder for folder in root.iterdir()}


def train(folder: Path, variant: str, output_dir: Path):
    method, settings, *_ = VARIANTS[variant]
    method = METHODS[method]
    steps = {} if method.name == "linearhead" else {"max_steps": 3, "logging_steps": 1}
    args = method.arguments_class()(
        output_dir=str(output_dir), use_cpu=True, do_train=True, save_strategy="no", report_to=[], disable_tqdm=True,
        **steps, **settings,
    )  # fmt: skip
    arguments = ModelArguments(model_name_or_path=str(folder))
    tokenizer, model = load_tokenizer_and_model(arguments, labels_only("a", "b"), seed=0, args=args)
    trainer = method.trainer_class()(
        model, args, train_dataset=tiny_dataset(24), eval_dataset=tiny_dataset(12, seed=1), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    return trainer


def saved_by(trainer) -> dict[str, torch.Tensor]:
    found = {}
    for file in Path(trainer.args.output_dir).glob("*model.safetensors"):
        found |= load_file(file)
    return found


def changes(trainer, folder: Path) -> torch.Tensor:
    """All changes of what was trained, in one vector; adapters start from the same draw."""
    saved = with_changes(saved_by(trainer))
    start = load_file(folder / "model.safetensors")
    parts = []
    for name in sorted(name for name in saved if "_columns." not in name):
        base = next((start[key].float() for key in start if name.endswith(key)), 0.0)
        parts.append((saved[name].float() - base).flatten())
    return torch.cat(parts)


@pytest.fixture(scope="module")
def in_float32(checkpoints, tmp_path_factory):
    """`variant -> changes, evaluation loss, saved tensors` of a run on the float32 checkpoint, each made once."""
    done = {}

    def get(variant: str):
        if variant not in done:
            trainer = train(checkpoints["float32"], variant, tmp_path_factory.mktemp("reference"))
            loss = trainer.evaluate()["eval_loss"]
            done[variant] = changes(trainer, checkpoints["float32"]), loss, with_changes(saved_by(trainer))
        return done[variant]

    return get


@pytest.mark.parametrize(("variant", "stored"), STORED_IN)
def test_trains_saves_and_loads_as_in_float32(checkpoints, in_float32, variant, stored, tmp_path):
    _, _, kept, tolerance = VARIANTS[variant]
    expected, loss, reference = in_float32(variant)
    trainer = train(checkpoints[stored], variant, tmp_path)
    found = changes(trainer, checkpoints[stored])
    assert float(expected.norm()) > 0 and float(found.norm()) > 0
    if tolerance is not None:
        assert float((found - expected).norm() / expected.norm()) < tolerance
    for name, tensor in with_changes(saved_by(trainer)).items():
        if "_columns." in name:
            # the last directions hold less than bfloat16's rounding of the products, so they may be others
            leading = reference[name][:, : tensor.shape[1] // 2]
            assert principal_angle(tensor.float(), leading) < 0.1
        elif "sparse_grad_values" in name:
            assert float((tensor - reference[name]).norm() / reference[name].norm()) < tolerance
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=0.02)

    wanted = torch.float32 if kept == FLOAT32 else getattr(torch, stored)
    saved = load_file(next(tmp_path.glob("*model.safetensors")))
    trained = {
        name: tensor for name, tensor in saved.items() if "_columns." not in name
    }  # these are the base's format
    assert {tensor.dtype for tensor in trained.values()} == {wanted}
    if (tmp_path / "adapter_config.json").exists():
        base = AutoModelForSequenceClassification.from_pretrained(checkpoints[stored], num_labels=2)
        loaded = PeftModel.from_pretrained(base, tmp_path)
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    batch = {"input_ids": torch.randint(5, 30, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    with torch.no_grad():
        ours, theirs = trainer.model.eval()(**batch).logits, loaded.eval()(**batch).logits
    assert torch.allclose(ours.float(), theirs.float(), atol=0.02)


def test_a_head_trains_in_float32_beside_a_bfloat16_encoder(tmp_path, checkpoints):
    """With a fresh pooler, which sits within the encoder: its output goes on in bfloat16."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoints["bfloat16"])
    model.fresh_parameters = frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias"})
    trainer = LoraTrainer(model, LoraTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
    model = copy.deepcopy(trainer.model)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert any("pooler" in name for name in trained) and set(trained.values()) == {torch.float32}
    assert model.base_model.model.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    seen = []
    pooler = model.base_model.model.bert.pooler
    pooler.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    logits = model(input_ids=torch.randint(5, 30, (2, 6))).logits
    assert seen == [torch.bfloat16] and logits.dtype == torch.float32
    assert train_in_float32(model) is model


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_lost_updates_of_a_users_own_model_are_announced_once(tmp_path, kind, caplog):
    caplog.set_level("WARNING", logger="hf_ft_ext")
    args = FullTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, report_to=[], save_strategy="no", optim="sgd"
    )
    model = tiny_model().to(getattr(torch, kind))
    FullTrainer(model, args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer()).train()
    said = [record.getMessage() for record in caplog.records if "rounded away" in record.getMessage()]
    assert len(said) == (kind != "float32")
    assert not said or (kind in said[0] and "dtype=torch.float32 and pass bf16=True" in said[0])


def test_fp16_on_a_cpu_is_refused(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "fp16": True, "report_to": []}
    for trainer, arguments in (
        (FullTrainer, FullTrainingArguments),
        (LoraTrainer, LoraTrainingArguments),
        (LinearHeadTrainer, LinearHeadTrainingArguments),
    ):
        with pytest.raises(InputError, match=r"fp16=True needs an accelerator.*pass bf16=True"):
            trainer(tiny_model(), arguments(**options), train_dataset=tiny_dataset(8))
