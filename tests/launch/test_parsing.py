"""Recipes, the command line, and what the launcher fills in."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from run_records import run_record, write_run
from transformers import Trainer, TrainingArguments

from hf_ft_ext.arguments import DataArguments, MethodTrainingArguments, ModelArguments, RunArguments, own_fields
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.parsing import parse_arguments
from hf_ft_ext.methods import METHODS, list_methods, only_help_wanted
from hf_ft_ext.recipes.reading import read_recipe


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe(text: str, name: str = "recipe.yaml") -> str:
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def parse(*argv: str):
    return parse_arguments([*argv, "--use_cpu"])


def test_command_line_wins_over_the_recipe():
    path = recipe("method: lora\nlearning_rate: 1e-3\nlora_r: 4\ntask_name: sst2\n")
    run, _, data, training = parse(path, "--lora_r", "2")
    assert run.method == "lora"
    assert (training.learning_rate, training.lora_r, data.task_name) == (1e-3, 2, "sst2")
    assert run.given == {
        "method": "lora", "learning_rate": 1e-3, "lora_r": 2, "task_name": "sst2", "use_cpu": True,
    }  # fmt: skip


def test_none_on_the_command_line_takes_a_recipes_number_or_boolean_back():
    path = recipe("method: sparse\nsparse_density: 0.1\nmax_eval_samples: 5\nsparse_basis: none\n")
    run, _, data, training = parse(path, "--sparse_density", "none", "--sparse_n_params=40", "--max_eval_samples=none")
    assert (training.sparse_density, training.sparse_n_params, data.max_eval_samples) == (None, 40, None)
    assert training.sparse_basis == "none" and "sparse_density" not in run.given
    with pytest.raises(InputError, match="--seed: invalid int value: 'none'"):  # a seed has to be a number
        parse("--method", "full", "--seed", "none")


def test_method_from_the_command_line_and_dashes():
    path = recipe("method: lora\nseed: 3\nmax-seq-length: 20\n")
    run, _, data, training = parse(path, "--method=full", "--num-train-epochs", "2")
    assert (run.method, data.max_seq_length, training.num_train_epochs, training.seed) == ("full", 20, 2.0, 3)


EVALUATE = ("--model_name_or_path", "run", "--do_predict")


@pytest.mark.parametrize(
    ("argv", "method"),
    [
        (EVALUATE, "lora"),
        (("--model-name-or-path=run", "--do_eval", "true", "--lora_r", "2"), "lora"),
        (("recipe.yaml", "--do_train", "false"), "lora"),
        (("--model_name_or_path", "run/checkpoint-3", "--do_eval"), "lora"),
        (("--model_name_or_path", "run/other", "--do_eval"), "sparse"),
        (("recipe.yaml",), "sparse"),  # trains
        ((*EVALUATE, "--do_train"), "sparse"),
        (("--model_name_or_path", "run"), "sparse"),  # trains and evaluates
        ((*EVALUATE, "--method", "full"), "full"),
        (("--model_name_or_path", "elsewhere", "--do_predict"), "sparse"),
        (("--model_name_or_path", "unknown", "--do_predict"), "sparse"),
    ],
)
def test_what_only_evaluates_a_run_takes_its_method(argv, method, caplog):
    recipe("model_name_or_path: run\ndo_train: true\ndo_eval: true\n")
    write_run(Path("run"), run_record("lora", 1, 0.5))
    write_run(Path("unknown"), run_record("of-another-package", 1, 0.5))
    with caplog.at_level("INFO"):
        run, *_ = parse(*argv, "--task_name", "sst2")
    assert run.method == method
    logged = [line for line in caplog.messages if line.startswith("Using the method of the run in 'run")]
    assert len(logged) == (method == "lora") and all(line.endswith(": lora.") for line in logged)


def test_values_of_every_kind():
    path = recipe(
        """
        method: full
        learning_rate: "2e-5"     # text that is a number
        weight_decay: 1E-2
        num_train_epochs: 2
        max_steps: 1e2
        bf16: "false"
        eval_steps: null
        text_columns: [sentence]
        lr_scheduler_type: polynomial
        lr_scheduler_kwargs: {power: 1.0, lr_end: 1e-7}
        eval_strategy: "no"
        report_to: [none]
        save_steps: .5
        """
    )
    _, _, data, training = parse(path)
    assert (training.learning_rate, training.weight_decay, training.max_steps) == (2e-5, 1e-2, 100)
    assert isinstance(training.num_train_epochs, float) and training.num_train_epochs == 2.0
    assert training.lr_scheduler_kwargs == {"power": 1.0, "lr_end": 1e-7}
    assert (training.bf16, training.eval_steps, training.report_to) == (False, None, [])
    assert (data.text_columns, training.save_steps) == (["sentence"], 0.5)
    dictionary = json.dumps({"power": 2.0})
    _, _, _, training = parse("--lr_scheduler_kwargs", dictionary)
    assert training.lr_scheduler_kwargs == {"power": 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown recipe key 'learning_rat'; did you mean 'learning_rate'"),
        ("method: full\nlora_r: 4", "unknown recipe key 'lora_r': it belongs to method 'lora'"),
        ("zzzzzz: 4", "unknown recipe key 'zzzzzz'; `--help` lists"),
        ("eval_strategy: no", r'eval_strategy needs text, got the boolean false.*quote it, for example .*"no"'),
        ("task_name: 2", 'task_name needs text, got the number 2; quote it: task_name: "2"'),
        ("run_name: 2024-01-02", "needs text, got the date 2024-01-02; quote it"),
        ("method: yes", "method needs text, got the boolean true"),
        ("learning_rate: fast", "learning_rate needs a number, got the text 'fast'"),
        ("learning_rate: true", "learning_rate needs a number, got True"),
        ("seed: 1.5", "seed needs a whole number, got 1.5"),
        ("do_train: 1", "do_train needs true or false, got 1"),
        ("do_train: maybe", "do_train needs true or false, got the text 'maybe'"),
        ("task_name: [a, b]", r"task_name takes one value, got the list \['a', 'b'\]"),
        ("text_columns: []", "text_columns needs a non-empty list of values"),
        ("seed: {a: 1}", "seed takes no mapping"),
        ("lr_scheduler_type: linea", "lr_scheduler_type cannot be 'linea'; did you mean 'linear'"),
        ("- a\n- b", "contains a list; it needs lines of the form"),
        ("a: [1", "is not valid YAML"),
        ("seed: 1\nseed: 2", "key 'seed' appears twice"),
        ("1: 2", "key 1 is not text"),
        ("_a: &a {seed: 1}\n<<: *a\n<<: *a", r"key '<<' appears twice; merge several mappings with a list, <<: \["),
        ("_a: &a {seed: 1, seed: 2}\n<<: *a", "key 'seed' appears twice"),
        ("_a: &a [1]\n<<: *a", r"<< merges mappings, got '1'; give it \*anchor of a mapping"),
        ("_a: &a 7\n<<: *a", "<< merges mappings, got '7'"),
        ("_a: &a {}\n<<: [*a, [*a]]", "<< merges mappings, got a list"),
        ("<<: *a", r"\*a has no anchor &a above it"),
        ("_a: &a {<<: *a}", r"anchor &a contains itself"),
        ("_a: &a {b: [{c: *a}]}", r"anchor &a contains itself"),
        ("_a: &a {learning_rat: 1}\n<<: *a", "unknown recipe key 'learning_rat'; did you mean 'learning_rate'"),
        ("save-steps: 1\nsave_steps: 2", "sets 'save_steps' twice, spelt with '-' and with '_'"),
        ("method: spars", "unknown method 'spars'; did you mean 'sparse'.*full, lora, sparse"),
    ],
)
def test_recipe_errors(text, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        parse(recipe(text))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rte", "1"], "unknown argument '--learning_rte'; did you mean '--learning_rate'"),
        (["--method", "full", "--lora-r=4"], "unknown argument '--lora-r': it belongs to method 'lora'"),
        (["--method", "gld"], "unknown method 'gld'.*the methods are"),
        (["--method"], "--method: expected one argument; the methods are"),
        (["--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--do_train", "perhaps"], "--do_train: Truthy value expected"),
        (["--seed", "1", "recipe.yaml"], "unexpected word 'recipe.yaml': a recipe comes first"),
        (["none.yaml"], "recipe 'none.yaml' is not a file"),
        (["--learn", "1"], "unknown argument '--learn'"),  # no abbreviations
        (["--optim", "adamw_troch"], "optim cannot be 'adamw_troch'; did you mean 'adamw_torch'"),
        (["--load_best_model_at_end"], "(?i)requires the save and eval strategy to match"),
        (["--lr_scheduler_kwargs", "{a"], "property name"),
        (["--eval_strategy", "steps", "--logging_strategy", "no", "--logging_steps", "0"], "--eval_steps"),
        (["--do_train", "false"], "nothing to do"),
        (["--hp_search", "-1"], "hp_search must be 1 or more"),
        (["--hp_search", "1", "--do_eval"], "--hp_search trains; add --do_train"),
        (["--resume_from_checkpoint", "true", "--do_eval"], "is for training; add --do_train"),
        (["--resume_from_checkpoint", "true", "--overwrite_output_dir"], "pass one"),
        (["--resume_from_checkpoint", "true", "--hp_search", "2"], "cannot resume"),
        (["--resume_from_checkpoint", "true", "--output_dir", "o"], "'o' holds no checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere' is no checkpoint"),
        (["--method", "lora", "--lora_r", "0"], "lora_r must be 1 or more, got 0"),
    ],
)
def test_command_line_errors(argv, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        parse(*argv)


def test_recipe_files(tmp_path):
    assert read_recipe(recipe("")) == {}
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(InputError, match="not valid YAML"):
        read_recipe("bytes.yaml")


MERGED = """
_base: &base {method: full, learning_rate: 1e-3, num_train_epochs: 5}
.long: &long
  <<: *base
  num_train_epochs: 9
  lr_scheduler_kwargs: &kwargs {power: 2.0}
x-names: &columns [sentence]
<<: *long
learning_rate: 2e-3
text_columns: *columns
"""


def test_merge_keys_of_a_recipe():
    run, _, data, training = parse(recipe(MERGED))
    assert (run.method, training.num_train_epochs, training.learning_rate) == ("full", 9, 2e-3)  # own keys win
    assert training.lr_scheduler_kwargs == {"power": 2.0} and data.text_columns == ["sentence"]
    assert run.given.keys() == {
        "method", "num_train_epochs", "learning_rate", "lr_scheduler_kwargs", "text_columns", "use_cpu",
    }  # fmt: skip
    text = "_a: &a {method: full, seed: 1}\n_b: &b {seed: 2, data_seed: 3}\n<<: [*a, *b]\n"
    assert read_recipe(recipe(text)) == {"method": "full", "seed": 1, "data_seed": 3}  # the first one wins
    assert read_recipe(recipe("x: &x 1\ny: *x\nz: {<<: {a: 1}, b: 2}\n'<<': 3")) == {
        "x": 1, "y": 1, "z": {"a": 1, "b": 2}, "<<": 3,
    }  # fmt: skip


def test_defaults_are_announced_in_one_line(caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    run, _, data, training = parse()
    assert (run.method, data.task_name, training.do_train, training.do_eval) == ("sparse", "demo", True, True)
    assert [r.message for r in caplog.records if "Using defaults" in r.message] == [
        "Using defaults: the demo encoder, the demo task, train and evaluate."
    ]
    assert training.report_to == [] and training.output_dir == "runs/sparse-demo-seed42"


def test_given_options_are_kept():
    _, _, data, training = parse("--method", "full", "--do_eval", "--validation_file", "a/b.csv")
    assert (data.task_name, training.do_train, training.do_eval) == (None, False, True)
    assert training.output_dir == "runs/full-b.csv-seed42"


def test_output_folders_count_up_and_resume_finds_the_last(tmp_path):
    argv = ("--method", "full", "--task_name", "sst2", "--seed", "7")
    first, second = tmp_path / "runs/full-sst2-seed7", tmp_path / "runs/full-sst2-seed7-2"
    first.mkdir(parents=True)
    assert parse(*argv)[3].output_dir == "runs/full-sst2-seed7"  # empty folders are free
    (first / "run.json").write_text("{}")
    assert parse(*argv)[3].output_dir == "runs/full-sst2-seed7-2"
    checkpoint = second / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 5}')
    training = parse(*argv, "--resume_from_checkpoint", "true")[3]
    assert training.output_dir == "runs/full-sst2-seed7-2"
    assert training.resume_from_checkpoint.endswith("seed7-2/checkpoint-5")
    assert parse(*argv, "--resume_from_checkpoint", str(checkpoint))[3].output_dir == str(second)
    assert parse(*argv, "--overwrite_output_dir")[3].output_dir == "runs/full-sst2-seed7"


@pytest.mark.parametrize("leftover", ["run.json", "checkpoint-3/x", "model.safetensors", "adapter_model.bin"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, leftover):
    path = tmp_path / "out" / leftover
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(InputError, match=r"already holds a run; pass --resume_from_checkpoint true.*--overwrite"):
        parse("--output_dir", "out")
    assert parse("--output_dir", "out", "--overwrite_output_dir")[3].output_dir == "out"
    assert path.exists()  # parsing deletes nothing
    with pytest.raises(InputError, match=r"would delete '.*', the model to start from"):
        parse("--output_dir", "out", "--overwrite_output_dir", "--model_name_or_path", str(path.parent))


def test_a_model_in_the_home_folder_is_not_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"would delete '~/out', the model to start from"):
        parse("--output_dir", "~/out", "--overwrite_output_dir", "--model_name_or_path", "~/out")


def test_a_run_is_not_resumed_in_the_folder_of_another_one(tmp_path):
    for name in ("one", "two"):
        checkpoint = tmp_path / name / "checkpoint-5"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text('{"global_step": 5}')
    resume = ("--resume_from_checkpoint", "one/checkpoint-5", "--output_dir")
    with pytest.raises(InputError, match=r"output_dir 'two' already holds a run, and .*'one/checkpoint-5' belongs to"):
        parse(*resume, "two")
    for folder in ("one", "three"):
        assert parse(*resume, folder)[3].resume_from_checkpoint == "one/checkpoint-5"
    assert parse(*resume, "two", "--dry_run")[3].output_dir == "two"  # which writes nothing


def test_a_run_is_resumed_from_inside_its_checkpoint(tmp_path, monkeypatch):
    checkpoint = tmp_path / "one" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 5}')
    monkeypatch.chdir(checkpoint)
    assert parse("--resume_from_checkpoint", ".")[3].output_dir == str(tmp_path / "one")


def test_resume_true_in_a_recipe_is_the_last_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"out/checkpoint-{step}/trainer_state.json").write_text('{"global_step": 9}')
    training = parse(recipe("output_dir: out\nresume_from_checkpoint: true"))[3]
    assert training.resume_from_checkpoint.endswith("checkpoint-10")


def test_help_without_a_method_lists_them(capsys):
    assert only_help_wanted(["--help"]) and not only_help_wanted(["--method", "full", "-h"])
    assert not only_help_wanted(["recipe.yaml", "--help"])
    text = list_methods()
    assert all(f"  {name}" in text and method.help in text for name, method in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_help_of_a_method_is_grouped_with_defaults(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--method", name, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    headings = [f"method {name}:", "\nrun:", "\nmodel:", "\ndata:", "\ntraining (transformers.TrainingArguments):"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "--max-seq-length" not in text and "--no_" not in text
    assert "none = 128" in text and "(default: 42)" in text and "==SUPPRESS==" not in text


def shown_help(capsys, *argv: str) -> tuple[str, set[str]]:
    """The text of the help and the arguments that it lists."""
    with pytest.raises(SystemExit):
        parse_arguments([*argv])
    text = capsys.readouterr().out
    return text, set(re.findall(r"(?m)^  --(\w+) ", text))


@pytest.mark.parametrize("name", METHODS)
def test_help_lists_what_people_use_and_help_all_everything(name, capsys):
    arguments = METHODS[name].arguments_class()
    own = {f.name for dtype in (RunArguments, ModelArguments, DataArguments, arguments) for f in own_fields(dtype)}
    text, short = shown_help(capsys, "--method", name, "--help")
    _, everything = shown_help(capsys, "--method", name, "--help", "all")
    assert everything == own | {f.name for f in fields(TrainingArguments) if f.init}
    used = {"learning_rate", "num_train_epochs", "eval_strategy", "bf16", "seed", "output_dir", "report_to"}
    assert own | used <= short and len(short - own) < 32
    note = f"{len(everything - short)} more arguments of transformers.TrainingArguments work as well; `--method {name}"
    assert note in " ".join(text.split()) and f"{name} --help all` lists them." in " ".join(text.split())


def test_help_shows_choices(capsys):
    text, _ = shown_help(capsys, "--method", "sparse", "-h")
    for shown in (
        "--sparse_support {dynamic,static,structured}", "--few_shot_type {finetune,prompt,prompt-demo}",
        "--save_strategy {no,steps,epoch,best}", "inverse_sqrt, reduce_lr_on_plateau",
    ):  # fmt: skip
        assert shown in text
    advanced = text.index("method sparse, advanced")
    assert text.index("--sparse_support") < advanced < text.index("--sparse_moments") < text.index("--dry_run")
    assert "{1,2}" in shown_help(capsys, "--help", "--method", "fisher")[0]
    path = recipe("method: kernel\n")
    assert shown_help(capsys, path, "--help=all")[1] > shown_help(capsys, path, "--help")[1]


def test_methods_table():
    for method in METHODS.values():
        assert issubclass(method.arguments_class(), MethodTrainingArguments)
        assert issubclass(method.trainer_class(), Trainer)


def test_errors_do_not_show_access_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("hub_token: [s3cret]\n", "token: {a: s3cret}\n", "token: 5350\n"):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(InputError, match="token must be text; put it in quotes") as caught:
            parse_arguments(["recipe.yaml"])
        assert "s3cret" not in str(caught.value) and "5350" not in str(caught.value)
    with pytest.raises(InputError, match=r"unexpected word '\*\*\*'"):
        parse_arguments(["--seed", "1", "hf_abcdefghijklmnopqrst"])
    assert "s3cret" not in repr(parse_arguments(["--token", "s3cret"])[1])
