"""Loss curves: what is read of a trainer's state, and that they are drawn."""

import json
from pathlib import Path

import pytest
from run_records import run_record, write_run

from hf_ft_ext.report import curves
from hf_ft_ext.report.build import write_report

LOG = [
    {"step": 5, "loss": 0.9, "epoch": 1}, {"step": 5, "eval_loss": 0.8, "eval_runtime": 1}, {"step": 10, "loss": 0.5},
    {"step": 10, "loss": 0.4}, {"step": 15, "loss": float("nan")}, {"step": 20, "loss": "x"}, {"loss": 1.0}, "junk",
    {"step": 15, "train_loss": 0.6}, {"step": 15, "eval_loss": 0.3},
]  # fmt: skip


def write_state(folder: Path, content) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_losses_by_step_use_the_last_value_of_a_step(tmp_path):
    write_state(tmp_path, {"log_history": LOG})
    assert curves.read_losses(tmp_path) == ({5: 0.9, 10: 0.4}, {5: 0.8, 15: 0.3})


def test_the_last_checkpoint_stands_in_for_a_run_without_a_state(tmp_path):
    write_state(tmp_path / "checkpoint-9", {"log_history": [{"step": 9, "loss": 0.5}]})
    write_state(tmp_path / "checkpoint-10", {"log_history": [{"step": 10, "loss": 0.4}]})
    assert curves.read_losses(tmp_path) == ({10: 0.4}, {})


@pytest.mark.parametrize("content", ["{", "[]", '{"log_history": 3}', '{"a": 1}'])
def test_a_state_that_cannot_be_read_is_no_curve(tmp_path, content):
    write_state(tmp_path, content)
    assert curves.read_losses(tmp_path) == ({}, {})


def test_means_are_over_the_steps_that_all_seeds_have():
    assert curves.mean_line([{1: 1.0, 2: 3.0, 3: 5.0}, {3: 1.0, 1: 2.0}]) == {1: 1.5, 3: 3.0}
    assert curves.mean_line([]) == {}


def drawn(figure) -> dict[str, list[list[tuple[float, float]]]]:
    """Points of the lines in each panel."""
    return {axes.get_title(): [list(map(tuple, line.get_xydata())) for line in axes.lines] for axes in figure.axes}


def test_the_figure_holds_the_mean_and_every_seed():
    losses = {"a": curves.Losses([{1: 2.0, 2: 1.0}, {1: 4.0, 2: 2.0}], [{2: 1.5}])}
    shown = drawn(curves.draw(losses, {"a": 1}))
    assert sorted(shown["training loss"]) == [
        [(1.0, 2.0), (2.0, 1.0)], [(1.0, 3.0), (2.0, 1.5)], [(1.0, 4.0), (2.0, 2.0)],
    ]  # fmt: skip
    assert shown["evaluation loss"] == [[(2.0, 1.5)]]


def test_no_figure_of_single_points_or_nothing():
    assert curves.draw({"a": curves.Losses([{1: 2.0}], [{1: 1.0}]), "b": curves.Losses()}, {"a": 1, "b": 2}) is None
    assert curves.draw({}, {}) is None


@pytest.mark.parametrize("scale", [1, 1000])
def test_long_names_are_numbers_and_long_ranges_logarithmic(scale):
    names = {"x" * 40: 1, "short": 2}
    lines = curves.Losses([{1: 1.0, 9: 0.9}]), curves.Losses([{scale: 1.0, 9 * scale: 1.0 / scale}])
    figure = curves.draw(dict(zip(names, lines, strict=True)), names)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1", "short"]
    expected = "linear" if scale == 1 else "log"
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == expected


def test_the_report_shows_the_curve_beside_the_other_pictures(tmp_path):
    for seed in (1, 2):
        write_state(write_run(tmp_path / f"full-{seed}", run_record("full", seed, 0.5)), {"log_history": LOG})
    write_report([tmp_path], tmp_path / "out")
    page, markdown = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert (tmp_path / "out" / "loss-curve.png").read_bytes().startswith(b"\x89PNG") and "(loss-curve.png)" in markdown
    assert page.count("<svg") == 3 and "evaluation loss" in page and "faint: each seed" in page
