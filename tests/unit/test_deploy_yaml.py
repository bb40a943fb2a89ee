"""What a deploy YAML may say, and what an error says of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "deploy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        deploy_yaml.load(path, "checkpoint")
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"deploy YAML {path}: ")


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("pipelin: bagel", "pipelin is not a known field; did you mean pipeline? allowed: pipeline, dtype, "),
        ("stages: [{stage_id: 0, max_num_seq: 4}]", "stages[0].max_num_seq is not a known field; did you mean max_num"),
        (
            "connectors: {net: {nam: shm}}",
            "connectors.net.nam is not a known field; did you mean name? allowed: name, ",
        ),
        ("5: 6", "5 is not a known field; allowed: pipeline, "),
    ],
)
def test_an_unknown_field_comes_with_the_nearest_known_one(tmp_path: Path, text: str, beginning: str) -> None:
    assert refusal(tmp_path, text).startswith(beginning)


@pytest.mark.parametrize(
    ("text", "path", "reason"),
    [
        (
            "stages: [{stage_id: 0}, {stage_id: 1, gpu_memory_utilization: 0.4}]",
            "stages[1].gpu_memory_utilization",
            "kv_",
        ),
        ("stages: [{stage_id: 0, engine_args: {dtype: float32}}]", "stages[0].engine_args", "directly under the stage"),
        ("stages: [{stage_id: 1, parallel_config: {use_hsdp: true}}]", "stages[0].parallel_config", "on one device"),
        ("platforms: {xpu: {}}", "platforms", "`device` says where"),
        ("stage_args: []", "stage_args", "under `stages`"),
    ],
)
def test_a_field_of_the_peers_files_is_refused_with_the_reason(
    tmp_path: Path, text: str, path: str, reason: str
) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"{path} has no meaning here: ")
    assert reason in message


@pytest.mark.parametrize(
    "text", ["", "- 1", "stages: 5", "stages: [5]", "connectors: [1]", "connectors: {a: 5}", "a: ["]
)
def test_what_has_another_shape_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text)
