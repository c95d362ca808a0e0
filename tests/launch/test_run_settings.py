"""Settings that change nothing, or rounding alone, through the launcher: streams, batches, formats, processes."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from launched import KEEPS_WEIGHTS, ROOT, python, same, weights
from processes import Fork, as_rank, free_port, rank_environment, two_ranks, wait_for
from quick import ITERATIVE_METHODS, OF_OTHER_PACKAGES, QUICK, SOLVER_METHODS
from tiny import tiny_model

import run_glue
from hf_ft_ext.methods import METHODS

# For comparisons to rounding: a plain optimizer, or AdamW with a large epsilon (with a small one it turns gradients
# that are rounding noise into steps of full size). SparseGrad trains all entries here: where two entries are equally
# large, rounding decides which of them is among the k largest.
SGD = ("--optim", "sgd", "--learning_rate", "0.1", "--logging_steps", "1")
OPTIMIZER = {
    "sparse": (
        "--sparse_support", "dynamic", "--learning_rate", "1e-2", "--adam_epsilon", "1e-2", "--sparse_density", "1.0",
        "--logging_steps", "1",
    ),
    "gradientless": ("--learning_rate", "0.1", "--logging_steps", "1"),
}  # fmt: skip
TWO_STEPS = ("--max_steps", "2", *SGD)
IN_TWO_STEPS = {
    **{name: ("--max_steps", "2", *options) for name, options in OPTIMIZER.items()},
    "kernel": (),
    "linearhead": ("--linearhead_c", "1e-3"),  # a weak penalty enlarges rounding of features that hardly differ
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_dropout(tmp_path, tokenizer) -> str:
    """A model whose gradient on a batch is the mean of those on its parts."""
    folder = tmp_path / "no-dropout"
    tiny_model(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer) -> str:
    """One layer without dropout: where the number of layers does not matter."""
    folder = tmp_path_factory.mktemp("small")
    tiny_model(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory) -> Path:
    """A folder for one plain run of each method on `small`, to compare others with."""
    return tmp_path_factory.mktemp("plain")


@pytest.fixture
def plain(launch, small, plain_runs):
    """`plain(method) -> output folder, options` of a plain run of two steps, made once."""

    def run(method: str) -> tuple[Path, tuple[str, ...]]:
        options = ("--model_name_or_path", small, "--do_train", "--do_eval", *IN_TWO_STEPS.get(method, TWO_STEPS))
        folder = plain_runs / method
        if not (folder / "run.json").exists():
            assert launch(*options, "--output_dir", str(folder), method=method) == 0
        return folder, options

    return run


def same_to_rounding(a, b, start) -> bool:
    """Whether two runs logged the same loss and ended with the same weights, away from those in `start`."""
    metrics = [json.loads(Path(name, "run.json").read_text())["metrics"] for name in (a, b)]
    # train_loss is averaged over processes by log steps; eval_loss counts padding rows and differs anyway
    losses = [values["train_loss"] for values in metrics]
    ours, theirs, first = weights(a), weights(b), weights(start)
    moved = any(not torch.allclose(ours[name], first[name], atol=1e-3) for name in ours if name in first)
    close = all(torch.allclose(ours[name], theirs[name], atol=2e-6) for name in ours)
    return close and losses[0] == pytest.approx(losses[1], rel=1e-4) and (moved or not ours.keys() & first.keys())


@pytest.mark.parametrize("method", ["full", "fisher", "gradientless"])
def test_a_stream_gives_what_loaded_rows_give(launch, no_dropout, method):
    options = ("--model_name_or_path", no_dropout, "--do_train", "--max_steps", "5", *OPTIMIZER.get(method, SGD))
    options += ("--train_sampling_strategy", "sequential", "--per_device_train_batch_size", "8")
    if method == "fisher":  # a pre-pass draws from loaded rows and takes a stream's first ones
        options += ("--fisher_examples", "32")
    assert launch(*options, "--output_dir", "one", method=method) == 0  # the fifth step begins the rows anew
    assert launch(*options, "--streaming", "--output_dir", "two", method=method) == 0
    assert same_to_rounding("one", "two", no_dropout)


def test_a_shuffled_stream_goes_on_where_it_stopped(launch):
    in_order = ("--do_train", "--streaming", "--max_steps", "6", "--save_steps", "3")
    options = (*in_order, "--stream_buffer", "5")
    assert launch(*options, "--output_dir", "a") == 0
    assert launch(*in_order, "--train_sampling_strategy", "sequential", "--output_dir", "c") == 0
    assert not same("a", "c")
    assert launch(*options, "--resume_from_checkpoint", "a/checkpoint-3", "--output_dir", "b") == 0
    assert same("a", "b")


@pytest.mark.parametrize("method", ITERATIVE_METHODS)
def test_accumulation_equals_the_large_batch(launch, no_dropout, method):
    options = ("--model_name_or_path", no_dropout, "--do_train", "--max_steps", "3", *OPTIMIZER.get(method, SGD))
    assert launch(*options, "--per_device_train_batch_size", "8", "--output_dir", "one", method=method) == 0
    small = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--output_dir", "two")
    assert launch(*options, *small, method=method) == 0
    assert same_to_rounding("one", "two", no_dropout)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_works_or_is_refused(launch, plain, method, capsys):
    folder, options = plain(method)
    if method == "kernel":  # its precision is that of the weights
        assert launch(*options, "--bf16", "--output_dir", "half", method=method) == 2
        assert "bf16=True steers a training loop, and method kernel has none" in capsys.readouterr().err
        return
    assert launch(*options, "--bf16", "--output_dir", "half", method=method) == 0
    wide, half = (json.loads(Path(name, "run.json").read_text())["metrics"] for name in (folder, "half"))
    assert half["eval_loss"] != wide["eval_loss"] and half["eval_loss"] == pytest.approx(wide["eval_loss"], abs=0.02)
    assert {tensor.dtype for tensor in weights("half").values()} == {torch.float32}


@pytest.mark.parametrize("method", ["full", "lora", "sparse", "fisher"])
def test_activation_checkpointing_changes_nothing(launch, plain, small, method):
    folder, options = plain(method)
    assert launch(*options, "--activation_checkpointing", "--output_dir", "two", method=method) == 0
    assert same_to_rounding(folder, "two", small)


COMPILED = ("--torch_compile", "--torch_compile_backend", "eager")  # the graphs, without the minutes that code takes
NOT_COMPILED = {
    "gradientless": "torch_compile does not support weights that change between evaluations",
    "kernel": "torch_compile=True steers a training loop, and method kernel has none",
}


@pytest.mark.parametrize("method", NOT_COMPILED)
def test_torch_compile_is_refused(launch, method, capsys):
    assert launch("--do_train", "--output_dir", "out", *COMPILED, method=method) == 2
    assert NOT_COMPILED[method] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name not in NOT_COMPILED])
def test_torch_compile_changes_nothing(launch, plain, method):
    folder, options = plain(method)
    torch._dynamo.reset()  # other runs of this process count towards its limit of recompilations
    torch._dynamo.utils.counters.clear()
    assert launch(*options, *COMPILED, "--output_dir", "compiled", method=method) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    ours, theirs = weights("compiled"), weights(folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-6) for name in ours)
    losses = [json.loads(Path(name, "run.json").read_text())["metrics"]["eval_loss"] for name in (folder, "compiled")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def show_bars() -> None:
    """Earlier runs in this process have silenced them."""
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


# What each method computes on two processes: tests/scale/test_processes.py. Here: the launcher around a loop,
# a stream that is shared out, predictions of all rows at once, and methods that other packages add.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "kernel", *OF_OTHER_PACKAGES])
def test_two_processes_give_what_one_gives(launch, files, method, no_dropout, tmp_path):
    options = ["--model_name_or_path", no_dropout, "--do_train", "--do_eval", "--do_predict"]
    sizes = [()] * 2
    if method not in SOLVER_METHODS:
        options += ["--max_steps", "3", *OPTIMIZER.get(method, SGD)]
        options += ["--streaming"] if method == "lora" else []  # each process reads its part of a stream
        sizes = [("--per_device_train_batch_size", size) for size in ("8", "4")]
    assert launch(*options, *sizes[0], "--output_dir", "one", method=method) == 0

    argv = ["--method", method, *files, "--max_seq_length", "16", *QUICK.get(method, ()), *options, *sizes[1]]
    argv += ["--use_cpu", "--output_dir", "two", *(() if method == "full" else ("--disable_tqdm", "true"))]
    if method == "full":  # the second process by itself: torch reads what silences it at its start from nothing
        port = free_port()
        first = Fork(run_glue.main, argv, tmp_path, as_rank(0, 2, port, show_bars))
        second = python(str(ROOT / "run_glue.py"), *argv, **rank_environment(1, 2, port))
        wait_for([first], 60)
        ended = first.ended()
        assert (ended.status, second.returncode) == (0, 0), ended.err[-3000:] + second.stderr[-3000:]
        out, err = ended.out + second.stdout, ended.err + second.stderr
    else:
        both = two_ranks(run_glue.main, *argv)
        out, err = "".join(ended.out for ended in both), "".join(ended.err for ended in both)
    if method == "full":  # bars of the first process, and its warnings
        assert [err.count(f"{bar}: 100%") for bar in ("Loading weights", "Tokenizing train")] == [1, 1]
        assert err.count("find_unused_parameters=True was specified") <= 1
    else:
        assert "%|" not in err
    assert out.count("load it:") == 1
    assert same("one", "two") if method in KEEPS_WEIGHTS else same_to_rounding("one", "two", no_dropout)
    one, two = (json.loads(Path(name, "run.json").read_text()) for name in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["metrics"]["eval_accuracy"] == two["metrics"]["eval_accuracy"]
    assert Path("one/predictions.tsv").read_text() == Path("two/predictions.tsv").read_text()
