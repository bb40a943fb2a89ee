"""The package declares what it imports, builds apart from the project's `build/`, and its programs start."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[2]
# Triton's stub brings the first; cuda-python has to fit the driver, so docs/kv.md names it and no extra does.
NOT_DECLARED = {"triton_python_backend_utils", "cuda"}


def _imported(folder: Path) -> set[str]:
    """The top-level modules that the files in ``folder`` import from elsewhere."""
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    return names - sys.stdlib_module_names - {"bagel_triton"}


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[\[<>=~; ]", dependency)[0]
        for dependency in (
            *project["dependencies"],
            *extras["cpu"],
            *extras["tracing"],
            *extras["mooncake"],
            *extras["ray"],
        )
    }
    installed = packages_distributions()  # what is not installed is taken for a distribution of that name
    missing = {
        name
        for name in _imported(ROOT / "python_backends" / "bagel_triton") - NOT_DECLARED
        if not declared & {re.sub("[-_.]+", "-", package).lower() for package in installed.get(name, (name,))}
    }
    assert missing == set()


@pytest.mark.filterwarnings("ignore:.*tool.distutils.*experimental")
def test_a_build_leaves_the_projects_build_folder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is setuptools' own folder for what it makes."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    build = distribution.get_command_obj("build")
    build.ensure_finalized()
    for folder in (build.build_base, build.build_lib, build.build_temp):
        assert Path(folder).parts[0] == ".cache"


def test_mooncake_master_finds_its_libraries() -> None:
    """As docs/kv.md prints it."""
    program = Path(sys.executable).with_name("mooncake_master")
    if not program.exists():
        pytest.skip("the extra bagel-triton[mooncake] is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    shown = subprocess.run([program, "--version"], env=environment, capture_output=True, text=True, check=True)
    assert "mooncake_master" in shown.stdout + shown.stderr
