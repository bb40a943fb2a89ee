"""A wheel serves by itself, with its demo: in an environment that has it and its dependencies, far from the source."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "tiny-a"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; its dependencies are those of the environment that runs the tests."""
    directory = tmp_path_factory.mktemp("wheel")
    # setuptools adds what an earlier build left, so this one has a folder of its own.
    (directory / "build.cfg").write_text(f"[build]\nbuild_base = {directory / 'build'}\n")
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(directory / "build.cfg")}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(directory)]
    subprocess.run([*pip, "wheel", *options, str(ROOT)], env=environment, check=True)
    (wheel,) = directory.glob("*.whl")
    venv = directory / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    # Names a folder, whose own .pth files are not read: the editable install there is not seen.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--python", str(venv), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return venv


def test_its_demo_shows_every_task_with_timings_and_leaves_a_contact_sheet(bare: Path, tmp_path: Path) -> None:
    command = [str(bare / "bin" / "bagel-triton"), "demo", str(CHECKPOINT), "--output", "sheet.png", "--steps", "3"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TMPDIR"] = str(tmp_path)
    run = subprocess.run(
        [*command, "--height", "64", "--width", "48"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"contact sheet: {tmp_path / 'sheet.png'}" in run.stdout
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 3 * 256
    assert "model names     bagel, BAGEL-7B-MoT, ByteDance-Seed/BAGEL-7B-MoT\n" in run.stdout
    assert run.stdout.count("48x64 pixels") == 3
    assert run.stdout.count("total ") == 5
    for stage in ("cfg_expand", "thinker", "dit", "vae_decode"):
        assert any(line.startswith(stage) and " s" in line for line in run.stdout.splitlines()), stage
    assert list(tmp_path.glob("bagel_triton_*")) == []


def test_it_has_its_own_presets_and_models(bare: Path) -> None:
    script = (
        "from bagel_triton.serving.machine import source_file as f; print(f('model_repository'), f('build/deploy'))"
    )
    shown = subprocess.run([bare / "bin" / "python", "-c", script], capture_output=True, text=True, check=True)
    for path in shown.stdout.split():
        assert Path(path).is_relative_to(bare)
