"""What is built and said about the package: wheel, versions, license, citation."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_ft_ext

ROOT = Path(__file__).resolve().parents[2]


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


BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def build(kind: str, source: Path, into: Path) -> Path:
    return into / run("-c", BUILD.format(kind), str(into), cwd=source).stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """A wheel of the tree, and a wheel of the sdist of the tree."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "run_glue.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_ft_ext", source / "hf_ft_ext", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "from-tree").mkdir()
    (folder / "from-sdist").mkdir()
    sdist = build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    assert (unpacked / "LICENSE").is_file() and (unpacked / "PKG-INFO").is_file()
    return {
        "wheel": build("wheel", source, folder / "from-tree"),
        "sdist": build("wheel", unpacked, folder / "from-sdist"),
    }


@pytest.mark.slow
def test_the_source_archive_builds_the_same_wheel(archives):
    contents = []
    for kind in ("wheel", "sdist"):
        with zipfile.ZipFile(archives[kind]) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_an_installed_package_has_all_that_runs(tmp_path, archives):
    installed = tmp_path / "installed"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed))
    run(*install, str(archives["wheel"]), cwd=tmp_path, PIP_DISABLE_PIP_VERSION_CHECK="1")
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_ft_ext").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert "hf_ft_ext/py.typed" in files and sum(name.endswith((".jinja", ".yaml")) for name in files) >= 5
    assert not [name for name in files if not (installed / name).is_file()]
    script = installed / "bin" / "hf-ft-ext"  # pip made it, for the interpreter that runs this
    assert not (installed / "run_glue.py").exists()  # transformers has an example of that name
    assert "compare" in run(str(script), "--help", cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    about = (
        "import hf_ft_ext; from importlib.metadata import metadata; from hf_ft_ext.__main__ import main; "
        "print(hf_ft_ext.__file__, metadata('hf_ft_ext')['License'], flush=True); main(['train', '--help'])"
    )
    shown = run("-c", about, cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    assert shown.startswith(f"{installed}/hf_ft_ext/__init__.py Apache-2.0\n") and "gradientless" in shown
