"""The package builds apart from the project's `build/`, and its programs start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[2]


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
