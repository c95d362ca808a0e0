"""What start-up loads: seconds belong to `benchmarks/startup.py`, modules are counted here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ft_ext.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "{'torch', 'peft', 'transformers'}"
HEAVY = "{'datasets', 'evaluate', 'matplotlib', 'optuna', 'pandas', 'scipy', 'sklearn'}"


def in_a_new_process(code: str) -> list[str]:
    """The lines that a program writes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_importing_the_package_and_help_load_no_further_modules():
    """By the package itself alone, and by the help of all methods nothing that only a run needs."""
    code = (
        "import sys, transformers, torch, peft, contextlib, io; before = set(sys.modules); import hf_ft_ext\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
        "import run_glue\n"
        f"for name in {list(METHODS)}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):\n"
        "        run_glue.main(['--method', name, '--help'])\n"
        "    assert f'method {name}: ' in shown.getvalue(), name\n"
        f"print(sorted({HEAVY} & (set(sys.modules) - before)))\n"
        "hf_ft_ext.SparseTrainer; print('matplotlib' in sys.modules)"  # for pictures only
    )
    assert in_a_new_process(code)[-3:] == ["['hf_ft_ext', 'lazy_loader']", "[]", "False"]


@pytest.mark.parametrize("module", ["run_glue", "hf_ft_ext.methods", "hf_ft_ext.errors"])
def test_light_modules_load_no_library(module):
    code = f"import sys, {module}; print(sorted({LIBRARIES} & set(sys.modules)))"
    assert in_a_new_process(code)[-1] == "[]"


@pytest.mark.parametrize("argv", [["--method", "fulll"], ["no-such-recipe.yaml"], ["--recipe_row", "a"]])
def test_a_wrong_choice_is_refused_before_a_library_is_loaded(argv):
    code = f"import sys, run_glue; print(run_glue.main({argv})); print(sorted({LIBRARIES} & set(sys.modules)))"
    assert in_a_new_process(code)[-2:] == ["2", "[]"]
