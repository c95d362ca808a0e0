"""Language models end alike on one process or two, and with one batch or several micro-batches of unequal lengths."""

import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from cells import VARIANTS, make, result
from decoders import TOKENIZER_OF, decoder, subword_tokenizer
from processes import two_ranks
from safetensors.torch import load_file, save_file

# two processes: method -> family of its prompt, and of its language modelling (the kernel has none)
CELLS = {
    "full": ("opt", "llama"),
    "lora": ("llama", "t5"),
    "sparse": ("qwen3", "gpt2"),
    "sparse-kind": ("t5", "llama"),
    "sparse-random": ("opt", None),
    "sparse-dynamic": ("gpt2", "qwen3"),
    "fisher": ("t5", "llama"),
    "spsa": ("gpt2", "opt"),
    "kernel": ("llama", None),
}
RUNS = [
    (name, family, task)
    for name, pair in CELLS.items()
    for family, task in zip(pair, ("prompt", "language"), strict=True)
    if family is not None
]


def run_all(argv: list[str]) -> None:
    """Train every cell, as one of two processes, into the folder `argv[0]`."""
    for number, (name, family, task) in enumerate(RUNS):
        trainer = make(Path(argv[0]) / "run", name, family, task, batch=2, accumulation=2, steps=2)
        trainer.train()
        ended = result(trainer)
        if trainer.is_world_process_zero():
            save_file(ended, Path(argv[0]) / f"{number}.safetensors")
    trainer.accelerator.end_training()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> list[tuple[dict, dict]]:
    """Of each cell on one process, the parameters before training and the result."""
    for kind in TOKENIZER_OF.values():  # a unigram tokenizer comes out otherwise in each process that trains one
        subword_tokenizer(kind)
    found = []
    for name, family, task in RUNS:
        trainer = make(tmp_path_factory.mktemp("one"), name, family, task, batch=4, accumulation=2, steps=2)
        before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
        trainer.train()
        found.append((before, result(trainer)))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory, one) -> Path:
    """The folder that the runs on two processes leave; what they import, this process has imported."""
    folder = tmp_path_factory.mktemp("two")
    two_ranks(run_all, str(folder), seconds=300)
    return folder


def test_every_method_has_a_cell():
    assert set(CELLS) == set(VARIANTS)


@pytest.mark.parametrize("number", range(len(RUNS)), ids=["-".join(run) for run in RUNS])
def test_two_processes_end_where_one_does(one, two, number):
    (before, ours), theirs = one[number], load_file(two / f"{number}.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, rtol=0, atol=1e-6), f"{key}: {(ours[key] - value).abs().max():.2g}"
    assert any(key not in before or not torch.equal(before[key], value) for key, value in ours.items())


# Losses and their counts depend on family, task and kind of trainer; the sparse variants differ in bases and supports.
ACCUMULATED = [
    *itertools.product(
        ("full", "lora", "sparse", "fisher", "spsa"),
        (("llama", "prompt"), ("llama", "language"), ("llama", "text"), ("t5", "prompt"), ("t5", "language")),
    ),
    *itertools.product(("sparse-kind", "sparse-random", "sparse-dynamic"), (("llama", "language"), ("t5", "prompt"))),
]


@pytest.mark.parametrize(("name", "cell"), ACCUMULATED, ids=["-".join((name, *cell)) for name, cell in ACCUMULATED])
def test_eight_times_one_row_equals_two_times_four(tmp_path, name, cell):
    (family, task), ended = cell, []
    for batch, accumulation in ((1, 8), (4, 2)):
        trainer = make(tmp_path, name, family, task, batch, accumulation)
        trainer.train()
        ended.append(result(trainer))
    one, four = ended
    start = dict(decoder(family, len(subword_tokenizer(TOKENIZER_OF[family]))).double().named_parameters())
    assert one.keys() == four.keys()
    plain = {key: key.rpartition("masked_lm.")[2] for key in one}
    assert any(plain[key] not in start or not torch.equal(start[plain[key]], p) for key, p in one.items())
    for key, parameter in one.items():
        assert torch.allclose(parameter, four[key], rtol=0, atol=1e-6), key
