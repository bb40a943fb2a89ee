"""The reason of a failure is found in tritonserver's log and fits one line."""

from pathlib import Path

import pytest

from bagel_triton.serving import triton_process as triton_log

LOADED = "I1120 22:41:25.578660 4642 model_lifecycle.cc:839] \"successfully loaded 'dit'\"\n"
FAILED = (
    "E1120 22:41:25.652700 4642 model_lifecycle.cc:642] \"failed to load 'thinker' version 1: Internal: "
    'ValueError: a \\"quoted\\" word\\nsecond line\\n\\nAt:\\n  /models/thinker/1/model.py(3): initialize\\n"\n'
)
ABSENT = (
    "E1120 22:41:28.672031 4706 model_repository_manager.cc:1415] "
    "\"failed to poll model 'dit': model not found in any model repository.\"\n"
)
REFUSED = "error: creating server: Invalid argument - load failed for model 'bagel'\nsecond line\n"
LOADER = "stub: error while loading shared libraries: libx.so.1: cannot open shared object file\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            LOADED + FAILED + REFUSED,
            "failed to load 'thinker' version 1: Internal: ValueError: a \"quoted\" word second line",
        ),
        (ABSENT + REFUSED, "failed to poll model 'dit': model not found in any model repository."),
        (LOADED + REFUSED, "Invalid argument - load failed for model 'bagel'"),
        (LOADER, "stub: error while loading shared libraries: libx.so.1: cannot open shared object file"),
        (LOADED, None),
    ],
)
def test_the_reason_of_a_failure(tmp_path: Path, text: str, reason: str | None):
    log = tmp_path / "log"
    log.write_text(text)
    assert triton_log.failure(log) == reason


def test_loaded_models(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(LOADED + FAILED)
    assert triton_log.loaded_models(log) == {"dit"}
