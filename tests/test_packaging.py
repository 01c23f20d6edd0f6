"""The wheel and the source distribution: what they contain, and that an installed wheel works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from stream_ctr.config import examples

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = (
    *("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"),
    *("stream_ctr", "connectors", "configs", "deploy"),
)
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
PAGE = ROOT / "stream_ctr" / "monitor" / "page"
GENERATED = shutil.ignore_patterns("__pycache__", "*.egg-info")


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


def build(kind: str, checkout: Path, out: Path) -> Path:
    """Build a wheel or an sdist as pip does, in this environment."""
    out.mkdir()
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=GENERATED)
        else:
            shutil.copy2(ROOT / name, checkout)
    sdist = build("sdist", checkout, folder / "sdist")
    wheel = build("wheel", checkout, folder / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Built(wheel, sdist, build("wheel", unpacked, folder / "wheel_of_sdist"))


@pytest.fixture(scope="module")
def site(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the wheel, as pip installs them."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(folder)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def modules(folder: str) -> set[str]:
    """The modules of the checkout in `folder`, without those behind a link."""
    found = (Path(parent, name) for parent, _, names in os.walk(ROOT / folder) for name in names)
    return {str(path.relative_to(ROOT)) for path in found if path.suffix == ".py"}


def test_the_wheel_has_every_module_once_and_one_top_level_package(built: Built) -> None:
    names = contents(built.wheel)
    expected = modules("stream_ctr") | {f"stream_ctr/{name}" for name in modules("connectors")}
    assert "stream_ctr/connectors/__init__.py" in expected
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"stream_ctr"}


def test_the_wheel_has_the_examples_and_the_marker_of_types(built: Built) -> None:
    names = contents(built.wheel)
    assert "stream_ctr/py.typed" in names
    for path in (ROOT / "configs").glob("*.toml"):
        assert names[f"stream_ctr/configs/{path.name}"] == path.read_bytes()


def test_the_wheel_has_the_files_of_the_live_page(built: Built) -> None:
    names = contents(built.wheel)
    files = {path.name: path.read_bytes() for path in PAGE.iterdir()}
    assert {"index.html", "page.css", "page.js"} <= files.keys()
    for name, data in files.items():
        assert names[f"stream_ctr/monitor/page/{name}"] == data


def test_the_source_distribution_has_the_files_around_the_package(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("configs", "connectors", "deploy"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in str(path)}
        assert expected <= names
    assert {"LICENSE", "CHANGELOG.md", "constraints.txt", "MANIFEST.in"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_a_wheel_of_the_source_distribution_is_the_wheel_of_the_checkout(built: Built) -> None:
    assert contents(built.wheel_of_sdist) == contents(built.wheel)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-m", "stream_ctr", "--help"], "Usage: stream-ctr"),
        (["-c", "from stream_ctr import Subscriber; print(Subscriber.__module__)"], "stream_ctr."),
        (["-c", "from stream_ctr import config; print(config.examples())"], str(examples())),
        (
            ["-c", "from stream_ctr.connectors import memory; print(memory.__file__)"],
            "{site}/stream_ctr/connectors/memory.py",
        ),
    ],
    ids=["command", "subscriber", "examples", "connectors"],
)
def test_an_installed_wheel_works_beside_a_folder_named_connectors(
    site: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    for name in ("connectors", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('another package')")
    environ = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected.format(site=site) in done.stdout
