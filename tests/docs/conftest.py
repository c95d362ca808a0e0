"""The method of docs/add-a-method.md, as if it were installed."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest
from blocks import EXAMPLE, blocks_of

from hf_ft_ext import methods

FILES = {block.file: block.code for block in blocks_of(EXAMPLE) if block.file}


@pytest.fixture
def package(tmp_path) -> Path:
    """The page's files in a folder, with the metadata that an installation would leave."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    metadata = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def entered(package, monkeypatch):
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setattr(methods, "METHODS", methods.METHODS)
    methods.add_methods_of_other_packages()
    yield
    methods.METHODS.pop("bitfit", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitfit"]:
        del sys.modules[name]
    importlib.invalidate_caches()
