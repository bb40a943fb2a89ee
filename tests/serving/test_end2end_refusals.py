"""What the offline script refuses, from its own ``main``: wrong arguments, files and models."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bagel_triton.pipeline import offline
from tests.support.offline_script import CHECKPOINT, OfflineScript

Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one line of an error that no prompt could have avoided, from the script's own ``main``."""
    script = OfflineScript(tmp_path, monkeypatch)

    def refuse(*arguments: str, status: int = 1, model: Path | str = CHECKPOINT) -> str:
        found = script(*arguments, model=model)
        out, error = capsys.readouterr()
        assert (found, out) == (status, "")
        assert error.startswith("end2end: error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "bagel_output" / "0.png").exists()
        return error

    return refuse


def test_loading_has_a_time_limit(refusal: Refusal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(offline, "LocalStages", lambda config: time.sleep(60))
    assert "loading took longer than 0.05 s" in refusal("--prompts", "A cute cat", "--init-timeout", "0.05")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompts", "x", "--worker-backend", "mpi"], "--worker-backend='mpi' is not allowed; allowed: process, ray"),
        (["--prompts", "x", "--init-sleep-seconds", "-1"], "--init-sleep-seconds=-1 is not allowed"),
        (["--prompts", "x", "--quantization", "gptq"], "--quantization='gptq' is not allowed; allowed: auto, int8"),
        (["--prompts", "x", "--init-timeout", "0"], "--init-timeout=0"),
        (["--prompts", "x", "--batch-timeout", "nan"], "--batch-timeout=nan"),
        (["--prompts", "x", "--modality", "img2video"], "img2video"),
        (["--prompts", "x", "--modality", "img2img"], "--modality img2img needs --image-path"),
        (["--prompts", "x", "--image-path", "photo.jpg"], "--modality text2img takes no --image-path"),
        (["--prompts", "x", "--txt-prompts", "prompts.txt"], "--txt-prompts"),
        ([], "--prompts"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(refusal: Refusal, arguments: list[str], named: str):
    assert named in refusal(*arguments, status=2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompts", "x", "--steps", "1"], "--steps: num_inference_steps=1 is not allowed"),
        (["--prompts", "x", "--height", "65"], "--height: height=65 is not allowed"),
        (["--prompts", "x", "--cfg-interval", "0.5", "0.2"], "--cfg-interval: cfg_interval=[0.5, 0.2]"),
        (["--prompts", "x", "--dtype", "float8"], "dtype='float8' is not allowed"),
        (
            ["--prompts", "x", "--modality", "img2text", "--image-path", "absent.png"],
            "--image-path absent.png: No such",
        ),
        (["--txt-prompts", "absent.txt"], "--txt-prompts absent.txt: No such"),
        (["--txt-prompts", "empty.txt"], "--txt-prompts empty.txt has no prompt in it"),
        (["--txt-prompts", "latin.txt"], "--txt-prompts latin.txt is not UTF-8 text"),
        (["--prompts", "x", "--modality", "img2text", "--image-path", "latin.txt"], "image[0]=5 bytes is not an im"),
    ],
)
def test_what_no_prompt_could_make_right_is_refused_at_once(
    refusal: Refusal, tmp_path: Path, arguments: list[str], named: str
):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Köln\n".encode("latin-1"))
    assert named in refusal(*arguments)


def test_a_model_that_is_no_checkpoint(refusal: Refusal, tmp_path: Path):
    assert "checkpoint nowhere does not exist; to download it" in refusal("--prompts", "x", model="nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty is empty; missing: config.json" in refusal("--prompts", "x", model="empty")


def test_a_deploy_yaml_is_checked_under_both_names(refusal: Refusal, tmp_path: Path):
    config = tmp_path / "deploy.yaml"
    config.write_text("pipeline: bagel_think\nstages:\n- stage_id: 0\n  no_such_field: 64\n")
    for option in ("--deploy-config", "--stage-configs-path"):
        assert "no_such_field" in refusal("--prompts", "A cute cat", option, str(config))


def test_a_preset_is_known_by_its_name(refusal: Refusal):
    said = refusal("--prompts", "A cute cat", "--deploy-config", "bagel_two_hosts")
    assert "--deploy-config bagel_two_hosts puts stages on other hosts" in said
