"""The table of what works with what: complete, as in its data file, and each cell shown by a test that exists."""

import sys

import pytest
from blocks import ROOT

from hf_ft_ext.methods import METHODS

sys.path.insert(0, str(ROOT / "docs"))
import capabilities


def test_the_page_has_the_table_of_the_data_file():
    page = capabilities.PAGE.read_text()
    assert page.count(capabilities.START) == page.count(capabilities.END) == 1
    assert capabilities.rewritten(page) == page, "run python docs/capabilities.py"


@pytest.mark.parametrize("row", capabilities.read(), ids=lambda row: row["capability"])
def test_every_method_has_an_answer(row):
    assert row.keys() == {"capability", *METHODS}
    for method in METHODS:
        assert row[method].keys() <= {capabilities.answer(row[method]), "but"}


class Collected:
    """Keeps the ids of the tests that pytest found."""

    def pytest_collection_finish(self, session):
        self.ids = {item.nodeid for item in session.items}


def test_every_named_test_is_collected():
    cells = [cell for row in capabilities.read() for key, cell in row.items() if key != "capability"]
    named = {cell[capabilities.answer(cell)] for cell in cells}
    collected = Collected()
    files = sorted({str(ROOT / test.partition("::")[0]) for test in named})
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"]
    assert pytest.main([*options, f"--rootdir={ROOT}", *files], [collected]) == 0
    assert named <= collected.ids
