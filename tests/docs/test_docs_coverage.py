"""Nothing public is missing from the docs, tables are those of the code, every link leads somewhere."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
from blocks import PAGES, ROOT

import hf_ft_ext
from hf_ft_ext.arguments import own_fields
from hf_ft_ext.methods import METHODS

DOCS = ROOT / "docs"
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
METHOD_PAGES = ("baselines", "sparse", "gradientless", "prompts", "linearhead", "fisher", "kernel")
SECTIONS = (
    "Idea", "When to use it", "Recommended settings", "Arguments", "Measured", "What differs from the published code",
)  # fmt: skip


@cache
def tables():
    spec = importlib.util.spec_from_file_location("argument_tables", DOCS / "argument_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headings(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_tables_of_arguments_are_those_of_the_code(page):
    text = page.read_text()
    assert text.count("<!-- arguments:") == text.count("<!-- end of arguments -->") == len(tables().tables_in(text))
    assert tables().rewritten(text) == text, "run python docs/argument_tables.py"


def test_tables_follow_a_changed_argument(monkeypatch):
    page = (DOCS / "baselines.md").read_text()
    monkeypatch.setattr(METHODS["lora"].arguments_class().__dataclass_fields__["lora_r"], "default", 9)
    assert tables().rewritten(page) != page


def test_every_method_and_group_has_one_table():
    found = [name for page in DOCS.glob("*.md") for name in tables().tables_in(page.read_text())]
    configs = [name for name in hf_ft_ext.__all__ if name.endswith("Config") and name != "PromptConfig"]
    assert sorted(found) == sorted([*METHODS, "run", "model", "data", "few_shot", "language", "names", *configs])


def test_every_public_name_and_argument_appears():
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [name for name in hf_ft_ext.__all__ if not re.search(rf"\b{name}\b", text)]
    for method in METHODS.values():
        fields = own_fields(method.arguments_class())
        missing += [f.name for f in fields if not re.search(rf"\b{f.name}\b", text)]
    assert not missing


def test_every_public_name_has_its_docstring_on_one_page_of_the_site():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^::: hf_ft_ext\.(?:\w+\.)*(\w+)$", text, flags=re.MULTILINE)
    assert sorted(documented) == sorted(hf_ft_ext.__all__)


@pytest.mark.parametrize("page", METHOD_PAGES)
def test_pages_of_methods_are_complete(page):
    found = headings(DOCS / f"{page}.md")
    for section in SECTIONS:
        assert any(heading.startswith(section) for heading in found), f"docs/{page}.md has no section {section!r}"
    assert page == "prompts" or f"](figures/{page}.svg)" in (DOCS / f"{page}.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in _LINK.findall(page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if part:
            assert part in map(anchor, headings(file)), f"{page.name}: {target} names no heading"


def test_every_page_is_linked_from_the_index_and_the_index_from_the_readme():
    linked = {target.partition("#")[0] for target in _LINK.findall((DOCS / "index.md").read_text())}
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked
    readme = {target.partition("#")[0] for target in _LINK.findall((ROOT / "README.md").read_text())}
    assert {"docs/index.md", "docs/choose.md"} <= readme
