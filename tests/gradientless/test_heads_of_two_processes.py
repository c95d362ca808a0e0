"""Heads that are found in unusual places, and features that depend on padding: two processes end as one does."""

import os
import time
from pathlib import Path

import pytest
import torch
import transformers
from heads import OPTIONS
from processes import two_ranks
from safetensors.torch import load_file, save_file
from tiny import tiny_dataset, tiny_tokenizer

from hf_ft_ext import (
    GradientlessTrainer,
    GradientlessTrainingArguments,
    LinearHeadTrainer,
    LinearHeadTrainingArguments,
)

_SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZE, "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}
_IMAGES = {"vision_config": {**_SIZE, "image_size": 16, "patch_size": 8}, "text_config": {**_SIZE, "vocab_size": 60}}
_STACK = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
_SOUNDS = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _STACK.items()}
MODELS = {
    "CLIPForImageClassification": _IMAGES,
    "SiglipForImageClassification": _IMAGES,
    "WhisperForAudioClassification": {"d_model": 16, "vocab_size": 60, "pad_token_id": 0, "num_mel_bins": 8,
                                      "max_source_positions": 20, **_SOUNDS},
    "FNetForSequenceClassification": _TEXT,
    "ConvBertForSequenceClassification": _TEXT,
    "RobertaForSequenceClassification": _TEXT,
}  # fmt: skip
SEARCHES = {
    "gld": {"learning_rate": 0.1},
    "spsa": {"search_method": "spsa", "learning_rate": 0.1, "search_directions": 2},
}
FITTED = ("FNetForSequenceClassification", "RobertaForSequenceClassification")


def model_of(kind: str):
    model_class = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(model_class.config_class(num_labels=2, **MODELS[kind])).double()


def data_of(kind: str):
    draw = torch.Generator().manual_seed(0)
    if "Image" in kind:
        return [{"pixel_values": torch.randn(3, 16, 16, generator=draw).double(), "labels": i % 2} for i in range(16)]
    if "Audio" in kind:
        return [{"input_features": torch.randn(8, 40, generator=draw).double(), "labels": i % 2} for i in range(16)]
    return tiny_dataset(16)


def ended(folder: Path, kind: str, search: str | None, world: int) -> tuple[dict[str, torch.Tensor], int]:
    """The head's parameters after a search, or a fit (`None`), and the number of feature files."""
    data, model = data_of(kind), model_of(kind)
    tokenizer = tiny_tokenizer() if hasattr(data, "column_names") else None
    features = folder / f"{kind}-{search}-{world}"
    options = {key: OPTIONS[key] for key in ("report_to", "disable_tqdm", "use_cpu", "dataloader_pin_memory")}
    options |= {"feature_cache_dir": str(features), "per_device_eval_batch_size": 4, "remove_unused_columns": False}
    if search is None:
        args = LinearHeadTrainingArguments(str(folder / "out"), **options)
        trainer = LinearHeadTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    else:
        options |= {"max_steps": 3, "per_device_train_batch_size": 8 // world, "save_strategy": "no"}
        args = GradientlessTrainingArguments(str(folder / "out"), **options, **SEARCHES[search])
        trainer = GradientlessTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    assert args.world_size == world
    trainer.train()
    if search is not None:
        wanted = set(trainer.searched)
        assert wanted and not any("layers" in name for name in wanted), wanted
    else:
        wanted = {name for name, _ in model.named_parameters() if name.startswith("classifier")}
    files = len(list(features.glob("*.safetensors"))) if features.exists() else 0
    return {name: p.detach().clone().contiguous() for name, p in model.named_parameters() if name in wanted}, files


CASES = [*((kind, search) for kind in MODELS for search in SEARCHES), *((kind, None) for kind in FITTED)]


def run(argv: list[str]) -> None:
    """As one of two processes."""
    from accelerate import PartialState

    folder = Path(argv[0])
    for kind, search in CASES:
        found, files = ended(folder, kind, search, 2)
        save_file({**found, "files": torch.tensor(files)}, folder / f"{kind}-{search}.{os.environ['RANK']}")
    PartialState().wait_for_everyone()
    time.sleep(0.5)  # gloo's threads abort a process that exits while they hold tensors
    PartialState().destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path):
    two_ranks(run, str(tmp_path))
    for kind, search in CASES:
        expected, files = ended(tmp_path, kind, search, 1)
        start = dict(model_of(kind).named_parameters())
        assert any(not torch.equal(value, start[name]) for name, value in expected.items()), kind
        for rank in (0, 1):
            found = load_file(tmp_path / f"{kind}-{search}.{rank}")
            assert int(found.pop("files")) == files, f"{kind} {search}"
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, msg=f"{kind} {search}: {name}")
        if files:
            names = [sorted(p.name for p in (tmp_path / f"{kind}-{search}-{n}").glob("*.safetensors")) for n in (1, 2)]
            assert names[0] == names[1], f"{kind} {search}"
