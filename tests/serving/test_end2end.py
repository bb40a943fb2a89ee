"""The offline script: every modality, many prompts at once, and prompts that fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.offline_script import CHECKPOINT, ROOT, SCRIPT, OfflineScript

SMALL = ("--height", "64", "--width", "96", "--steps", "4", "--seed", "7")


@dataclass(frozen=True)
class Done:
    """What came of a run."""

    returncode: int
    stdout: str
    stderr: str


class Runner:
    """Runs the script in a folder of its own, in this process."""

    def __init__(self, script: OfflineScript, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._script, self._capsys = script.folder, script, capsys

    def __call__(self, *arguments: str) -> Done:
        return Done(self._script("--device", "cpu", *arguments), *self._capsys.readouterr())

    def good(self, *arguments: str) -> str:
        done = self(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def pixels(self, name: str) -> np.ndarray:
        with Image.open(self.folder / "bagel_output" / name) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            return np.asarray(image)


@pytest.fixture
def end2end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(OfflineScript(tmp_path, monkeypatch), capsys)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.linear_gradient("L").convert("RGB").resize((640, 512)).save(path)
    return path


def blocks(out: str) -> dict[int, str]:
    """What was printed for each prompt."""
    found = re.findall(r"^\[(\d+)\] (.*?)(?=^\[\d+\]|\Z)", out, re.MULTILINE | re.DOTALL)
    return {int(index): text for index, text in found}


def test_it_runs_on_its_own(tmp_path: Path):
    command = [
        sys.executable,
        "-W",
        "error",
        str(SCRIPT),
        "--model",
        str(CHECKPOINT),
        "--prompts",
        "A cute cat",
        *SMALL,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python_backends"), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("[0] A cute cat\nimage   bagel_output/0.png, 96x64 pixels, seed 7")


def test_many_prompts_become_an_image_each(end2end: Runner):
    out = end2end.good("--prompts", "A cute cat", "A red fox", "A house", *SMALL)
    printed = blocks(out)
    assert sorted(printed) == [0, 1, 2]
    assert printed[1].startswith("A red fox\nimage   bagel_output/1.png, 96x64 pixels, seed 7")
    images = [end2end.pixels(f"{index}.png") for index in range(3)]
    assert images[0].shape == (64, 96, 3)
    assert not np.array_equal(images[0], images[1])
    # An image does not depend on what it was made with, and none is written over.
    assert "bagel_output/0-2.png" in end2end.good("--modality", "text2img", "--prompts", "A red fox", *SMALL)
    assert np.array_equal(end2end.pixels("0-2.png"), images[1])
    assert np.array_equal(end2end.pixels("0.png"), images[0])


def test_images_of_one_prompt_have_seeds_in_a_row(end2end: Runner):
    out = end2end.good("--prompts", "A cute cat", "--n", "2", "--output", "bagel_output", *SMALL)
    assert "0.png, 96x64 pixels, seed 7" in out
    assert "0_1.png, 96x64 pixels, seed 8" in out
    assert not np.array_equal(end2end.pixels("0.png"), end2end.pixels("0_1.png"))


def test_thinking_comes_with_an_image(end2end: Runner):
    out = end2end.good("--prompts", "A cute cat", "--think", "--max-think-tokens", "8", *SMALL)
    assert re.search(r"^thinking  \S", out, re.MULTILINE)
    assert end2end.pixels("0.png").shape == (64, 96, 3)


def test_an_image_is_edited_in_its_own_size(end2end: Runner, photo: Path):
    guidance = ("--cfg-text-scale", "3", "--cfg-img-scale", "1.5", "--cfg-interval", "0", "1", "--cache", "taylorseer")
    end2end.good(
        "--modality", "img2img", "--image-path", str(photo), "--prompts", "Make it night", "--steps", "3", *guidance
    )
    assert end2end.pixels("0.png").shape == (512, 640, 3)


def test_an_image_is_described(end2end: Runner, photo: Path):
    arguments = ("--modality", "img2text", "--prompts", "What is this?", "--max-tokens", "8")
    out = end2end.good(*arguments, "--image-path", str(photo))
    assert re.search(r"^\[0\] What is this\?\nanswer    \S", out, re.MULTILINE)
    Image.new("RGB", (64, 64), "red").save(photo)
    assert end2end.good(*arguments, "--image-path", str(photo)) != out
    assert not (end2end.folder / "bagel_output").exists()


def test_prompts_come_from_a_file_one_a_line(end2end: Runner):
    (end2end.folder / "prompts.txt").write_text("What is the capital of France?\n\n  Where is Köln? \n")
    arguments = (
        "--modality",
        "text2text",
        "--txt-prompts",
        "prompts.txt",
        "--steps",
        "50",
        "--max-tokens",
        "6",
        "--enable-stats",
    )
    out = end2end.good(*arguments, "--temperature", "1", "--top-p", "0.9", "--top-k", "50", "--seed", "1")
    printed = blocks(out)
    assert printed[0].startswith("What is the capital of France?\nanswer    ")
    assert printed[1].startswith("Where is Köln?\nanswer    ")


def test_statistics_are_a_row_a_prompt_and_their_sums(end2end: Runner):
    out = end2end.good("--prompts", "A cute cat", "A red fox", "--enable-stats", *SMALL)
    assert re.search(r"^loaded in \d+\.\d s, 2 prompts in \d+\.\d s$", out, re.MULTILINE)
    header, *rows = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines()[-4:])
    assert header[0] == "prompt"
    for stage in ("thinker", "dit", "vae_decode"):
        assert f"{stage} queue s" in header
        assert float(rows[0][header.index(f"{stage} run s")]) > 0
    assert [row[0] for row in rows] == ["0", "1", "all"]
    for column in range(1, len(header)):
        values = [float(row[column]) for row in rows]
        assert values[2] == pytest.approx(values[0] + values[1], abs=0.002)


def test_a_prompt_that_fails_loses_no_other(end2end: Runner):
    done = end2end("--prompts", "A cute cat", "", "A red fox", *SMALL)
    assert done.returncode == 1
    assert sorted(blocks(done.stdout)) == [0, 2]
    assert "end2end: error: prompt 1: prompt='' is not allowed" in done.stderr
    assert sorted(path.name for path in (end2end.folder / "bagel_output").iterdir()) == ["0.png", "2.png"]


def test_a_deploy_yaml_is_read(end2end: Runner):
    config = end2end.folder / "deploy.yaml"
    config.write_text("pipeline: bagel_think\ndevice: cpu\nstages:\n- stage_id: 0\n  kv_tokens: 128\n")
    # 128 tokens hold no thinking of 1000: the pool is the YAML's, and so is thinking by default.
    done = end2end("--prompts", "A cute cat", "--stage-configs-path", str(config), *SMALL)
    assert done.returncode == 1
    assert "the request is too long" in done.stderr


def test_a_prompt_waits_for_its_turn_as_long_as_it_takes(end2end: Runner):
    stages = "stages:\n- stage_id: 0\n  lease_ttl_s: 0.001\n- stage_id: 1\n  max_num_seqs: 1\n"
    (end2end.folder / "deploy.yaml").write_text(f"pipeline: bagel\n{stages}")
    end2end.good("--prompts", "A cute cat", "A red fox", "A house", "--deploy-config", "deploy.yaml", *SMALL)
    assert len(list((end2end.folder / "bagel_output").iterdir())) == 3


def test_a_batch_without_progress_is_given_up(end2end: Runner):
    done = end2end("--prompts", "A cute cat", "A red fox", "--steps", "900", "--batch-timeout", "0.0001")
    assert done.returncode == 1
    for index in range(2):
        assert f"prompt {index}: nothing in the batch made progress for 0.0001 s" in done.stderr
