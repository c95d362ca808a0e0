"""Measured numbers are read from result files: none is typed into the text of a page."""

import sys
from functools import cache

import pytest
import yaml
from blocks import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import page as whole_page
from typed_numbers import typed_numbers

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def allowed() -> dict[str, list[dict[str, str]]]:
    return yaml.safe_load((ROOT / "tests" / "docs" / "typed_numbers.yaml").read_text())


def check(text: str, entries: list[dict[str, str]]) -> tuple[list[str], list[dict[str, str]]]:
    """The numbers that no entry allows, and the entries that allow none."""
    flat = text.replace("\n", " ")
    unknown, used = [], []
    for number in typed_numbers(text):
        fits = [entry for entry in entries if _allows(entry, number, flat)]
        used += fits
        if not fits:
            unknown.append(f"line {number.line}: ... {number.around} ...")
    return unknown, [entry for entry in entries if entry not in used]


def _allows(entry: dict[str, str], number, flat: str) -> bool:
    if "section" in entry:
        return entry["section"] == number.section
    start = flat.find(entry["text"], max(0, number.end - len(entry["text"])))
    return 0 <= start <= number.start and number.end <= start + len(entry["text"])


@pytest.mark.parametrize("path", [path for path in PAGES if path != whole_page.PAGE], ids=lambda path: path.name)
def test_no_measured_number_is_typed(path):
    unknown, unused = check(path.read_text(), allowed().get(path.name, []))
    assert not unknown, "show a table of a result file instead, or say why in tests/docs/typed_numbers.yaml"
    assert not unused, "tests/docs/typed_numbers.yaml allows what is not there"


def test_descriptions_of_generated_parts_hold_no_measured_number():
    words = []
    for section in whole_page.sections():
        words.append(section.get("text", ""))
        words += [entry[key] for entry in section.get("ratios", ()) for key in ("what", "against")]
        words += [found["text"] for found in section.get("tables", ())]
    assert [number.around for text in words for number in typed_numbers(text)] == []
    described = yaml.safe_load((ROOT / "benchmarks" / "overview.yaml").read_text())
    words = [about[key] for about in described["methods"].values() for key in ("wanted", "about")]
    assert [number.around for text in words for number in typed_numbers(text)] == []


def test_every_allowed_number_has_a_reason_and_a_page():
    assert set(allowed()) <= {path.name for path in PAGES}
    for entries in allowed().values():
        for entry in entries:
            assert entry["why"] and len({"text", "section"} & set(entry)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a step takes 0.98 of LoRA's", "1.26 x LoRA", "the fit takes 4.2 s", "36 s and 1.2 GB", "2,562 MiB",
        "84 % of it", "84 ± 2", "3 to 19 points above", "within 6 minutes", "12 times as much", "1/107 of it",
        "| full | 82.6 | 95.3 |", "(0.96-0.99)", "it gains\n9 points",
    ],
)  # fmt: skip
def test_typed_measurements_are_found(text):
    assert check(text, [])[0]


@pytest.mark.parametrize(
    "text",
    [
        "rate 1e-3 to 7.5e-4, batch 16, 3 epochs", "`--sparse_density 0.012`", "deepspeed 0.19.8", "16 x 128 tokens",
        "[arXiv 2410.07383](https://arxiv.org/abs/2410.07383)", "```bash\nrun --lr 0.1\n```", "32 x 64 rows of sst2",
        "<!-- results: some -->\n| 0.98 |\n<!-- end of results -->", "RoBERTa-base (125 M)", "seeds 13, 21 and 42",
    ],
)  # fmt: skip
def test_settings_and_generated_parts_are_left_alone(text):
    assert check(text, []) == ([], [])


def test_an_entry_allows_its_own_number_alone():
    text = "weight decay 0.1 here, and there a score of 0.1"
    entry = {"text": "weight decay 0.1", "why": "setting"}
    assert len(check(text, [entry])[0]) == 1
    assert check("no number", [entry]) == ([], [entry])
