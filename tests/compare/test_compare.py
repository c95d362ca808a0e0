"""Comparisons: what they run, that they survive, continue and keep to their time."""

import json
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Fork, wait_for
from run_records import run_record
from tiny import write_texts

from hf_ft_ext.compare import process
from hf_ft_ext.compare.__main__ import main
from hf_ft_ext.compare.settings import read_comparison
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.parsing import parse_arguments
from hf_ft_ext.methods import METHODS
from hf_ft_ext.report import charts

ROOT = Path(__file__).resolve().parents[2]
# Before the fixture puts stand-ins in their place.
REAL = {"hf_ft_ext.compare.process.COMMAND": process.COMMAND, "hf_ft_ext.report.charts.draw": charts.draw}
RECORD = run_record("X", 0, 0.5)
# Stands in for run_glue.py: quick, and told by the learning rate what becomes of it.
LAUNCHER = f"""
import json, os, sys, time
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1] if name in words else None
rate, folder, seed = value("--learning_rate"), value("--output_dir"), int(value("--seed"))
print("some output")
print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"))
if rate == "1":
    sys.exit("error: learning_rate=1 cannot work")
if rate == "2":
    raise RuntimeError("deep inside")
if rate == "3":
    os.kill(os.getpid(), 9)
if rate == "4" and seed > 42 or rate == "5":
    time.sleep(60)
if rate == "6":
    time.sleep(1)
record = {RECORD!r}
record.update(method=value("--method"), seed=seed, command=["run_glue.py", *words], task="demo")
record["data"] = {{"files": {{"train_file": value("--train_file")}} if value("--train_file") else None}}
record["metrics"]["eval_accuracy"] = 0.5 + seed / 1000
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, "token"), "w") as file:
    file.write(str(len(os.environ.get("HF_TOKEN", ""))))
with open(os.path.join(folder, "..", "words"), "w") as file:
    file.write(" ".join(words))
with open(os.path.join(folder, "count"), "a") as file:
    file.write("x")
with open(os.path.join(folder, "run.json"), "w") as file:
    json.dump(record, file)
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake = tmp_path / "launcher.py"
    fake.write_text(LAUNCHER)
    monkeypatch.setattr("hf_ft_ext.compare.process.COMMAND", (sys.executable, str(fake)))
    monkeypatch.setattr("hf_ft_ext.report.charts.draw", lambda *_: None)  # a second each; tests/report looks at them


def recipe(text: str) -> str:
    Path("recipe.yaml").write_text(text)
    return "recipe.yaml"


def states(folder: str = "runs/compare-demo") -> dict[tuple[str, int], str]:
    entries = json.loads(Path(folder, "comparison.json").read_text())["runs"]
    return {(entry["variant"], entry["seed"]): entry["state"] for entry in entries}


def launches(name: str, folder: str = "runs/compare-demo") -> int:
    return len(Path(folder, "runs", name, "count").read_text())


def test_a_run_sees_one_gpu(monkeypatch):
    """This process counts as many GPUs as it may see, of four, as torch does."""

    def device_count() -> int:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        return len(seen.split(",")) if seen else 0

    monkeypatch.setattr(torch.cuda, "device_count", device_count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert main(["--methods", "full"]) == 0
    assert "sees 2\n" in Path("runs/compare-demo/runs/full-seed42.log").read_text()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


# --- what is run ------------------------------------------------------------------------------------


def test_every_method_with_the_demo_defaults():
    comparison = read_comparison(["--seeds", "2"])
    assert [variant.name for variant in comparison.variants] == list(METHODS)
    assert comparison.seeds == [42, 43] and comparison.output_dir == Path("runs/compare-demo")
    for variant in comparison.variants:
        words = comparison.words(variant, 43)
        run_args, _, data_args, args = parse_arguments(words)
        assert (run_args.method, args.seed) == (variant.name, 43)
        assert data_args.max_seq_length == 64 and args.output_dir == f"runs/compare-demo/runs/{variant.name}-seed43"
        assert args.do_train and args.do_eval
    by_name = {variant.name: variant for variant in comparison.variants}
    assert by_name["full"].words["learning_rate"] == ["--learning_rate", "0.0003"]


def test_the_command_line_wins_over_the_recipe_over_the_defaults():
    path = recipe(
        "methods: [full, wide]\nseeds: [3, 5]\nnum_train_epochs: 4\nwarmup_steps: 7\nlr_scheduler_kwargs: {a: 1}\n"
        "variants:\n  wide: {method: lora, lora-r: 32, learning_rate: 1.0e-3}\n  unused: {method: sparse}\n"
    )
    comparison = read_comparison([path, "--num_train_epochs", "5", "--lora_alpha=64", "--text-columns", "a", "b"])
    full, wide = comparison.variants
    assert comparison.seeds == [3, 5] and (full.method, wide.method) == ("full", "lora")
    assert full.words["num_train_epochs"] == wide.words["num_train_epochs"] == ["--num_train_epochs", "5"]
    assert full.words["warmup_steps"] == ["--warmup_steps", "7"]
    assert full.words["lr_scheduler_kwargs"] == ["--lr_scheduler_kwargs", '{"a": 1}']
    assert wide.words["text_columns"] == ["--text-columns", "a", "b"]
    assert "lora_alpha" not in full.words and wide.words["lora_alpha"] == ["--lora_alpha=64"]
    assert (wide.words["lora_r"], wide.words["learning_rate"]) == (["--lora_r", "32"], ["--learning_rate", "0.001"])
    assert full.words["learning_rate"] == ["--learning_rate", "0.0003"]


def test_another_model_has_the_methods_own_defaults(tiny_bert_dir):
    comparison = read_comparison(["--methods", "full,lora", "--model_name_or_path", tiny_bert_dir])
    for variant in comparison.variants:
        assert variant.words.keys() == {"model_name_or_path", "save_strategy", "disable_tqdm", "logging_steps"}


def test_unsupported_arguments_are_left_out_and_reported():
    comparison = read_comparison(["--methods", "full,gradientless", "--optim", "adafactor"])
    full, search = comparison.variants
    assert full.words["optim"] == ["--optim", "adafactor"] and not full.left_out
    assert "optim" not in search.words and search.left_out.keys() == {"optim"}
    assert "needs gradients" in search.left_out["optim"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "fulll"], "unknown method 'fulll'; did you mean 'full'.*choose from: full, lora"),
        (["--methods", ","], "is empty; choose from"),
        (["--methods", "full,full"], "contains 'full' twice"),
        (["--seeds", "0"], "seeds must be a number of seeds .*, got '0'"),
        (["--seeds", "1,1"], "list of different seeds"),
        (["--seeds", "x"], "got 'x'"),
        (["--max_minutes", "-1"], "max_minutes must be above 0 .*, got '-1'"),
        (["--max_minutes", "nan"], "max_minutes must be above 0"),
        (["--task_name", "sst"], "unknown task 'sst'; did you mean sst5 or sst2"),
        (["--methods", "full", "--lora_r", "4"], "lora_r belongs to method 'lora', which is not in this comparison"),
        (["--learning_rat", "4"], "unknown argument 'learning_rat'; did you mean 'learning_rate'"),
        (["--method", "full"], "method is set by the comparison.*--methods"),
        (["--seed", "1"], "seed is set by the comparison.*pass --seeds"),
        (["--push_to_hub"], "push_to_hub is set by the comparison"),
        (["--methods", "lora", "--lora_r", "0"], "lora: lora_r must be 1 or more"),
        (["--learning_rate", "fast"], "full: .*learning_rate.*fast"),
        (["stray.yaml"], "is not a file"),
        (
            ["--report_to", "none", "--methods", "full", "lora"],
            "--methods takes one value: names separated by commas, got",
        ),
        (["--text_columns", "a", "--seeds", "1", "2"], "--seeds takes one value: .*, got: 1 2"),
        (["--max-minutes"], "--max_minutes takes one value, got: none"),
        (["--dry_run", "false"], "--dry_run takes no value, got: false"),
        (["--variants", "a"], "--variants is a mapping; set it in a recipe"),
    ],
)
def test_bad_input_ends_before_the_first_run(argv, message, capsys):
    assert main(argv) == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err, flags=re.DOTALL)
    assert not os.path.exists("runs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: [full]", "must be a mapping"),
        ("variants: {a: {method: fulll}}", "unknown method 'fulll'; did you mean 'full'"),
        ("variants: {a: {lora_r: 4}}", "unknown method 'a'"),
        ("variants: {a/b: {method: full}}", "'a/b' is used as a folder name"),
        ("variants: {a: {method: full, seed: 3}}", "seed is set by the comparison"),
        ("variants: {a: {method: full, output_dir: b}}", "output_dir is set by the comparison.*as a whole"),
        ("variants: {a: {method: full, dry_run: true}}", "dry_run is set by the comparison"),
        ("variants: {a: {method: full, lora_r: 3}}", "a: unknown argument '--lora_r'.*belongs to method 'lora'"),
        ("variants: {a: {method: gradientless, optim: sgd}}", "a: optim='sgd' needs gradients"),
    ],
)
def test_bad_recipes(text, message):
    with pytest.raises(InputError, match=message):
        read_comparison([recipe(text)])


def test_dry_run_prints_the_commands(capsys):
    assert main(["--methods", "full,lora", "--seeds", "2", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("python run_glue.py --method ") for line in lines)
    assert not os.path.exists("runs")


# --- what becomes of the runs -----------------------------------------------------------------------

VARIANTS = """
max_seq_length: 32
variants:
  good: {method: full}
  refused: {method: full, learning_rate: 1}
  broken: {method: lora, learning_rate: 2}
  killed: {method: lora, learning_rate: 3}
"""


@pytest.mark.parametrize("words", [["--token", "hf_s3cret"], ["--token=hf_s3cret"], []])
def test_an_access_token_is_neither_printed_nor_kept_and_reaches_the_runs(words, capfd):
    path = recipe("methods: [full]\nmax_seq_length: 32\n" + ("" if words else "token: hf_s3cret\n"))
    assert main([path, *words, "--dry_run"]) == 0
    printed = capfd.readouterr()
    assert "--token" in printed.out and "s3cret" not in printed.out + printed.err
    assert main([path, *words]) == 0
    for file in Path("runs").rglob("*"):
        assert not file.is_file() or b"s3cret" not in file.read_bytes(), file
    assert "s3cret" not in "".join(capfd.readouterr())
    folder = Path("runs/compare-demo/runs/full-seed42")
    assert (folder / "token").read_text() == "9", "the launcher has the token in its environment"
    assert "s3cret" not in (folder.with_name("words")).read_text(), "others see the words of a process"
    assert main([path, *words]) == 0 and launches("full-seed42") == 1, "a finished run is found again"
    assert main([path, "--token", "hf_another"]) == 0 and launches("full-seed42") == 1


def test_failed_runs_are_reported_and_repeated(capsys):
    path = recipe(VARIANTS)
    assert main([path]) == 1
    assert states() == {("good", 42): "done", **{(n, 42): "failed" for n in ("refused", "broken", "killed")}}
    page = Path("runs/compare-demo/report.html").read_text()
    for words in ("learning_rate=1 cannot work", "RuntimeError: deep inside", "ended by SIGKILL (out of memory?)"):
        assert words in page, words
    assert "some output" in Path("runs/compare-demo/runs/broken-seed42.log").read_text()
    assert "good" in capsys.readouterr().out
    Path(path).write_text(VARIANTS.replace("learning_rate: 1}", "learning_rate: 0.1}"))
    assert main([path, "--methods", "good,refused"]) == 0  # the settings are right now
    assert states() == {("good", 42): "done", ("refused", 42): "done"}
    assert launches("good-seed42") == 1


def test_a_comparison_of_failed_runs_only(capsys):
    assert main(["--methods", "full,lora", "--learning_rate", "1"]) == 1
    page = Path("runs/compare-demo/report.html").read_text()
    assert "no finished run" in page and page.count("learning_rate=1 cannot work") == 2
    assert "full, seed 42: failed" in capsys.readouterr().out


def test_an_interruption_keeps_what_was_finished_before(monkeypatch):
    assert main(["--methods", "lora"]) == 0

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_ft_ext.compare.runs.run_or_find", interrupted)
    assert main(["--methods", "full,lora,sparse"]) == 130
    assert states() == {("full", 42): "stopped", ("lora", 42): "done", ("sparse", 42): "not started"}


def test_only_what_is_missing_or_changed_is_run():
    assert main(["--methods", "full", "--seeds", "1"]) == 0
    assert main(["--methods", "full,lora", "--seeds", "2"]) == 0
    assert [launches(f"{name}-seed{seed}") for seed in (42, 43) for name in ("full", "lora")] == [1, 1, 1, 1]
    Path("runs/compare-demo/runs/lora-seed42/run.json").write_text("{")  # damaged: run again
    assert main(["--methods", "full,lora", "--seeds", "2", "--lora_r", "4"]) == 0
    assert [launches(f"{name}-seed{seed}") for seed in (42, 43) for name in ("full", "lora")] == [1, 2, 1, 2]


def test_runs_on_a_changed_data_file_are_repeated():
    write_texts("train.csv", 8)
    argv = ["--methods", "full", "--train_file", "train.csv", "--validation_file", "train.csv", "--output_dir", "out"]
    assert main(argv) == main(argv) == 0
    assert launches("full-seed42", "out") == 1
    os.utime("train.csv", (time.time() + 1, time.time() + 1))
    assert main(argv) == 0 and launches("full-seed42", "out") == 2


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("recipe.yaml --seed 1 --lora_r 8 --bf16 --tags a b", True),
        ("recipe.yaml --bf16 --tags a b --lora_r=8 --seed 1", True),
        ("recipe.yaml --seed 1 --lora_r 4 --lora_r 8 --bf16 --tags a b --token secret", True),
        ("other.yaml --seed 1 --lora_r 8 --bf16 --tags a b", False),
        ("recipe.yaml --seed 1 --lora_r 8 --tags a b", False),
        ("recipe.yaml --seed 1 --lora_r 8 --bf16 --tags b a", False),
        ("recipe.yaml --seed 1 --lora_r 8 --lora_r 4 --bf16 --tags a b", False),
    ],
)
def test_a_run_with_the_same_options_in_another_order_is_that_run(tmp_path, words, same):
    command = "hf-ft-ext train recipe.yaml --seed 1 --lora_r 8 --bf16 --tags a b".split()
    (tmp_path / "run.json").write_text(json.dumps({"command": command}))
    assert (process.find_run(tmp_path, words.split()) is not None) == same


def test_all_variants_run_one_seed_before_the_next():
    assert main(["--methods", "full,lora", "--seeds", "2"]) == 0
    folder = Path("runs/compare-demo/runs")
    order = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.stem for path in order] == ["full-seed42", "lora-seed42", "full-seed43", "lora-seed43"]


def test_the_time_limit(monkeypatch):
    monkeypatch.setattr("hf_ft_ext.compare.runs._REPORT_SECONDS", 0)
    monkeypatch.setattr("hf_ft_ext.compare.process._GRACE", 1)
    path = recipe("variants:\n  stuck: {method: full, learning_rate: 4}\n  slow: {method: full, learning_rate: 6}\n")
    start = time.monotonic()
    assert main([path, "--seeds", "2", "--max_minutes", "0.05"]) == 0
    assert time.monotonic() - start < 20
    assert states() == {
        ("stuck", 42): "done", ("slow", 42): "done", ("stuck", 43): "stopped", ("slow", 43): "not started",
    }  # fmt: skip
    page = Path("runs/compare-demo/report.html").read_text()
    assert "at the end of --max_minutes" in page
    assert "s of --max_minutes were left; this method took 1 s before" in page


def test_a_stopped_comparison_ends_its_run_and_writes_its_report():
    path = recipe("variants:\n  good: {method: full}\n  stuck: {method: full, learning_rate: 5}\n")
    comparison = Fork(main, [path], Path.cwd())
    log = Path("runs/compare-demo/runs/stuck-seed42.log")
    for _ in range(600):
        if log.exists() and "some output" in log.read_text():
            break
        time.sleep(0.1)
    children = Path(f"/proc/{comparison.pid}/task/{comparison.pid}/children").read_text().split()
    os.kill(comparison.pid, signal.SIGTERM)
    wait_for([comparison], 60)
    ended = comparison.ended()
    assert ended.status == 130, ended.err
    assert "interrupted" in ended.err and ended.clean
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)
    assert states() == {("good", 42): "done", ("stuck", 42): "stopped"}
    assert "good" in ended.out and Path("runs/compare-demo/report.html").exists()


def test_missing_matplotlib_is_refused_before_the_runs(monkeypatch, capsys):
    monkeypatch.setattr("hf_ft_ext.compare.__main__.importlib.util.find_spec", lambda name: None)
    assert main(["--methods", "full"]) == 2
    assert 'pip install "hf_ft_ext[pictures]"' in capsys.readouterr().err and not os.path.exists("runs")


class Forked:
    """What `subprocess.Popen` starts, as a fork of this process, which has paid for the imports."""

    def __init__(self, words, env, **_):
        python, option, module, *rest = words
        assert (python, option) == (sys.executable, "-m")

        def run(argv: list[str]) -> None:
            os.environ.update(env)
            sys.argv = [module, *argv]
            runpy.run_module(module, run_name="__main__")

        self.fork, self.returncode = Fork(run, rest, Path.cwd()), None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, seconds: float | None) -> None:
        wait_for([self.fork], 90)
        ended = self.fork.ended()
        assert ended.status == 0, ended.err
        self.returncode = ended.status


def test_a_real_run(monkeypatch, tiny_bert_dir):
    """The launcher itself, and the report's picture of it."""
    for name, value in REAL.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setattr("hf_ft_ext.compare.process.subprocess.Popen", Forked)
    write_texts("train.csv", 24)
    write_texts("dev.csv", 12, seed=1)
    argv = [
        "--methods", "full", "--model_name_or_path", tiny_bert_dir, "--train_file", "train.csv", "--validation_file",
        "dev.csv", "--max_seq_length", "16", "--use_cpu", "--max_steps", "2", "--output_dir", "out",
    ]  # fmt: skip
    assert main(argv) == 0
    assert states("out") == {("full", 42): "done"}
    record = json.loads(Path("out/runs/full-seed42/run.json").read_text())
    page = Path("out/report.html").read_text()
    assert f"{record['metrics']['eval_accuracy']:.4f}" in page and "<svg" in page
