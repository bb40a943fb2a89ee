"""What a deploy file means: its settings, the file it is based on, platforms, flags, and the older form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError, DeployConfig
from bagel_triton.deploy.yaml import Deployment, Flags, Platform
from bagel_triton.serving.memory import by_device

SEEDS = Path(__file__).parents[1] / "data" / "seeds" / "deploy"


def read(folder: Path, text: str, platform: Platform = "cpu", **more: str) -> Deployment:
    """The deployment of a file with ``text``, beside the files ``more``."""
    for name, other in more.items():
        (folder / f"{name}.yaml").write_text(other)
    path = folder / "deploy.yaml"
    path.write_text(text)
    return deploy_yaml.resolve(path, "checkpoint", platform=lambda: platform)


def refusal(folder: Path, text: str, platform: Platform = "cpu", **more: str) -> list[str]:
    """The lines of the error about that file, without its folder."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, platform, **more)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# --- settings ---


def test_a_file_sets_the_limits_of_each_stage(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
        pipeline: bagel_think
        dtype: bfloat16
        request_timeout_s: 7
        stages:
          - {stage_id: 0, max_num_seqs: 5, max_num_batched_tokens: 6, max_waiting: 7, kv_tokens: 80, block_tokens: 8,
             lease_ttl_s: 1.5, enable_prefix_caching: false, encoder_cache_mb: 0}
          - {stage_id: 1, max_num_seqs: 2, max_num_batched_tokens: 3, max_waiting: 4, vae_use_tiling: false}
        """,
    ).config
    assert (config.pipeline, config.dtype, config.bagel.request_timeout_s) == ("bagel_think", "bfloat16", 7)
    thinker = config.thinker
    assert (thinker.max_num_seqs, thinker.max_num_batched_tokens, thinker.max_waiting) == (5, 6, 7)
    assert (thinker.kv_tokens, thinker.block_tokens, thinker.lease_ttl_s) == (80, 8, 1.5)
    assert (thinker.enable_prefix_caching, thinker.encoder_cache_mb) == (False, 0)
    assert (config.dit.max_num_seqs, config.dit.max_num_batched_tokens, config.dit.max_waiting) == (2, 3, 4)
    assert not config.vae_decode.use_tiling


def test_a_single_stages_limits_are_the_images_and_the_prefill(tmp_path: Path) -> None:
    stage = "{stage_id: 0, max_num_seqs: 2, max_num_batched_tokens: 100, kv_tokens: 64, vae_use_tiling: false}"
    config = read(tmp_path, f"pipeline: bagel_single_stage\nstages: [{stage}]").config
    assert (config.dit.max_num_seqs, config.thinker.max_num_seqs) == (2, 64)
    assert (config.thinker.max_num_batched_tokens, config.dit.max_num_batched_tokens) == (100, 65536)
    assert not config.vae_decode.use_tiling


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("max_model_len: 50000", 50048),
        ("max_model_len: 50000, kv_tokens: 40000", 50048),
        ("max_model_len: 50000, kv_tokens: 60000", 60000),
        ("max_model_len: 4096", 32768),  # the pool is for all requests together, and a default is never lowered
        ("max_model_len: 4096, kv_tokens: 2048", 4144),
    ],
)
def test_the_pool_holds_the_longest_request(tmp_path: Path, fields: str, expected: int) -> None:
    for base in ("", "base_config: bagel\n"):
        thinker = read(tmp_path, f"{base}stages: [{{stage_id: 0, {fields}}}]").config.thinker
        assert thinker.kv_tokens == expected
        assert thinker.max_model_len >= int(fields.removeprefix("max_model_len: ").split(",")[0])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("base_config: bagel", True),
        ("base_config: bagel_think", False),
        ("base_config: bagel_single_stage", True),
        ("stages: [{stage_id: 0, max_model_len: 50000}]", True),
        ("stages: [{stage_id: 0, kv_tokens: 32768}]", False),
        ("stages: [{stage_id: 0, gpu_memory_utilization: 0.5}]", False),
        ("stages: [{stage_id: 1, gpu_memory_utilization: 0.5}]", True),
    ],
)
def test_the_size_of_the_pool_is_left_to_the_server_unless_it_is_given(tmp_path: Path, text: str, left: bool) -> None:
    assert read(tmp_path, text, "cuda").default_pool is left


def test_a_null_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    assert read(tmp_path, "pipeline: null\nstages: [{stage_id: 0, kv_tokens: , quantization: null}]").config == (
        DeployConfig("checkpoint")
    )


def test_defaults_of_requests_apply_where_they_have_an_effect(tmp_path: Path) -> None:
    thinker = (
        "{temperature: 0.4, top_k: 1, seed: 5, max_completion_tokens: 9, num_inference_steps: 3, detokenize: true}"
    )
    dit = "{seed: 52, temperature: 0.0, num_inference_steps: 7, extra_args: {cfg_interval: [0, 1], cache: taylorseer}}"
    config = read(
        tmp_path,
        f"""
        stages:
          - {{stage_id: 0, default_sampling_params: {thinker}}}
          - {{stage_id: 1, default_sampling_params: {dit}}}
        """,
    ).config
    assert config.text_defaults == {"temperature": 0.4, "top_k": 1, "seed": 5, "max_tokens": 9}
    image = {"seed": 52, "num_inference_steps": 7, "cfg_interval": [0, 1], "cache": "taylorseer"}
    assert config.image_defaults == {"temperature": 0.4, "top_k": 1, **image}
    config.write(tmp_path / "written.yaml")
    from bagel_triton.deploy.config import read as read_written

    assert read_written(tmp_path / "written.yaml") == config


def test_a_default_for_the_other_stage_has_a_note(tmp_path: Path) -> None:
    for stage_id, field in ((0, "num_inference_steps"), (1, "max_tokens")):
        text = f"stages: [{{stage_id: {stage_id}, default_sampling_params: {{{field}: 3}}}}]"
        (note,) = read(tmp_path, text).notes
        assert f"stages[stage_id={stage_id}].default_sampling_params.{field} changes nothing here" in note


def test_merge_keys_are_understood(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
        stages:
          - &limits {stage_id: 0, max_num_seqs: 3, max_waiting: 9}
          - {<<: *limits, stage_id: 1, max_waiting: 5}
        """,
    ).config
    assert (config.thinker.max_num_seqs, config.thinker.max_waiting) == (3, 9)
    assert (config.dit.max_num_seqs, config.dit.max_waiting) == (3, 5)


# --- devices and platforms ---


@pytest.mark.parametrize(
    ("text", "platform", "device"),
    [
        ("stages: [{stage_id: 0, devices: '1'}, {stage_id: 1, devices: 1}]", "cuda", "cuda:1"),
        ("stages: [{stage_id: 1, devices: cuda}]", "cuda", "cuda"),
        ("stages: [{stage_id: 0, devices: '0'}]", "cpu", "auto"),
        ("stages: [{stage_id: 0, devices: '0'}, {stage_id: 1, devices: '1'}]", "cpu", "auto"),
        ("device: cpu\nstages: [{stage_id: 0, devices: '3'}]", "cuda", "cpu"),
        ("device: cuda\nstages: [{stage_id: 0, devices: '3'}]", "cpu", "cuda:3"),
        ("device: cuda:2", "cpu", "cuda:2"),
    ],
)
def test_a_number_is_that_of_a_cuda_device_where_there_is_one(
    tmp_path: Path, text: str, platform: Platform, device: str
) -> None:
    assert read(tmp_path, text, platform).config.device == device


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (("'0'", "'1'"), ("cuda:0", "cuda:1")),
        (("'1'", "'0'"), ("cuda:1", "cuda:0")),
        (("cpu", "'0'"), ("cpu", "cuda:0")),
        (("'2'", "'2'"), ("cuda:2", None)),
    ],
)
def test_each_stage_may_have_a_device_of_its_own(
    tmp_path: Path, devices: tuple[str, str], expected: tuple[str, str | None]
) -> None:
    stages = [f"- {{stage_id: {number}, devices: {device}}}" for number, device in enumerate(devices)]
    config = read(tmp_path, "\n".join(["stages:", *stages[::-1]]), "cuda").config
    assert (config.device, config.dit_device) == expected
    here = [config.device_of(model) for model in ("cfg_expand", "thinker", "dit", "vae_decode")]
    assert here == [expected[0], expected[0], *[expected[1] or expected[0]] * 2]
    assert [(half.device, half.models[-1]) for half in by_device(config)] == (
        [(expected[0], "bagel_infer"), (expected[1], "vae_decode")]
        if expected[1]
        else [(expected[0], "bagel_text2img")]
    )


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (("'0,1'", "'2,3'"), (["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"])),
        (("'3,1'", "'3,1'"), (["cuda:3", "cuda:1"], ["cuda:3", "cuda:1"])),
        (("'1'", "'1'"), (["cuda:1", "cuda:2"], ["cuda:1", "cuda:2"])),  # the next one, where one is named
        (("'0'", "'2,1'"), (["cuda:0", "cuda:1"], ["cuda:2", "cuda:1"])),
        (("cpu", "cpu"), (["cpu", "cpu"], ["cpu", "cpu"])),
    ],
)
def test_each_rank_has_a_device_of_its_own(
    tmp_path: Path, devices: tuple[str, str], expected: tuple[list[str], list[str]]
) -> None:
    stages = [
        f"- {{stage_id: {number}, devices: {device}, tensor_parallel_size: 2}}" for number, device in enumerate(devices)
    ]
    config = read(tmp_path, "\n".join(["stages:", *stages]), "cuda").config
    for models, ranks in zip((("thinker",), ("dit", "vae_decode")), expected, strict=True):
        for model in models:
            assert [config.rank_device_of(model, rank) for rank in range(2)] == ranks


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("'0,1,2'", "='0,1,2' is not allowed: 3 devices for a stage of 2; allowed: as many as "),
        ("'1,1'", "='1,1' is not allowed; allowed: each device once"),
    ],
)
def test_devices_that_are_not_one_for_each_rank_are_refused(tmp_path: Path, devices: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, f"stages: [{{stage_id: 0, devices: {devices}, tensor_parallel_size: 2}}]", "cuda")


PLATFORMS = """
stages: [{stage_id: 0, kv_tokens: 150, max_waiting: 5}]
platforms:
  cpu: {stages: [{stage_id: 0, kv_tokens: 200}]}
  cuda: {dtype: bfloat16, stages: [{stage_id: 1, max_num_seqs: 3}]}
  xpu: {stages: [{stage_id: 0, no_such_field: 1}]}
"""


def test_only_the_platforms_own_section_applies(tmp_path: Path) -> None:
    on_cpu = read(tmp_path, PLATFORMS)
    assert (on_cpu.config.thinker.kv_tokens, on_cpu.config.thinker.max_waiting, on_cpu.config.dtype) == (200, 5, "auto")
    assert str(on_cpu.origins["thinker.kv_tokens"]).endswith("deploy.yaml:4 (platforms.cpu)")
    on_cuda = read(tmp_path, PLATFORMS, "cuda").config
    assert (on_cuda.thinker.kv_tokens, on_cuda.dit.max_num_seqs, on_cuda.dtype) == (150, 3, "bfloat16")
    named = read(tmp_path, f"device: cpu\n{PLATFORMS}", "cuda").config
    assert named.thinker.kv_tokens == 200


def test_a_section_that_does_not_apply_is_checked_too(tmp_path: Path) -> None:
    text = "platforms:\n  cuda: {stages: [{stage_id: 0, max_num_seqs: 0}]}\n  gpu: {}\n  cpu: {base_config: bagel}"
    lines = refusal(tmp_path, text)
    assert [line.partition(" ")[0] for line in lines] == ["deploy.yaml:2:", "deploy.yaml:3:", "deploy.yaml:4:"]
    assert "platforms.cuda.stages[stage_id=0].max_num_seqs=0 is not allowed" in lines[0]
    assert "platforms.gpu is not a known platform; allowed: cpu, cuda, " in lines[1]


@pytest.mark.parametrize(("platform", "sized"), [("cuda", 0.4), ("cpu", None)])
def test_a_fraction_of_the_gpu_means_nothing_on_a_cpu(tmp_path: Path, platform: Platform, sized: float | None) -> None:
    found = read(tmp_path, "stages: [{stage_id: 0, gpu_memory_utilization: 0.4}]", platform)
    assert found.config.thinker.gpu_memory_utilization == sized
    assert ["gpu_memory_utilization changes nothing on a CPU" in note for note in found.notes] == [True] * (not sized)


# --- bases and flags ---


def test_a_file_changes_the_one_it_is_based_on(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "base_config: base.yaml\nstages:\n- {stage_id: 1, max_num_seqs: 3}\n- {stage_id: 0, kv_tokens: 300}",
        base="base_config: bagel_think\nstages: [{stage_id: 0, kv_tokens: 100, max_waiting: 7}]",
    )
    config = found.config
    assert (config.pipeline, config.dit.max_num_seqs) == ("bagel_think", 3)
    assert (config.thinker.kv_tokens, config.thinker.max_waiting) == (300, 7)
    origins = {name: str(origin).replace(f"{tmp_path}/", "") for name, origin in found.origins.items()}
    assert origins["thinker.kv_tokens"] == "deploy.yaml:4"
    assert origins["thinker.max_waiting"] == "base.yaml:2"
    assert origins["pipeline"].endswith("build/deploy/bagel_think.yaml:3")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("base_config: deploy.yaml", "base.yaml:1: base_config='deploy.yaml' is based on this file in turn"),
        (
            "stages: [{stage_id: 0, kv_tokens: 0}]",
            "base.yaml:1: stages[stage_id=0].kv_tokens=0 is not allowed; allowed: an int",
        ),
        ("a: [", "base.yaml:1: column 5, 'a: [': expected the node content"),
        ("stages: [{stage_id: [0]}]", "base.yaml:1: stages[0].stage_id=[0] is not allowed; allowed: 0 or 1"),
    ],
)
def test_an_error_of_the_base_names_its_file(tmp_path: Path, base: str, message: str) -> None:
    (line,) = refusal(tmp_path, "base_config: base.yaml\nstages: [{stage_id: 0}]", base=base)
    assert line.startswith(message)


# --- files of vLLM-Omni ---


def changes(config: DeployConfig) -> dict[str, Any]:
    """The values of ``config`` that are not the default, sections flattened."""
    import msgspec

    flat: dict[str, Any] = {}
    default = msgspec.to_builtins(DeployConfig("checkpoint"), str_keys=True)
    for name, value in msgspec.to_builtins(config, str_keys=True).items():
        if value == default[name]:
            continue
        if name.endswith("_defaults") or not isinstance(value, dict):
            flat[name] = value
        else:
            flat |= {f"{name}.{key}": entry for key, entry in value.items() if entry != default[name][key]}
    return flat


SAMPLING = {"temperature": 0.4, "top_p": 0.9, "top_k": 1, "repetition_penalty": 1.05}
TEXT = {"text_defaults": {**SAMPLING, "max_tokens": 2048, "seed": 52}}
IMAGE = {"image_defaults": {**SAMPLING, "seed": 52}}
OLD = {
    "thinker.max_num_seqs": 1,
    "thinker.max_num_batched_tokens": 32768,
    "thinker.enable_prefix_caching": False,
    "dit.max_num_seqs": 1,
    "dit.max_num_batched_tokens": 32768,
    **TEXT,
    **IMAGE,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bagel", {**OLD, "thinker.max_num_seqs": 3, "dit.enforce_eager": True, "connector": "shm"}),
        ("bagel_two_devices", {**OLD, "thinker.max_num_seqs": 3, "dit.enforce_eager": True, "connector": "shm"}),
        (
            "bagel_single_stage",
            {
                "pipeline": "bagel_single_stage",
                "thinker.max_num_batched_tokens": 32768,
                "thinker.enable_prefix_caching": False,
                "dit.max_num_seqs": 1,
                "thinker.enforce_eager": True,
                "dit.enforce_eager": True,
                "text_defaults": {"seed": 52},
                "image_defaults": {"seed": 52},
            },
        ),
        ("stage_configs_bagel", {**OLD, "connector": "shm", "thinker.enforce_eager": True, "dit.enforce_eager": True}),
        (
            "stage_configs_bagel_multiconnector",
            {
                **OLD,
                "thinker.enforce_eager": True,
                "dit.enforce_eager": True,
                "connector": "mooncake_store",
                "mooncake_store.master": "10.90.67.86:50051",
                "mooncake_store.metadata_server": "http://10.90.67.86:8080/metadata",
                "mooncake_store.segment": 512000000,
                "mooncake_store.localbuf": 64000000,
            },
        ),
    ],
)
def test_vllm_omnis_files_load_as_they_are(name: str, expected: dict[str, Any]) -> None:
    found = deploy_yaml.resolve(SEEDS / f"{name}.yaml", "checkpoint", platform=lambda: "cpu")
    assert changes(found.config) == expected


def test_on_a_gpu_they_size_the_pool_and_share_it_by_cuda_ipc() -> None:
    found = deploy_yaml.resolve(SEEDS / "bagel.yaml", "checkpoint", platform=lambda: "cuda").config
    assert (found.device, found.connector, found.thinker.gpu_memory_utilization) == ("cuda:0", "auto", 0.45)


def test_between_two_servers_its_shared_memory_is_no_choice() -> None:
    found = deploy_yaml.resolve(SEEDS / "bagel.yaml", "checkpoint", Flags(stage_id=0), lambda: "cpu")
    assert found.config.connector == "auto"
    assert any("is for stages of one server; with --stage-id the connector is chosen" in note for note in found.notes)


def test_its_other_connector_is_used_as_it_is(tmp_path: Path) -> None:
    """The guide binds both stages to ``rdma_connector``."""
    text = (SEEDS / "bagel.yaml").read_text()
    text = text.replace("from_stage_0: shared_memory_connector", "from_stage_0: rdma_connector")
    config = read(tmp_path, text.replace('"rdma"', '"tcp"')).config
    assert (config.connector, config.mooncake.protocol, config.mooncake.host) == ("mooncake", "tcp", "127.0.0.1")


def test_the_older_form_of_a_single_stage_selects_its_pipeline(tmp_path: Path) -> None:
    stage = "{stage_id: 0, stage_type: diffusion, engine_args: {model_stage: dit}, runtime: {max_batch_size: 2}}"
    config = read(tmp_path, f"stage_args: [{stage}]").config
    assert (config.pipeline, config.dit.max_num_seqs) == ("bagel_single_stage", 2)


def test_an_error_of_the_older_form_names_what_was_written(tmp_path: Path) -> None:
    text = (
        "stage_args:\n- stage_id: 1\n  runtime:\n    max_batch_size: 0\n  engine_args:\n    tensor_parallel_size: 0\n"
    )
    assert [line.partition(" is not ")[0] for line in refusal(tmp_path, text)] == [
        "deploy.yaml:4: stage_args[stage_id=1].runtime.max_batch_size=0",
        "deploy.yaml:6: stage_args[stage_id=1].engine_args.tensor_parallel_size=0",
    ]
