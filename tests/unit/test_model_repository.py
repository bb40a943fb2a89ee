"""The models' configurations name the fields that the code has, and no others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from bagel_triton.deploy.topology import ENSEMBLE, EXPANDER, MODELS, ORCHESTRATOR, UNARY
from bagel_triton.protocol.request import ENSEMBLE_FIELDS, REQUEST_FIELDS

ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"


def configuration(model: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def inputs(model: str) -> dict[str, tuple[str, list[int], bool]]:
    """Datatype, shape and whether it may be left out, by name."""
    named = model_config_pb2.DataType.Name
    return {
        one.name: (named(one.data_type).removeprefix("TYPE_").replace("STRING", "BYTES"), list(one.dims), one.optional)
        for one in configuration(model).input
    }


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (ORCHESTRATOR, tuple(REQUEST_FIELDS)),
        (UNARY, tuple(REQUEST_FIELDS)),
        (EXPANDER, tuple(REQUEST_FIELDS)),
        (ENSEMBLE, ENSEMBLE_FIELDS),
    ],
)
def test_a_model_takes_every_request_field_as_it_is_declared(model: str, fields: tuple[str, ...]) -> None:
    declared = {name: (REQUEST_FIELDS[name].datatype, [REQUEST_FIELDS[name].length], True) for name in fields}
    if model == ENSEMBLE:
        declared["prompt"] = (*declared["prompt"][:2], False)
    if model == ORCHESTRATOR:
        declared["stream"] = ("BOOL", [1], True)
        declared |= dict.fromkeys(("sleep", "adapters", "abort"), ("BYTES", [1], True))
    assert inputs(model) == declared, "run python build/model_configs.py"


def test_the_ensemble_hands_every_field_to_the_planner() -> None:
    [expand, *_] = configuration(ENSEMBLE).ensemble_scheduling.step
    assert dict(expand.input_map) == {name: name for name in ENSEMBLE_FIELDS}


def test_the_ensemble_connects_tensors_that_its_steps_have() -> None:
    for step in configuration(ENSEMBLE).ensemble_scheduling.step:
        config = configuration(step.model_name)
        assert set(step.input_map) <= {one.name for one in config.input}
        assert set(step.output_map) <= {one.name for one in config.output}


def test_bagel_alone_is_decoupled() -> None:
    decoupled = {model for model in MODELS if configuration(model).model_transaction_policy.decoupled}
    assert decoupled == {ORCHESTRATOR}


def test_each_folder_is_named_as_its_model() -> None:
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    assert folders == set(MODELS) == {configuration(model).name for model in MODELS}


def test_the_script_that_writes_the_inputs_would_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "build"), *sys.path])
    import model_configs

    for model in model_configs.MODELS:
        text = (REPOSITORY / model / "config.pbtxt").read_text()
        assert model_configs.rewritten(model, text) == text
