"""README's picture and table of methods: which study they show, and that they are those of its file."""

import re
import sys
from xml.etree import ElementTree

import pytest
from blocks import ROOT

from hf_ft_ext.methods import METHODS

sys.path.insert(0, str(ROOT / "benchmarks"))
import overview
import results


def rows(variants: dict[str, tuple[float, float | None]], task: str = "sst2") -> list[dict]:
    """A study's rows: score and, where there is one, peak of each variant."""
    found = []
    for name, (score, peak) in variants.items():
        about = {"what": f"{name} on {task}", "task": task, "variant": name, "metric": "eval_accuracy"}
        found.append({**about, "quantity": "score", **results.over_seeds({1: score - 0.01, 2: score + 0.01})})
        if peak is not None:
            found.append({**about, "quantity": "peak MiB", **results.over_seeds({1: peak})})
    return found


def labels(svg: str) -> dict[str, tuple[float, float]]:
    """Place of each text of a picture."""
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return {text.text: (float(text.get("x")), float(text.get("y"))) for text in texts}


def circles(svg: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")
    return [(float(circle.get("cx")), float(circle.get("cy"))) for circle in found]


def test_picture_is_that_of_the_result_files():
    assert overview.PICTURE.read_text() == overview.picture(), "run python benchmarks/tables.py"


def test_points_stand_where_their_numbers_say(tmp_path):
    results.save(
        "methods", rows({"full": (0.9, 4000), "lora": (0.8, 2000), "linearhead": (0.7, 1000)}), ["x"], tmp_path
    )
    (full_x, full_y), (lora_x, lora_y), (head_x, head_y) = circles(overview.picture(tmp_path))
    assert full_x - lora_x == pytest.approx(2 * (lora_x - head_x), abs=0.3)  # a line of memory
    assert head_y - lora_y == pytest.approx(lora_y - full_y, abs=0.3) and full_y < head_y  # more is higher
    assert {"full", "lora", "linearhead"} <= set(labels(overview.picture(tmp_path)))


def test_a_partial_file_gives_what_it_has(tmp_path):
    assert overview.picture(tmp_path) == "" and overview.study(tmp_path)[1] == []
    results.save("base_size", rows({"full": (0.9, None)}), ["x"], tmp_path)
    assert overview.picture(tmp_path) == ""  # no memory yet, so nothing to draw
    results.save("base_size", rows({"lora": (0.9, 100)}), ["x"], tmp_path)
    assert len(circles(overview.picture(tmp_path))) == 1


def test_the_first_file_with_enough_variants_is_shown(tmp_path):
    few = {"full": (0.9, 100), "lora": (0.9, 90)}
    many = {**few, "sparse": (0.9, 80), "kernel": (0.8, 70), "fisher": (0.8, 60)}
    results.save("base_size", rows(many), ["x"], tmp_path)
    results.save("methods", rows(few), ["x"], tmp_path)
    assert overview.study(tmp_path)[0] == "base_size"
    results.save("methods", rows(dict(list(many.items())[:4])), ["x"], tmp_path)
    assert overview.study(tmp_path)[0] == "methods"
    results.save("methods", rows({"full": (0.5, 1000)}, task="rte"), ["x"], tmp_path)
    assert overview.study(tmp_path)[1][0].value("score") == pytest.approx(0.9)  # another task is left out


def test_table_has_a_line_for_each_method(tmp_path):
    variants = {"adapter-svd": (0.8, 70), "adapter-layer": (0.9, 80), "linear-head": (0.7, 20), "sparse-x": (0.6, 10)}
    results.save("base_size", rows(variants), ["x"], tmp_path)
    lines, shown = overview.choice(tmp_path)
    assert len(shown) == 8
    assert "A score without a deviation is of one seed" in lines[0]
    assert lines[0].startswith("An encoder of") and lines[2].startswith(
        "| you want | `--method` | score, % | peak MiB |"
    )
    cells = {re.search(r"`(\w+)`", line)[1]: line.split(" | ") for line in lines[4:]}
    assert set(cells) == set(METHODS)
    assert cells["sparse"][2:4] == ["90.0 ± 1.4", "80"]  # the first name of the list, though others come before it
    assert cells["linearhead"][2] == "70.0 ± 1.4" and cells["full"][2:4] == ["", ""]


def test_scores_of_the_base_size_stand_beside_those_of_the_table(tmp_path):
    few = {"full": (0.8, 100), "lora": (0.7, 90), "sparse": (0.6, 80), "kernel": (0.5, 70)}
    results.save("methods", rows(few), ["x"], tmp_path)
    alone = overview.choice(tmp_path)[0]
    assert "base size" not in alone[0] + alone[2]
    results.save("base_size", rows({"full": (0.9, 1), "head-gld": (0.4, 1)}), ["x"], tmp_path)
    results.save("base_size", rows({"full": (0.1, 1)}, task="rte"), ["x"], tmp_path)
    lines, shown = overview.choice(tmp_path)
    heads = lines[2].split(" | ")
    cells = {re.search(r"`(\w+)`", line)[1]: line.split(" | ")[heads.index("base size, %")] for line in lines[4:]}
    assert cells["full"] == "90.0 ± 1.4" and cells["gradientless"] == "40.0 ± 1.4" and cells["lora"] == ""
    assert {row["file"] for row in shown} == {"methods", "base_size"} and lines[3].count("---:") == len(heads) - 3


def test_without_measurements_the_table_has_its_words(tmp_path):
    lines, shown = overview.choice(tmp_path)
    assert shown == [] and lines[0] == "| you want | `--method` | what it is |" and len(lines) == 2 + len(METHODS)


def test_names_cover_no_point_and_no_other_name(tmp_path):
    variants = {f"sparse-{i}": (0.9 + 0.002 * i, 1000 + 8 * i) for i in range(5)}
    results.save("base_size", rows({**variants, "full": (0.93, 2000)}), ["x"], tmp_path)
    drawn = [variant for variant in overview.study(tmp_path)[1] if variant.is_drawn]
    places = circles(overview.picture(tmp_path))
    boxes = [
        overview.box_of(option, 0.6 * overview.SIZE * len(variant.name))
        for variant, option in zip(drawn, overview.place_labels(drawn, places), strict=True)
    ]
    for number, box in enumerate(boxes):
        assert not any(overview.overlap(box, other) for other in boxes[:number])
        assert not any(overview.overlap(box, (x - 5, y - 5, x + 5, y + 5)) for x, y in places)
