"""docs/walks.md lists the functions that small runs of the launcher call, and the counts of the page are theirs."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from blocks import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import walks

PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


@pytest.mark.run
@pytest.mark.skipif(
    any(version(name) != PINNED[name] for name in ("accelerate", "peft", "transformers")),
    reason="the page was recorded with the versions of constraints.txt; others call the hooks in another order",
)
def test_the_page_is_that_of_the_code():
    page = walks.PAGE.read_text()
    assert page.count(walks.START) == page.count(walks.END) == 1
    assert walks.rewritten(page, walks.written()) == page, "run python docs/walks.py"


def call(*functions: str) -> walks.Call:
    """The last of these functions, called by those before it."""
    callers: tuple[walks.Call, ...] = ()
    for function in functions:
        made = walks.Call(walks.Function(*function.split()), callers)
        callers += (made,)
    return made


def test_a_call_from_another_file_into_a_waiting_one_is_a_call_back():
    assert walks.calls_back(call("a.py f", "b.py g", "a.py h"))
    assert not walks.calls_back(call("a.py f", "b.py g", "b.py h"))
    assert not walks.calls_back(call("a.py f", "b.py g", "c.py h"))


def test_a_recording_holds_callers_and_who_met_the_value(monkeypatch):
    monkeypatch.setattr(walks, "_PACKAGE", f"{Path(__file__).parent}/")

    def holds(options: dict) -> str:
        return reads() or options

    def reads() -> None:
        meets_nothing(pytest.approx)

    def meets_nothing(value: object) -> None:
        pass

    with walks.recorded("approx", walks.RATE) as calls:
        holds({"learning_rate": walks.RATE})
    found = [(made.function.name.rpartition(".")[2], made.met, len(made.callers)) for made in calls]
    assert found == [("holds", True, 0), ("reads", True, 1), ("meets_nothing", False, 2)]


def test_sentences_are_of_the_files_that_take_part(monkeypatch):
    plan = {"runs": {"one": ""}, "files": {"a.py": "First.", "b.py": "Second."}}
    walk = {"title": "W", "run": "one", "about": "W.", "inside": ["a.py f"]}
    monkeypatch.setattr(walks, "read", lambda: {**plan, "walks": [walk]})
    with pytest.raises(ValueError, match=r"remove \['b\.py'\] from walks.yaml, which take part in no walk"):
        walks.written(lambda words: [call("a.py f")])
    with pytest.raises(ValueError, match=r"W: walks.yaml does not say why \['c\.py'\] take part"):
        walks.written(lambda words: [call("a.py f", "b.py g", "c.py h")])
    assert "| W | 2 | 2 | 0 |" in walks.written(lambda words: [call("a.py f", "b.py g")])
    walk["files"] = {"c.py": "Third."}
    with pytest.raises(ValueError, match=r"W: remove \['c\.py'\] from walks.yaml, which take no part"):
        walks.written(lambda words: [call("a.py f", "b.py g")])
