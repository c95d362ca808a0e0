"""The shell blocks of README and docs: every command is parsed as its program would; quick ones run.

A command that nothing here knows is an error, as are files of the repository that are not there.
"""

import argparse
import configparser
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from blocks import BLOCKS, EXAMPLE, PAGES, ROOT, Block, blocks_of
from decoders import save_decoder
from offline import write_glue, write_model
from tensorboard.plugins.core.core_plugin import CorePluginLoader
from tensorboard.program import TensorBoard

import run_glue
from hf_ft_ext.arguments import SEQUENCE_CLASSIFICATION
from hf_ft_ext.compare.settings import read_comparison
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.parsing import parse_arguments
from hf_ft_ext.methods import METHODS
from hf_ft_ext.recipes.reading import read_rows

LANGUAGES = {"python", "bash", "text", "toml", "yaml"}
SUBCOMMANDS = {("hf", "auth", "login"), (".ci/run",)}  # nothing to parse
OWN_FOLDERS = ("recipes/", "benchmarks/", "docs/", "tests/", "constraints.txt", "run_glue.py")


@dataclass(frozen=True)
class Command:
    """One command of a block, comments and line breaks taken out."""

    block: Block
    text: str

    @property
    def words(self) -> list[str]:
        return _words(self.text)


def _words(line: str) -> list[str]:
    """The words of a command; a comment starts at a `#` that stands before a word, as in bash."""
    return shlex.split(re.sub(r"(^|\s)#.*", "", line))


def commands_of(block: Block) -> list[Command]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [Command(block, line.strip()) for line in lines if _words(line)]


COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in commands_of(block)]


class _ParsedError(Exception):
    """What a program raises here in place of working."""


def at_home(words: list[str]) -> list[str]:
    """The words, paths of the repository made absolute; they have to be there."""
    found = []
    for word in words:
        if word.startswith(OWN_FOLDERS) and word not in example_files():
            assert (ROOT / word.partition("#")[0]).exists(), f"{word} is not there"
            word = str(ROOT / word)
        found.append(word)
    return found


def example_files() -> set[str]:
    return {block.file for block in blocks_of(EXAMPLE) if block.file}


def check_launcher(words: list[str]) -> None:
    """Arguments of `run_glue.py`; help is printed."""
    if "--help" in words:
        if "--method" not in words:
            assert run_glue.main(words) == 0
            return
        with pytest.raises(SystemExit, match=r"^0$"):
            run_glue.main(words)
        return
    run_args, *_ = parse_arguments(words)
    assert run_args.method in METHODS


def check_program(run, words: list[str], monkeypatch) -> None:
    """Run a program as far as its own parser, which sees all words."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, args=None, namespace=None):
        raise _ParsedError(parse(parser, args, namespace))

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patched.setattr(sys, "argv", words)
        with pytest.raises(_ParsedError):
            run()


def check_python(words: list[str], monkeypatch) -> None:
    program, *rest = words
    if program == "-m":
        module, *rest = rest
        if module == "hf_ft_ext.compare":
            assert read_comparison(at_home(rest)).variants
            return
        check_program(lambda: runpy.run_module(module, run_name="__main__"), [module, *rest], monkeypatch)
    elif program == "run_glue.py":
        check_launcher(at_home(rest))
    else:
        script = at_home([program])[0]
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        own, cut, others = _cut(at_home(rest))
        if script.endswith("tables.py"):
            assert not rest  # run by the tests of the tables
            return
        check_program(lambda: runpy.run_path(script, run_name="__main__"), [script, *own, *cut, *others], monkeypatch)
        if cut:  # what follows is the launcher's
            check_launcher(others)


def check_command(words: list[str], monkeypatch) -> None:
    """A command of the console script."""
    name, *rest = words
    if name == "train":
        check_launcher(at_home(rest))
    else:
        check_python(["-m", {"push": "hf_ft_ext.hub"}.get(name, f"hf_ft_ext.{name}"), *rest], monkeypatch)


def _cut(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at : at + 1], words[at + 1 :]


def check_pip(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in words:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            missing = set(extra.split(",")) - set(setup["options.extras_require"])
            assert not missing, f"no extra {missing}"
    at_home(words)


def check(command: Command, monkeypatch) -> None:
    """Raise unless the command's program would take its words."""
    words = command.words
    if tuple(words) in SUBCOMMANDS:
        assert words[0] == "hf" or (ROOT / words[0]).is_file()
    elif words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.training_script in ("run_glue.py",) or (ROOT / args.training_script).is_file()
        check_launcher(at_home(args.training_script_args))
    elif words[0] == "hf-ft-ext":
        check_command(words[1:], monkeypatch)
    elif words[0] == "python":
        check_python(words[1:], monkeypatch)
    elif words[0] == "make":
        if shutil.which("make") is None:
            pytest.skip("no make")
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    elif words[0] == "pytest":
        at_home(words[1:])
    elif words[0] == "tensorboard":
        TensorBoard([CorePluginLoader()]).configure(words)
    else:
        raise AssertionError(f"{command.block.name}: nothing here knows the command {words[0]!r}; add a check for it")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.block.name}-{command.text[:40]}")
def test_commands_are_taken_by_their_programs(command, tmp_path, monkeypatch, capsys, request):
    if command.block.page == EXAMPLE:
        request.getfixturevalue("entered")
    monkeypatch.chdir(tmp_path)
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "accelerate launch run_glue.py --method fulll",
        "accelerate launch --no_such_option run_glue.py --method full",
        "accelerate launch run_glue.py recipes/demo/no-such.yaml",
        "accelerate launch run_glue.py recipes/kernel/demo.yaml#no-such",
        "python run_glue.py --method sparse --sparse_densty 0.1",
        "python run_glue.py --method full --max_steps 10 --hp_search 2 --resume_from_checkpoint true",
        "hf-ft-ext compare --methods full,lorra",
        "hf-ft-ext report --titel x runs/a",
        "hf-ft-ext push",
        "python benchmarks/sparse.py --size roberta-huge",
        "python benchmarks/quality.py benchmarks/studies/no-such.yaml --output_dir runs/x",
        "python benchmarks/quality.py benchmarks/studies/sparse.yaml --output_dir x --task_name sst2 -- --no_such x",
        "pip install 'hf_ft_ext[demmo]'",
        "make no-such-target",
        "pytest tests/no_such_file.py",
        "no-such-program --help",
    ],
)
def test_commands_that_would_fail_are_found(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, InputError, SystemExit, pytest.fail.Exception)):
        check(Command(BLOCKS[0], text), monkeypatch)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [(r"--push_to_hub|hf auth|hf_ft_ext\.hub ", r"needs? the Hub"), (r"\bcuda\b", "needs? a GPU")],
)
def test_blocks_that_cannot_be_run_state_the_reason(pattern, reason):
    for block in BLOCKS:
        if block.language in ("bash", "python") and re.search(pattern, block.code):
            assert re.search(reason, block.code), f"{block.name} has to say that it {reason.replace('?', '')}"


def test_yaml_blocks_are_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = [block for block in BLOCKS if block.language == "yaml"]
    assert recipes
    for block in recipes:
        (tmp_path / "recipe.yaml").write_text(block.code)
        for row in read_rows("recipe.yaml") or [None]:
            parse_arguments(["recipe.yaml", "--use_cpu", *(["--recipe_row", row] if row else [])])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_code_stands_in_fenced_blocks_of_a_known_language(page):
    assert {block.language for block in blocks_of(page)} <= LANGUAGES
    text = page.read_text()
    assert text.count("\n```") + text.startswith("```") == 2 * len(blocks_of(page)), "a fence is not closed"
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"\n\n {4,}\S.*", outside), "indented code is not checked: put it between fences"


# --- dry runs -------------------------------------------------------------------------------------------

# The plan is for RoBERTa's twelve layers; that it loads and fits them: tests/fisher/test_fisher_recipes.py.
NOT_DRY = ("--adapter_plan", "--help", "--dry_run", "--push_to_hub")


def dry_run_words(words: list[str], model: str, glue: str, language: Path) -> list[str]:
    """The command with local stand-ins for what it would load, to be run dry."""
    run_args, model_args, data_args, _ = parse_arguments(words)
    if run_args.task_type != SEQUENCE_CLASSIFICATION:
        words = [*words, "--model_name_or_path", str(language / run_args.task_type)]
        if data_args.task_name is not None:
            words += ["--dataset_name", str(language / data_args.task_name)]
        return [*words, "--use_cpu", "--dry_run", "--disable_tqdm", "true", "--max_seq_length", "64"]
    if model_args.model_name_or_path is not None:
        words = [*words, "--model_name_or_path", model]
    if data_args.task_name not in (None, "demo"):
        words = [*words, "--dataset_name", glue]
    if "--fisher_mask" in words:  # the default share is less than the head of so small a model
        words = [*words, "--fisher_keep_ratio", "0.1"]
    if run_args.method == "fisher" and "single" not in words:
        words = [*words, "--fisher_examples", "6"]
    return [*words, "--use_cpu", "--dry_run", "--disable_tqdm", "true"]


def launched(command: Command) -> list[str] | None:
    """The words that the launcher gets, `None` for commands of other programs."""
    words = command.words
    if words[:2] == ["accelerate", "launch"]:
        return launch_command_parser().parse_args(words[2:]).training_script_args
    return words[2:] if words[:2] == ["hf-ft-ext", "train"] else None


def launches() -> list[Command]:
    """The launcher's commands that can run dry, each once."""
    found = {}
    for command in COMMANDS:
        if set(command.words) & set(NOT_DRY) or command.block.page == EXAMPLE:
            continue
        words = launched(command)
        if words is not None:
            found.setdefault(tuple(words), command)
    return list(found.values())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[str, str, Path]:
    model = write_model(tmp_path_factory.mktemp("model"), "roberta")
    return model, write_glue(tmp_path_factory.mktemp("glue")), write_language(tmp_path_factory.mktemp("language"))


def write_language(root: Path) -> Path:
    """Tiny language models by task type, and data folders by task."""
    save_decoder(root / "causal_lm", "llama")
    save_decoder(root / "seq2seq_lm", "t5")
    turn = {"message_id": "a", "parent_id": None, "role": "assistant", "text": "a great plot"}
    question = {"title": "A film", "context": "it was great", "question": "was it?", "answers": {"text": ["great"]}}
    for task, row in (("openassistant", turn), ("squad", question)):
        (root / task).mkdir()
        for split in ("train", "validation"):
            (root / task / f"{split}.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("command", launches(), ids=lambda command: f"{command.block.name}-{command.text[:60]}")
def test_launches_get_as_far_as_the_first_step(command, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_ft_ext.models.loading.demo_encoder", lambda: world[0])
    rows = ["subject,body,kind,toxic,insult,threat"]
    rows += [f"good film,the plot {i},{('ham', 'spam')[i % 2]},{i % 2},{i % 3 // 2},{i % 5 // 4}" for i in range(20)]
    lists = [json.dumps({"text": f"the plot {i}", "labels": ["a", "b", "c"][: i % 4]}) for i in range(20)]
    for name in ("train", "dev", "new"):  # files that some commands name
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lists))
    pair = json.dumps({"prompt": "the film was", "completion": " great"})
    for name in ("rows", "held-out"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([pair] * 8))
    (tmp_path / "scores.py").write_text("def cost(y_true, y_pred):\n    return float((y_true != y_pred).sum())\n")
    words = at_home(launched(command))
    assert run_glue.main(dry_run_words(words, *world)) == 0, capsys.readouterr().err
    assert "what trains" in capsys.readouterr().out
