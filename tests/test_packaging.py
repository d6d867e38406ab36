"""What is installed, and what importing it costs.

`.ci/run` installs the package and runs the README's two commands.
"""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setuptools_config() -> dict[str, Any]:
    config: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return dict(config["tool"]["setuptools"])


def folder_of(package: str, mapping: dict[str, str]) -> Path:
    """Where a package's source lies."""
    if package in mapping:
        return ROOT / mapping[package]
    parent, _, name = package.rpartition(".")
    return folder_of(parent, mapping) / name


def test_every_folder_with_modules_is_installed(setuptools_config: dict[str, Any]) -> None:
    mapping = setuptools_config["package-dir"]
    installed = {folder_of(package, mapping) for package in setuptools_config["packages"]}
    rooms = [path for top in mapping.values() for path in (ROOT / top).rglob("*.py")]
    assert {path.parent for path in rooms} == installed


def test_every_data_file_is_installed(setuptools_config: dict[str, Any]) -> None:
    mapping, data = setuptools_config["package-dir"], setuptools_config["package-data"]
    for package in setuptools_config["packages"]:
        for path in folder_of(package, mapping).iterdir():
            if path.is_file() and path.suffix not in (".py", ".md", ".checkpoint"):
                patterns = data.get(package, [])
                assert any(fnmatch.fnmatch(path.name, p) for p in patterns), path


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("rectgrad_ref", "py.typed"),
        ("rectgrad_ref.onnx_models", "cifar10_cnn.onnx"),
        ("rectgrad_ref.onnx_models", "cifar10_cnn.json"),
    ],
)
def test_data_files_are_found_through_their_package(package: str, name: str) -> None:
    assert files(package).joinpath(name).is_file()


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, rectgrad_ref; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    heavy = {"matplotlib", "numba", "onnxruntime", "pooch", "rich", "scipy", "skimage", "torch"}
    heavy |= {"pyarrow", "ray", "zarr"}
    assert heavy.isdisjoint(output.split())


def test_uninstalled_it_says_how_to_install() -> None:
    # -S leaves out site-packages, where an installation would be found.
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import rectgrad_ref"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "pip install -e '.[cpu]'" in result.stderr.splitlines()[-1]
