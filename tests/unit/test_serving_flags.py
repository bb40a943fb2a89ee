"""Flags of ``serve`` that override the deploy file, and those of vLLM that are taken or refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError
from bagel_triton.deploy.yaml import Deployment
from bagel_triton.serving import CommandError, flags, serve

FILE = """
pipeline: {pipeline}
stages: [{{stage_id: 0, max_num_seqs: 5, kv_tokens: 200}}]
"""


class Refused(Exception):
    pass


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False)
    serve.add_arguments(parser)
    return parser.parse_args(["checkpoint", *arguments])


def resolve(folder: Path, *arguments: str, pipeline: str = "bagel") -> Deployment:
    path = folder / "deploy.yaml"
    path.write_text(FILE.format(pipeline=pipeline))
    return deploy_yaml.resolve(path, "checkpoint", flags.flags_of(parse(arguments)), lambda: "cuda")


def test_a_flag_is_for_every_stage_that_has_the_field(tmp_path: Path) -> None:
    flags = ("--max-num-seqs=2", "--max-model-len=50000", "--no-vae-use-tiling", "--gpu-memory-utilization=0.3")
    found = resolve(tmp_path, *flags)
    config = found.config
    assert (config.thinker.max_num_seqs, config.dit.max_num_seqs) == (2, 2)
    assert (config.thinker.kv_tokens, config.vae_decode.use_tiling) == (50048, False)
    assert (config.thinker.gpu_memory_utilization, config.dit.gpu_memory_utilization) == (0.3, 0.3)
    assert str(found.origins["dit.max_num_seqs"]) == "--max-num-seqs"


def test_graphs_are_switched_off_for_both_stages(tmp_path: Path) -> None:
    for arguments, off in ((("--enforce-eager",), True), ((), False)):
        config = resolve(tmp_path, *arguments).config
        assert (config.thinker.enforce_eager, config.dit.enforce_eager) == (off, off)


def test_with_a_stage_id_a_flag_is_for_that_stage(tmp_path: Path) -> None:
    config = resolve(tmp_path, "--stage-id", "1", "--headless", "--max-num-seqs", "2").config
    assert (config.thinker.max_num_seqs, config.dit.max_num_seqs) == (5, 2)


def test_a_single_stage_takes_the_fields_of_both(tmp_path: Path) -> None:
    arguments = ("--max-num-seqs", "2", "--kv-tokens", "300", "--vae-use-tiling", "--no-enable-prefix-caching")
    config = resolve(tmp_path, *arguments, pipeline="bagel_single_stage").config
    assert (config.dit.max_num_seqs, config.thinker.kv_tokens) == (2, 300)
    assert (config.vae_decode.use_tiling, config.thinker.enable_prefix_caching) == (True, False)


def test_overrides_by_stage_come_before_the_other_flags(tmp_path: Path) -> None:
    overrides = '{"1": {"max_num_seqs": 4}, "0": {"default_sampling_params": {"seed": 1}}}'
    found = resolve(tmp_path, "--max-num-seqs", "2", "--stage-overrides", overrides)
    assert (found.config.thinker.max_num_seqs, found.config.dit.max_num_seqs) == (2, 4)
    assert found.config.text_defaults == {"seed": 1}
    assert str(found.origins["dit.max_num_seqs"]) == "--stage-overrides"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stage-id 1 --kv-tokens 77", "--kv-tokens=77 belongs to stage 0: give it to that server"),
        ("--stage-id 1 --max-model-len 77", "--max-model-len=77 belongs to stage 0"),
        ("--stage-id 0 --vae-use-tiling", "--vae-use-tiling=true belongs to stage 1"),
        (
            '--stage-id 1 --default-sampling-params {"seed":3}',
            "--default-sampling-params changes nothing at stage 1: give it",
        ),
        (
            '--stage-id 1 --default-sampling-params {"1":{"seed":3}}',
            "--default-sampling-params.1.default_sampling_params changes nothing at stage 1",
        ),
        (
            '--default-sampling-params {"0":{"num_inference_steps":3}}',
            "--default-sampling-params.0.default_sampling_params.num_inference_steps=3 is for an image: it belongs un",
        ),
        (
            '--default-sampling-params {"1":{"extra_args":{"max_tokens":3}}}',
            "--default-sampling-params.1.default_sampling_params.extra_args.max_tokens=3 is for the thinker: it belon",
        ),
    ],
)
def test_a_flag_of_another_stage_is_refused(tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, *options.split())
    (line,) = str(caught.value).splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ("--max-model-len 50", "--max-model-len=50 changes nothing: one request may use the whole KV cache pool"),
        (
            '--stage-id 0 --stage-overrides {"1":{"max_num_seqs":3}}',
            "--stage-overrides.1.max_num_seqs changes nothing here: this is the server of stage 0",
        ),
    ],
)
def test_a_flag_that_changes_nothing_has_a_note(tmp_path: Path, options: str, note: str) -> None:
    (found,) = resolve(tmp_path, *options.split()).notes
    assert found.startswith(note)


def test_the_server_of_stage_0_has_the_defaults_of_images(tmp_path: Path) -> None:
    config = resolve(tmp_path, "--stage-id", "0", "--default-sampling-params", '{"num_inference_steps": 9}').config
    assert config.image_defaults == {"num_inference_steps": 9}


def test_a_headless_server_refuses_a_place_for_its_api_and_notes_other_options_of_it() -> None:
    headless = ("--stage-id", "1", "--headless")
    for option in ("--port=9000", "--host=0.0.0.0"):
        with pytest.raises(CommandError, match=f"{option} with --headless: there is no OpenAI API; stage 1 listens on"):
            serve.options(parse([*headless, option]))
    given = serve.options(
        parse([*headless, "--served-model-name", "a", "--api-key=k", "--no-access-log", "--port=8091"])
    )
    assert sorted(given.unused) == ["--api-key", "--no-access-log", "--served-model-name"]
    assert serve.options(parse(["--port=9000"])).unused == ()


@pytest.mark.parametrize(
    "options", [("--deploy-config", "a", "--stage-configs-path"), ("--host-address", "a", "--omni-replica-address")]
)
def test_two_values_of_one_option_are_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(Refused, match=f"{options[2]}=b is a second value beside a: .* are one option; keep one"):
        parse([*options, "b"])
    parse([*options, "a"])


@pytest.mark.parametrize(
    ("given", "text", "image"),
    [
        ('{"seed": 3, "num_inference_steps": 9}', {"seed": 3}, {"seed": 3, "num_inference_steps": 9}),
        ('{"0": {"seed": 3}, "1": {"seed": 4}}', {"seed": 3}, {"seed": 4}),
    ],
)
def test_defaults_of_requests_by_a_flag(tmp_path: Path, given: str, text: object, image: object) -> None:
    config = resolve(tmp_path, "--default-sampling-params", given).config
    assert (config.text_defaults, config.image_defaults) == (text, image)


def test_device_and_dtype_come_before_the_stages(tmp_path: Path) -> None:
    config = resolve(
        tmp_path, "--device", "cpu", "--dtype", "bfloat16", "--stage-overrides", '{"0": {"devices": "1"}}'
    ).config
    assert (config.device, config.dtype) == ("cpu", "bfloat16")


@pytest.mark.parametrize(
    "flag",
    [
        "--omni",
        "--trust-remote-code",
        "--no-enforce-eager",
        "--vae-patch-parallel-size 1",
        "--usp 1",
        "--ring 1",
        "--hsdp-shard-size -1",
        "--ulysses-mode strict",
        "--worker-backend process",
        "--worker-backend multi_process",
        "--init-sleep-seconds 20",
        "--init-timeout 600",
        "--stage-init-timeout 300",
        "--batch-timeout 5",
        "--shm-threshold-bytes 65536",
        "--cache-backend none",
        "--step-execution",
        "--omni-lb-policy random",
        "--enable-chunked-prefill",
        "--async-scheduling",
        "--load-format auto",
        "--no-enable-sleep-mode",
        "--enable-sleep-mode",
        "--num-weight-load-threads 4",
        "--distributed-executor-backend mp",
    ],
)
def test_a_flag_without_an_effect_is_taken(tmp_path: Path, flag: str) -> None:
    assert resolve(tmp_path, *flag.split()).config == resolve(tmp_path).config


def test_ray_starts_the_ranks_where_there_are_any(tmp_path: Path) -> None:
    flags = ["--worker-backend", "ray", "--ray-address", "10.0.0.1:6379"]
    found = resolve(tmp_path, "-tp", "2", *flags)
    assert (found.config.worker_backend, found.config.ray_address) == ("ray", "10.0.0.1:6379")
    assert not [note for note in found.notes if "ray" in note]
    for given, why in ((flags, "every stage has one rank"), (["-tp", "2", *flags[2:]], "worker_backend is process")):
        [*_, last] = resolve(tmp_path, *given).notes
        assert last.startswith("--ray-address='10.0.0.1:6379' changes nothing: " + why)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("-tp 0", "--tensor-parallel-size=0 is not allowed; allowed: an integer from 1 to"),
        ("--ring 2", "--ring-degree=2 is not supported: it is not built; several"),
        ("--hsdp-shard-size -2", "--hsdp-shard-size=-2 is not allowed; allowed: an integer from 1 to"),
        (
            "--quantization gptq",
            "--quantization='gptq' is not allowed; allowed: auto, int8, int8_w8a8, fp8, fp8_w8a8, ",
        ),
        ("--worker-backend mpi", "--worker-backend='mpi' is not allowed; allowed: process, ray"),
        ("--ray-address ray://head:10001", "--ray-address='ray://head:10001' is not allowed; allowed: HOST:PORT of"),
        ("--enable-cpu-offload", "--enable-cpu-offload=true is not supported: every stage needs the transformer"),
        ("--cache-backend tea_cache", "--cache-backend='tea_cache' is not supported: ask for it in a request: `cache"),
        ("--omni-dp-size-local 2", "--omni-dp-size-local=2 is not supported: start each server of stage 1 by itself"),
        ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization=1.5 is not allowed; allowed: a number above 0, at"),
        ("--max-num-seqs 0", "--max-num-seqs=0 is not allowed; allowed: an integer from 1 to"),
        ("--max-num-seqs", "expected one argument"),
        ("--max-num-seqs=", "--max-num-seqs='' is not allowed"),
        ("--max-num-seqs={", "--max-num-seqs='{' is not allowed"),
        ("--init-sleep-seconds -1", "--init-sleep-seconds=-1 is not allowed; allowed: seconds >= 0"),
        ("--stage-overrides {", "--stage-overrides={ is not JSON: "),
        ("--stage-overrides []", "--stage-overrides=[] is not allowed; allowed: a JSON object"),
    ],
)
def test_a_flag_that_cannot_be_followed_says_what_to_do(flag: str, message: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(flag.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ('{"1": {"kv_tokens": 5}}', "--stage-overrides.1.kv_tokens belongs to the thinker; that is stage 0"),
        ('{"7": {}}', "--stage-overrides.7=7 is not allowed in pipeline bagel; allowed: 0 to 1"),
        ('{"²": {}}', "--stage-overrides.²='²' is not allowed; allowed: 0 or 1"),
        ('{"x": {}}', "--stage-overrides.x='x' is not allowed; allowed: 0 or 1"),
        ('{"0": 5}', "--stage-overrides.0=5 is not allowed; allowed: a mapping of fields"),
        ('{"0": {"max_num_seq": 5}}', "--stage-overrides.0.max_num_seq is not a known field; did you mean max_num_s"),
    ],
)
def test_an_error_in_overrides_names_the_flag_and_the_field(tmp_path: Path, flag: str, message: str) -> None:
    with pytest.raises(ValueError, match="--stage-overrides") as caught:
        resolve(tmp_path, "--stage-overrides", flag)
    assert str(caught.value).startswith(message)


def test_a_switch_does_not_take_the_checkpoint_for_its_value() -> None:
    parser = Parser()
    serve.add_arguments(parser)
    assert parser.parse_args(["--omni", "--vae-use-tiling", "checkpoint"]).checkpoint == "checkpoint"
