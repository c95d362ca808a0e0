"""The curves in TensorBoard, method by method: those that docs/logging.md lists."""

import math
import re

import pytest
from any_trainer import PLAIN, QUICK, classes, make
from blocks import ROOT
from quick import SOLVER_METHODS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_ft_ext.methods import METHODS

ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", re.MULTILINE)
TIMES = re.compile("(runtime|_time|_per_second|total_flos)$")
PAGE = {
    method: set(re.findall(r"`(\w+/\w+)`", curves))
    for methods, curves in ROW.findall((ROOT / "docs" / "logging.md").read_text())
    for method in re.findall(r"`(\w+)`", methods)
}


@pytest.mark.parametrize("name", METHODS)
def test_tensorboard_gets_the_curves_of_the_page(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    steps = {} if name in SOLVER_METHODS else {"max_steps": 2, "logging_steps": 1}
    options = {**PLAIN, **QUICK.get(name, {}), **steps, "report_to": "tensorboard"}
    trainer = make(name, classes(name)[0](str(tmp_path), **options))
    trainer.train()
    trainer.evaluate()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not TIMES.search(tag)]
    found = {tag: [event.value for event in events.Scalars(tag)] for tag in tags}
    assert found.keys() == PAGE[name] | PAGE["all"]
    if name in SOLVER_METHODS:
        logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
        assert all(found[tag][-1] == pytest.approx(logged[tag.partition("/")[2]], nan_ok=True) for tag in PAGE[name])
    else:
        assert len(found["train/loss"]) == 2 and all(map(math.isfinite, found["train/loss"]))
