"""Kernels on disk: interrupted runs, mismatches, damage, and the authors' files."""

import json
import random

import pytest
import torch
from families import batch, family
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel import store
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.store import KernelStore, parts

LEFT, RIGHT = ExampleRows(batch(5)), ExampleRows(batch(9, 11, seed=1))
ABOUT = {"model": "a", "data": "b"}


class Killed(BaseException):
    """Ends the process like a signal: nothing may catch it."""


def run(folder, blocks_before_death=None, formula="sgd", second=RIGHT, **options):
    computation = KernelComputation(family("bert"), KernelOptions(formula, block_rows=2, **options))
    kernels, left = computation.engine.kernels, [blocks_before_death]
    computed = []

    def mortal(a, b):
        if left[0] is not None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
        computed.append(1)
        return kernels(a, b)

    computation.engine.kernels = mortal
    try:
        return computation.run(LEFT, second, KernelStore(folder, ABOUT)), len(computed)
    except Killed:
        return None, len(computed)


@pytest.mark.parametrize("formula, second", [("sgd", RIGHT), ("asymmetric_signgd", None)])
def test_killed_ten_times_a_run_ends_with_the_same_bits(tmp_path, formula, second):
    whole, blocks = run(tmp_path / "whole", formula=formula, second=second)
    generator, total = random.Random(0), 0
    for _ in range(10):
        kernel, computed = run(tmp_path / "killed", generator.choice([0, 0, 1]), formula, second)
        total += computed
        if kernel is not None:
            break
        if generator.random() < 0.5:  # half a file, as a killed write leaves it
            (tmp_path / "killed" / ".block-00000-00000.safetensors.1.tmp").write_bytes(b"half")
    kernel, computed = run(tmp_path / "killed", None, formula, second)
    assert torch.equal(kernel, whole) and total + computed == blocks  # no block was computed twice
    again, computed = run(tmp_path / "killed", None, formula, second)
    assert computed == 0 and torch.equal(again, whole)


def finished_blocks(folder):
    return {path.name: load_file(path)["kernel"] for path in folder.glob("*/block-*.safetensors")}


@pytest.mark.parametrize(
    "formula, second, options",
    [("sgd", RIGHT, {}), ("asymmetric_signgd", None, {}), ("sgd", RIGHT, {"class_diagonal": True})],
)
def test_new_memory_limit_applies_and_keeps_finished_blocks(tmp_path, formula, second, options):
    """As after running out of memory: finished blocks stay, and the others use the new limit and batch size."""
    about = {**ABOUT, **options, "second": None if second is None else "b"}
    options = {"formula": formula, **options}

    def computation(**sizes):
        return KernelComputation(family("bert").double(), KernelOptions(block_rows=3, **options, **sizes))

    whole = computation(batch_size=4).run(LEFT, second, KernelStore(tmp_path / "whole", about))
    blocks = finished_blocks(tmp_path / "whole")
    cut = KernelStore(tmp_path / "cut", about)
    computation().run(LEFT, second, cut)
    kept = sorted(cut.folder.glob("block-*"))
    for path in kept[2:]:
        path.unlink()
    first = {path: path.read_bytes() for path in kept[:2]}
    with pytest.raises(InputError, match="pass at least") as error:
        computation(memory_gb=1e-6).run(LEFT, second, KernelStore(tmp_path / "cut", about))
    least = float(str(error.value).split("at least ")[1].split(",")[0])
    small = computation(memory_gb=least)
    sides, side = [], small.engine.gradient_rows
    small.engine.gradient_rows = lambda rows, batches: sides.append(batches) or side(rows, batches)
    found = small.run(LEFT, second, KernelStore(tmp_path / "cut", about))
    assert sides and all(len(batches) == 1 == len(batches[0]) for batches in sides)  # one row at a time
    assert {path: path.read_bytes() for path in first} == first
    assert finished_blocks(tmp_path / "cut").keys() == blocks.keys()
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9 * whole.abs().max().item())


def test_current_batch_size_is_used_for_stored_blocks(tmp_path):
    computation = KernelComputation(family("bert"), KernelOptions(block_rows=5, batch_size=4))
    computation.run(LEFT, RIGHT, KernelStore(tmp_path, ABOUT))
    for path in KernelStore(tmp_path, ABOUT).folder.glob("block-*"):
        path.unlink()
    computation = KernelComputation(family("bert"), KernelOptions(block_rows=2, batch_size=2))
    plans, side = [], computation.engine.gradient_rows
    computation.engine.gradient_rows = lambda rows, batches: (
        plans.append(max(map(len, batches))) or side(rows, batches)
    )
    computation.run(LEFT, RIGHT, KernelStore(tmp_path, ABOUT))
    assert max(plans) == 2 and len(finished_blocks(tmp_path)) == 2


def test_folder_of_an_older_version_is_read(tmp_path):
    """Its description also holds the batch size and memory of that run."""
    whole, _ = run(tmp_path)
    path = KernelStore(tmp_path, ABOUT).folder / store.DESCRIPTION
    description = json.loads(path.read_text())
    description["plan"] |= {"batch_size": 3, "scratch_bytes": 1000}
    description["check"] = parts.checksum_of_description(description["about"], description["plan"])
    path.write_text(json.dumps(description))
    again, computed = run(tmp_path)
    assert computed == 0 and torch.equal(again, whole)


def test_the_folder_is_named_after_the_content(tmp_path):
    model = family("bert")
    first = store.model_hash(model)
    assert store.model_hash(family("bert")) == first
    model.bert.embeddings.requires_grad_(False)
    assert store.model_hash(model) != first
    other = family("bert")
    with torch.no_grad():
        other.classifier.bias[0] += 1e-3
    assert store.model_hash(other) != first
    configs = (LoraConfig(lora_alpha=alpha, init_lora_weights=False) for alpha in (8, 9))
    adapted = [get_peft_model(family("bert"), config) for config in configs]
    adapted[1].load_state_dict(adapted[0].state_dict())  # the same weights, which act otherwise
    assert store.model_hash(adapted[0]) != store.model_hash(adapted[1])
    assert store.rows_hash(LEFT) != store.rows_hash(RIGHT)
    longer = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in batch(5).items()}
    assert store.rows_hash(ExampleRows(longer)) == store.rows_hash(LEFT)  # padding is no content
    assert KernelStore(tmp_path, ABOUT).folder != KernelStore(tmp_path, {**ABOUT, "data": "c"}).folder


def test_overwriting_computes_again(tmp_path):
    run(tmp_path)
    assert run(tmp_path)[1] == 0
    KernelStore(tmp_path, ABOUT, overwrite=True)
    assert run(tmp_path)[1] == 5


def test_a_foreign_description_is_refused(tmp_path):
    run(tmp_path)
    path = KernelStore(tmp_path, ABOUT).folder / store.DESCRIPTION
    description = json.loads(path.read_text())
    description["about"]["model"] = "other"
    path.write_text(json.dumps(description))
    with pytest.raises(
        InputError, match=r"belongs to something else .model: 'other', not 'a'.; pass overwrite_kernels"
    ):
        KernelStore(tmp_path, ABOUT)
    path.write_text("{")
    with pytest.raises(InputError, match="is not a description of a kernel"):
        KernelStore(tmp_path, ABOUT)


def test_damaged_blocks_are_refused(tmp_path):
    run(tmp_path)
    folder = KernelStore(tmp_path, ABOUT).folder
    path = folder / "block-00000-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"block-00000-00001.safetensors cannot be read .* delete the file"):
        run(tmp_path)
    kernel = load_file(folder / "block-00000-00000.safetensors")["kernel"]
    save_file({"kernel": kernel[..., :1, :]}, path, {"key": folder.name})
    with pytest.raises(
        InputError, match=r"belongs to another kernel: it holds \(1, 5, 2, 1, 2\), expected \[kernels, 5, c"
    ):
        run(tmp_path)
    save_file({"kernel": kernel}, path, {"key": "other"})
    with pytest.raises(InputError, match="belongs to another kernel"):
        run(tmp_path)
    path.write_bytes(content)
    assert run(tmp_path)[1] == 0


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .* pass kernel_dir"):
        run(tmp_path / "file")


# --- the authors' files --------------------------------------------------------------------------------


def test_authors_files_are_read_back(tmp_path):
    kernel, labels = torch.rand(1, 4, 1, 3, 1, dtype=torch.float64), torch.tensor([0, 1, 1])
    path = store.write_kernel(tmp_path, "dev", "sst-2", kernel, labels)
    assert path.name == "dev_kernels_sst-2.pt"
    raw, targets = torch.load(path, weights_only=True)
    assert raw.shape == (4, 1, 3, 1) and targets.tolist() == [-1, 1, 1]
    found, classes = store.read_kernel(tmp_path, "dev", "sst-2")
    assert torch.equal(found, kernel) and torch.equal(classes, labels)
    both = torch.rand(2, 4, 3, 2, 3, dtype=torch.float64)
    store.write_kernel(tmp_path, "test", "trec", both, torch.tensor([5, 2]))
    found, classes = store.read_kernel(tmp_path, "test", "trec")
    assert torch.equal(found, both) and classes.tolist() == [5, 2]
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    store.write_kernel(tmp_path, "test", "several", both, several)
    assert torch.equal(store.read_kernel(tmp_path, "test", "several")[1], several.long())
    torch.save((torch.ones(3), torch.tensor([-1.0, 1, 1])), tmp_path / "dev_logits_sst-2.pt")
    assert store.read_logits(tmp_path, "dev", "sst-2").shape == (3, 1)


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.ones(3), "does not hold the two tensors"),
        ((torch.ones(4, 2, 3, 1), torch.ones(3)), r"a kernel must have shape .*, got \(1, 4, 2, 3, 1\)"),
        ((torch.ones(4, 1, 3, 1), torch.ones(2)), r"3 examples but labels of shape \(2,\); the file is damaged"),
        (b"", "cannot be read as tensors"),
        (None, "there is no file"),
    ],
)
def test_invalid_authors_files_are_refused(tmp_path, content, message):
    path = tmp_path / "dev_kernels_x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        store.read_kernel(tmp_path, "dev", "x")


def test_nothing_in_a_foreign_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    torch.save((Evil(), torch.ones(1)), tmp_path / "dev_kernels_x.pt")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        store.read_kernel(tmp_path, "dev", "x")
    assert not (tmp_path / "made").exists()
