"""perf_analyzer of the installed tritonclient starts."""

import os
import subprocess
from pathlib import Path

import pytest

from bagel_triton.serving import CommandError, cli, perf_analyzer


def test_it_runs_with_the_libraries_laid_out():
    with perf_analyzer.prepare() as analyzer:
        shown = subprocess.run(
            [analyzer.program, "--version"], env=analyzer.environment, capture_output=True, text=True, check=True
        )
    assert "Perf Analyzer Version" in shown.stdout + shown.stderr


def test_its_exit_status_is_the_commands(capfd: pytest.CaptureFixture[str]):
    assert cli.main(["perf-analyzer", "--", "--version"]) == 0
    assert cli.main(["perf-analyzer", "--", "--no-such-option"]) != 0


@pytest.mark.parametrize("arguments", [[], ["--"]])
def test_without_arguments_it_says_that_it_needs_some(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["perf-analyzer", *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("bagel-triton: error: perf_analyzer needs arguments: -- -m MODEL")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            "text2img",
            "Triton's gRPC does not answer at 127.0.0.1:9; give the address that serve prints for it, or start",
        ),
        ("chat", "the OpenAI API does not answer at 127.0.0.1:9; give its address as the second argument"),
    ],
)
def test_the_recipes_say_what_to_start(task: str, said: str):
    command = ["bash", "build/perf/run.sh", "127.0.0.1:9", "127.0.0.1:9"]
    environment = {**os.environ, "TASKS": task}
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"run.sh: error: {said}")


def test_a_wheel_without_it_is_a_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    with pytest.raises(CommandError, match="tritonclient carries no perf_analyzer"), perf_analyzer.prepare():
        pytest.fail("there is nothing to run")
