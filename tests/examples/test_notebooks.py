"""The notebooks of examples/ are their scripts; `make notebooks` runs them."""

import importlib.util
import json
import shutil

import pytest
from blocks import ROOT

_SPEC = importlib.util.spec_from_file_location("notebooks_of_scripts", ROOT / "docs" / "notebooks.py")
notebooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(notebooks)

SCRIPTS = sorted(notebooks.FOLDER.glob("*.py"))


def cells_of(path) -> list[tuple[str, str]]:
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_script_and_no_outputs(script):
    path = script.with_suffix(".ipynb")
    assert cells_of(path) == notebooks.cells(script), "run python docs/notebooks.py"
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_every_script_has_a_notebook():
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebooks_are_those_that_jupytext_writes(script):
    pytest.importorskip("jupytext")
    assert script.with_suffix(".ipynb").read_text() == notebooks.notebook(script), "run python docs/notebooks.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_cells_are_the_whole_script(script):
    """Nothing of the code is lost between the cells: run in turn they define what the script defines."""
    code = "\n".join(text for kind, text in notebooks.cells(script)[:-1] if kind == "code")
    body = script.read_text().split('"""\n', 1)[1].removesuffix(notebooks._GUARD)
    assert "".join(code.split()) == "".join(body.split())


def test_a_changed_script_has_other_cells(tmp_path):
    script = shutil.copy(SCRIPTS[0], tmp_path / "other.py")
    script.write_text(script.read_text().replace("import argparse\n", "import argparse\nimport array\n", 1))
    assert notebooks.cells(script) != notebooks.cells(SCRIPTS[0])
    script.write_text("print(1)\n")
    with pytest.raises(ValueError, match="docstring"):
        notebooks.cells(script)
