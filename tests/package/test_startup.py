"""What start-up loads: seconds belong to `benchmarks/startup.py`, modules are counted here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model

from hf_ft_ext import BottleneckConfig, LayerMixtureConfig
from hf_ft_ext.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "{'torch', 'peft', 'transformers'}"
HEAVY = "{'datasets', 'evaluate', 'matplotlib', 'optuna', 'pandas', 'scipy', 'sklearn'}"


def in_a_new_process(code: str, *words: str, cwd: Path | None = None) -> list[str]:
    """The lines that a program writes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=180, env=environment, cwd=cwd,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


# One process pays for torch, and for what peft and the model load of transformers; each program is a fork of it. In
# "first" the package is imported before peft.
FORKS = """
import contextlib, json, os, sys, traceback, torch, transformers
import transformers.models.bert.modeling_bert, transformers.models.bloom.modeling_bloom
for name, program in json.loads(sys.argv[1]).items():
    pid = os.fork()
    if pid == 0:
        try:
            with open(name, "w") as out, contextlib.redirect_stdout(out):
                exec(program, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, name
"""
LOAD = """
from transformers import AutoModelForSequenceClassification
from peft import PeftModel
def load():
    base = AutoModelForSequenceClassification.from_pretrained("base")
    model = PeftModel.from_pretrained(base, "adapter").eval()
    print([value.hex() for value in model(input_ids=torch.arange(5, 25).view(2, 10)).logits.flatten().tolist()])
"""
PROGRAMS = {
    "first": f"import sys, torch; print('peft' in sys.modules); import hf_ft_ext\n{LOAD}\nload()",
    "beside the libraries": f"""
import contextlib, io, sys, torch, transformers, peft
{LOAD}
try:
    load()
except KeyError as error:  # peft alone says which type it does not know
    print(error)
before = set(sys.modules)
import hf_ft_ext
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
import run_glue
for name in {list(METHODS)}:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        run_glue.main(["--method", name, "--help"])
    assert f"method {{name}}: " in shown.getvalue(), name
print(sorted({HEAVY} & (set(sys.modules) - before)))
hf_ft_ext.SparseTrainer
print("matplotlib" in sys.modules)  # for pictures only
load()
""",
}


@pytest.mark.slow
def test_one_import_is_enough_and_loads_little(tmp_path):
    """By the package itself alone, and by the help of all methods nothing that only a run needs.

    After it plain peft loads an adapter of ours, whether peft was imported before or not.
    """
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    kinds = {"bottleneck": BottleneckConfig(bottleneck_size=5, init_std=0.3)}
    model = get_peft_model(base, LayerMixtureConfig(kinds=kinds, layers={0: "bottleneck"}, task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    logits = str([value.hex() for value in model(torch.arange(5, 25).view(2, 10)).logits.flatten().tolist()])
    in_a_new_process(FORKS, json.dumps(PROGRAMS), cwd=tmp_path)
    first, beside = ((tmp_path / name).read_text().splitlines() for name in PROGRAMS)
    assert first == ["False", logits]
    assert beside == ["'LAYER_MIXTURE'", "['hf_ft_ext', 'lazy_loader']", "[]", "False", logits]


@pytest.mark.parametrize("module", ["run_glue", "hf_ft_ext.methods", "hf_ft_ext.errors"])
def test_light_modules_load_no_library(module):
    code = f"import sys, {module}; print(sorted({LIBRARIES} & set(sys.modules)))"
    assert in_a_new_process(code)[-1] == "[]"


@pytest.mark.parametrize("argv", [["--method", "fulll"], ["no-such-recipe.yaml"], ["--recipe_row", "a"]])
def test_a_wrong_choice_is_refused_before_a_library_is_loaded(argv):
    code = f"import sys, run_glue; print(run_glue.main({argv})); print(sorted({LIBRARIES} & set(sys.modules)))"
    assert in_a_new_process(code)[-2:] == ["2", "[]"]
