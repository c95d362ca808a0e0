"""What is built and said about the package: wheel, versions, license, citation."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_ft_ext

ROOT = Path(__file__).resolve().parents[1]


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_versions_and_license_agree():
    metadata = setup()["metadata"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert metadata["version"] == hf_ft_ext.__version__ == citation["version"]
    assert f"## {hf_ft_ext.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert metadata["license"] == citation["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and metadata["license_files"] == "LICENSE"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.slow
def test_a_wheel_holds_all_that_runs(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or newer")
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "run_glue.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_ft_ext", source / "hf_ft_ext", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(installed)
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_ft_ext").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert "hf_ft_ext/py.typed" in files and sum(name.endswith((".jinja", ".yaml")) for name in files) >= 5
    assert not [name for name in (*files, "run_glue.py") if not (installed / name).is_file()]
    command = (
        "import sys; from importlib.metadata import distribution as find;"
        "(script,) = find('hf_ft_ext').entry_points.select(group='console_scripts', name='hf-ft-ext');"
        "sys.exit(script.load()(['--help']))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True,
        text=True, timeout=90, check=False,
    )  # fmt: skip
    assert shown.returncode == 0 and "gradientless" in shown.stdout, shown.stderr[-2000:]
