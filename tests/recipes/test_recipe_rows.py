"""Recipes that are tables: rows, columns, names, and what is said where something is wrong."""

import json

import pytest
import yaml

import run_glue
from hf_ft_ext.__main__ import main as console
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.parsing import parse_arguments
from hf_ft_ext.recipes.reading import read_recipe, read_rows

GRID = """
method: full
task_name: demo
seed: 1
max_steps: 9
row_name: "{task}-{k}-{way}"
columns:
  task: task_name
  k: num_k
  way:
    small: {learning_rate: 1e-3, max-steps: ~}
    large: {learning_rate: 1e-2, seed: 2}
  every: [eval_steps, save_steps]
rows:
  - {task: [sst2, rte], k: [16, 64], way: small, every: 5}
  - [trec, 16, large, 7]
  - {way: large, task: cola, k: 8, allow_small_classes: true}
"""
NAMED = """
method: full
learning_rate: 1e-3
_common: &common {task_name: demo, seed: 3}
rows:
  one: {<<: *common}
  two: {<<: *common, learning-rate: 2e-3}
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "table.yaml") -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return write


def test_lists_of_rows_are_combined_and_named_by_their_cells(table):
    rows = read_rows(table(GRID))
    assert list(rows) == [
        "sst2-16-small", "sst2-64-small", "rte-16-small", "rte-64-small", "trec-16-large", "cola-8-large",
    ]  # fmt: skip
    assert rows["rte-64-small"] == {
        "method": "full", "task_name": "rte", "seed": 1, "num_k": 64, "learning_rate": 1e-3,
        "eval_steps": 5, "save_steps": 5,
    }  # fmt: skip
    assert rows["trec-16-large"] == {
        "method": "full", "task_name": "trec", "seed": 2, "max_steps": 9, "num_k": 16, "learning_rate": 1e-2,
        "eval_steps": 7, "save_steps": 7,
    }  # fmt: skip
    assert rows["cola-8-large"]["allow_small_classes"] is True and "eval_steps" not in rows["cola-8-large"]


def test_named_rows_change_the_base(table):
    assert read_rows(table(NAMED)) == {
        "one": {"method": "full", "learning_rate": 1e-3, "task_name": "demo", "seed": 3},
        "two": {"method": "full", "learning_rate": 2e-3, "task_name": "demo", "seed": 3},
    }
    assert read_rows(table("method: full\nseed: 1", "plain.yaml")) == {}


def test_a_row_is_chosen_by_address_or_argument_and_the_command_line_wins(table):
    path = table(GRID)
    by_address = parse_arguments([f"{path}#sst2-16-small", "--use_cpu", "--seed", "5"])
    by_argument = parse_arguments([path, "--seed", "5", "--recipe_row", "sst2-16-small", "--use_cpu"])
    both = parse_arguments([f"{path}#sst2-16-small", "--recipe_row", "sst2-16-small", "--use_cpu"])
    for _, _, data, args in (by_address, by_argument):
        assert (data.task_name, data.num_k, args.learning_rate, args.seed) == ("sst2", 16, 1e-3, 5)
    assert both[3].seed == 1
    table(NAMED, "a#b.yaml")  # a file whose own name has a '#'
    assert parse_arguments(["a#b.yaml#two", "--use_cpu"])[3].learning_rate == 2e-3
    table("method: full\nseed: 4", "c#d.yaml")
    assert parse_arguments(["c#d.yaml", "--use_cpu"])[3].seed == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table.yaml#sst2-16-smal"], r"no row 'sst2-16-smal'; the nearest are: sst2-16-small, .*`hf-ft-ext recipes"),
        (["table.yaml#xyzzy"], "no row 'xyzzy'; the first are: sst2-16-small, sst2-64-small, .*lists all 6"),
        (["table.yaml"], "is a table of 6 rows; choose one, for example table.yaml#sst2-16-small"),
        (["plain.yaml#one"], "plain.yaml is a single experiment without rows; leave #one out"),
        (["table.yaml#a", "--recipe_row", "b"], "selects the row 'a', and --recipe_row 'b'; pass one of the two"),
        (["--recipe_row", "b"], "--recipe_row b needs a recipe"),
        (["chooses.yaml"], "recipe_row in a recipe chooses nothing"),
        (["nowhere.yaml#a"], "'nowhere.yaml' is not a file"),
    ],
)  # fmt: skip
def test_invalid_addresses_are_refused(table, words, message):
    table(GRID)
    table("method: full", "plain.yaml")
    table("method: full\nrecipe_row: one", "chooses.yaml")
    with pytest.raises(InputError, match=f"(?s){message}"):
        parse_arguments(words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns: {a: seed}", "has columns but no rows; add rows, or leave columns out"),
        ("rows: {}", "rows of recipe table.yaml are empty"),
        ("rows: text", "must be a mapping of names to settings, or a list of rows"),
        ("rows: {one: 3}", "row 'one' of recipe table.yaml must be a mapping of arguments, got 3"),
        ("rows: [{seed: 1}]", "has a list of rows without names; add for example row_name"),
        ("row_name: '{seed}'\nrows: [{seed: [1, 1]}]", "row 1 .*has the same name as another row, '1'"),
        ("row_name: '{sed}'\nrows: [{seed: 1}]", "row_name '{sed}' does not fit row 1 .*has: seed"),
        ("row_name: x\ncolumns: {a: seed}\nrows: [[1, 2]]", "row 1 .*has 2 cells for 1 columns \\(a\\)"),
        ("row_name: x\nrows: [3]", "row 1 .*must be a list of cells or a mapping"),
        ("row_name: x\ncolumns: [a]\nrows: [[1]]", "columns .*must be a mapping of names to what each sets"),
        ("row_name: x\ncolumns: {a: {yes: {seed: 1}}}\nrows: [[yess]]", "column 'a' has no settings for 'yess'"),
        ("rows: {one: {seed: ~}}", "row 'one' .*`seed: ~` removes a setting that does not exist"),
        ("max-steps: 1\nmax_steps: 1\nrows: {one: {}}", "sets 'max_steps' twice"),
    ],
)
def test_invalid_tables_are_refused(table, text, message):
    text = text.replace("{yes:", '{"yes":')
    with pytest.raises(InputError, match=f"(?s){message}"):
        read_rows(table(text))


def test_files_that_became_rows_still_run_with_a_warning(table, caplog):
    table(NAMED, "study/demo.yaml")
    table("rows: 3", "study/broken.yaml")  # another file's fault is not this one's
    table("row_name: '{task_name}-{seed}'\nrows: [{task_name: sst2, seed: 1}]", "study/glue.yaml")
    assert read_recipe("study/demo/two.yaml")["learning_rate"] == 2e-3
    assert "has become a row of a table: pass study/demo.yaml#two" in caplog.text
    assert read_recipe("study/two.yaml")["seed"] == 3
    assert read_recipe("study/sst2/1.yaml")["task_name"] == "sst2"
    with pytest.raises(InputError, match="is not a file"):
        read_recipe("study/demo/three.yaml")


# --- hf-ft-ext recipes ----------------------------------------------------------------------------------


def listed(capsys, *words: str) -> list[str]:
    assert console(["recipes", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_command_lists_files_and_rows(table, capsys):
    table("# A grid.\n" + GRID, "recipes/full/grid.yaml")
    table("# Two runs.\n" + NAMED, "recipes/full/named.yaml")
    table("# Plain.\nmethod: lora\nmodel_name_or_path: me/encoder", "recipes/lora/plain.yaml")
    table("# Several.\nvariants: {full: {}, lora: {}}", "recipes/compare/two.yaml")
    assert listed(capsys) == [
        "recipes/compare/two.yaml  comparison  Several.",
        "recipes/full/grid.yaml    6 rows      A grid.",
        "recipes/full/named.yaml   2 rows      Two runs.",
        "recipes/lora/plain.yaml   1 run       Plain.",
    ]
    assert [line.split()[0] for line in listed(capsys, "grid", "task_name=sst2")] == [
        "recipes/full/grid.yaml#sst2-16-small", "recipes/full/grid.yaml#sst2-64-small",
    ]  # fmt: skip
    assert listed(capsys, "model_name_or_path=encoder") == [
        "recipes/lora/plain.yaml  method=lora model_name_or_path=me/encoder"
    ]
    assert listed(capsys, "recipes/full/named.yaml", "two") == [
        "recipes/full/named.yaml#two  learning_rate=0.002 task_name=demo seed=3"
    ]
    assert listed(capsys, "--folder", "recipes/lora") == ["recipes/lora/plain.yaml  1 run  Plain."]


def test_the_command_prints_a_row_as_a_recipe_of_its_own(table, capsys):
    path = table(GRID)
    text = "\n".join(listed(capsys, f"{path}#rte-64-small"))
    assert yaml.safe_load(text) == read_recipe(f"{path}#rte-64-small")
    copied = parse_arguments([table(text, "mine.yaml"), "--use_cpu"])
    assert copied[0].given == parse_arguments([f"{path}#rte-64-small", "--use_cpu"])[0].given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing-such"], "no recipe in 'recipes' matches nothing-such"),
        (["task_nam=sst2"], "matches task_nam=sst2; did you mean 'task_name'"),
        (["recipes/grid.yaml", "snli"], "none of the 6 rows of recipes/grid.yaml matches snli"),
        (["recipes/grid.yaml#snli"], "has no row 'snli'"),
        (["--folder", "empty"], "no recipes in 'empty'; pass --folder"),
    ],
)
def test_the_command_reports_what_it_cannot_find(table, capsys, words, message):
    table(GRID, "recipes/grid.yaml")
    assert console(["recipes", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_row_runs_beside_further_arguments(table, tiny_bert_dir, capsys):
    path = table(NAMED)
    words = [f"{path}#two", "--model_name_or_path", tiny_bert_dir, "--max_steps", "1", "--max_train_samples", "8"]
    words += ["--max_eval_samples", "8", "--max_seq_length", "8", "--use_cpu", "--output_dir", "out"]
    assert run_glue.main(words) == 0, capsys.readouterr().err
    with open("out/run.json") as file:
        record = json.load(file)
    assert (record["method"], record["task"], record["seed"]) == ("full", "demo", 3)
    assert f"{path}#two" in str(record["command"])
