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


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "it is empty; the shortest is `pipeline: bagel`"),
        ("stages:\n\t- stage_id: 0\n", "line 2, column 1, '- stage_id: 0': YAML indents by spaces, and this"),
        ("pipeline: [bagel\ndtype: auto\n", "line 2, column 6, 'dtype: auto': "),
        ("- pipeline", "it is a list, not a mapping"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_with_the_line(tmp_path: Path, text: str, part: str) -> None:
    assert part in refusal(tmp_path, text)


def test_all_unknown_fields_are_named_at_once(tmp_path: Path) -> None:
    text = "window_size: 3\nstages: [{stage_id: 0, gpu_memory_utilization: 0.5}, {stage_id: 1, max_num_seq: 2}]"
    message = refusal(tmp_path, text)
    for field in ("window_size", "stages[0].gpu_memory_utilization", "stages[1].max_num_seq"):
        assert field in message


def test_fields_of_the_peers_files_are_taken_at_values_that_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(
        """
        async_chunk: false
        stages:
          - {stage_id: 0, trust_remote_code: true, enable_chunked_prefill: false, output_connectors: {to_stage_1: shm}}
          - stage_id: 1
            enable_prefix_caching: false
            parallel_config: {tensor_parallel_size: 1, use_hsdp: false}
            input_connectors: {from_stage_0: shm}
        connectors:
          shm: {name: SharedMemoryConnector}
          rdma_connector: {name: MooncakeTransferEngineConnector, extra: {host: auto, zmq_port: 50051}}
        """
    )
    assert deploy_yaml.load(path, "checkpoint").connector == "shm"
