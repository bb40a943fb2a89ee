"""One stage a host: which models a server has, where the others are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bagel_triton.deploy.config import ConfigError, DeployConfig, MooncakeConfig, read
from bagel_triton.deploy.hosts import on_this_host
from bagel_triton.deploy.yaml import load

FILE = Path(__file__).parents[2] / "build" / "deploy" / "bagel_two_hosts.yaml"
CONNECTORS = "connectors: {net: {name: mooncake}}"
TWO = f"stages: [{{stage_id: 1, address: '127.0.0.2:8001'}}]\n{CONNECTORS}"


def _load(tmp_path: Path, text: str) -> DeployConfig:
    path = tmp_path / "deploy.yaml"
    path.write_text(text)
    return load(path, "checkpoint")


def test_the_first_stages_server_calls_the_others_and_has_no_ensemble(tmp_path: Path) -> None:
    config = on_this_host(_load(tmp_path, TWO), 0)
    assert config.models == ("cfg_expand", "thinker", "bagel", "bagel_infer")
    assert (config.remote_models, config.remote_addresses) == (("dit", "vae_decode"), ("127.0.0.2:8001",))
    assert config.own_address is None
    config.write(tmp_path / "written.yaml")
    assert read(tmp_path / "written.yaml") == config


def test_another_stages_server_is_called_at_its_address(tmp_path: Path) -> None:
    config = on_this_host(_load(tmp_path, TWO), 1, headless=True)
    assert (config.models, config.remote_models) == (("dit", "vae_decode"), ())
    assert config.own_address == ("127.0.0.2", 8001)


def test_stage_1_may_have_several_servers(tmp_path: Path) -> None:
    three = TWO.replace("'127.0.0.2:8001'", "['192.0.2.1:8001', '127.0.0.2:8001', '192.0.2.3:8001']")
    config = _load(tmp_path, three)
    assert on_this_host(config, 0).remote_addresses == ("192.0.2.1:8001", "127.0.0.2:8001", "192.0.2.3:8001")
    assert on_this_host(config, 1, headless=True).own_address == ("127.0.0.2", 8001)  # the only one of this machine
    assert on_this_host(config, 1, "192.0.2.3", headless=True).own_address == ("192.0.2.3", 8001)
    with pytest.raises(ConfigError, match=r"of which 0 are at --host-address=192\.0\.2\.9; allowed: one"):
        on_this_host(config, 1, "192.0.2.9", headless=True)
    with pytest.raises(ConfigError, match=r"stages\[stage_id=1\].address\[1\]='x' is not allowed; allowed: HOST:PORT"):
        _load(tmp_path, TWO.replace("'127.0.0.2:8001'", "['127.0.0.2:8001', 'x']"))


def test_a_server_of_one_stage_is_on_that_stages_device(tmp_path: Path) -> None:
    config = msgspec.structs.replace(_load(tmp_path, TWO), device="cpu", dit_device="cuda:0")
    found = [on_this_host(config, stage, headless=stage > 0) for stage in (0, 1)]
    assert [(one.device, one.dit_device) for one in found] == [("cpu", None), ("cuda:0", None)]


def test_a_connector_that_is_left_to_the_server_reaches_the_other_host(tmp_path: Path) -> None:
    assert on_this_host(_load(tmp_path, TWO.partition("\n")[0]), 0).connector == "mooncake"


def test_the_deploy_file_to_start_from_serves_either_stage() -> None:
    config = load(FILE, "checkpoint")
    assert on_this_host(config, 0, "10.0.0.1").remote_addresses == ("10.0.0.2:8001",)
    assert on_this_host(config, 1, headless=True).mooncake.host == "10.0.0.2"


def test_without_addresses_one_server_has_all_models() -> None:
    config = on_this_host(DeployConfig("c"), None)
    assert config.models == config.topology.models
    assert (config.remote_models, config.own_address) == ((), None)


def _mooncake_host(config: DeployConfig, stage: int, address: str | None = None) -> str:
    return on_this_host(config, stage, address, headless=stage > 0).mooncake.host


def test_the_address_that_mooncake_announces(tmp_path: Path) -> None:
    config = _load(tmp_path, TWO)
    assert _mooncake_host(config, 1) == "127.0.0.2"
    assert _mooncake_host(config, 0) == "127.0.0.1"  # from where this host reaches 127.0.0.2
    both = _load(tmp_path, TWO.replace("[{", "[{stage_id: 0, address: '10.0.0.1:8001'}, {"))
    assert _mooncake_host(both, 0) == "10.0.0.1"
    own = _load(tmp_path, TWO.replace("{name: mooncake}", "{name: mooncake, extra: {host: 10.0.0.7}}"))
    assert own.mooncake == MooncakeConfig("10.0.0.7")
    assert _mooncake_host(own, 0) == "10.0.0.7"
    assert _mooncake_host(own, 0, "10.0.0.9") == "10.0.0.9"


def test_the_command_lines_host_address_is_where_the_stage_listens(tmp_path: Path) -> None:
    config = on_this_host(_load(tmp_path, TWO), 1, "10.0.0.9", headless=True)
    assert config.own_address == ("10.0.0.9", 8001)


@pytest.mark.parametrize(
    ("text", "stage", "headless", "message"),
    [
        (TWO, None, False, "stage 1 has address='127.0.0.2:8001': say which stage this host serves, by --stage-id"),
        (TWO, 1, False, "--stage-id=1 without --headless: stage 0 serves the OpenAI API; add --headless"),
        (TWO, 0, True, "--stage-id=0 with --headless: stage 0 serves the OpenAI API; remove --headless"),
        (TWO, 2, True, "--stage-id=2 is not allowed in pipeline bagel; allowed: 0, the thinker"),
        (CONNECTORS, 0, False, "--stage-id=0 needs the address of stage 1: .*bagel_two_hosts.yaml"),
        ("pipeline: bagel_single_stage", 0, False, "--stage-id=0 is not allowed .*; allowed: none, it is one process"),
        (TWO.replace("mooncake", "shm"), 0, False, "connector='shm' does not reach another server; .* mooncake or m"),
        (
            TWO.replace("127.0.0.2", "no.such.host.invalid"),
            0,
            False,
            "no.such.host.invalid is no host that is known",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, text: str, stage: int | None, headless: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        on_this_host(_load(tmp_path, text), stage, headless=headless)


def test_two_servers_cannot_have_one_address(tmp_path: Path) -> None:
    for text in (
        "stages: [{stage_id: 1, address: ['a:1', 'b:2', 'a:1']}]",
        "stages: [{stage_id: 0, address: 'a:1'}, {stage_id: 1, address: 'a:1'}]",
    ):
        with pytest.raises(ConfigError, match=r"address.*='a:1' is there already, as stages\[stage_id=[01]\].address"):
            _load(tmp_path, text)


def test_a_host_address_without_a_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--host-address=10\.0\.0\.9 has no meaning without --stage-id"):
        on_this_host(DeployConfig("c"), None, "10.0.0.9")


@pytest.mark.parametrize("address", ["10.0.0.2", "10.0.0.2:", ":8001", "10.0.0.2:port", "10.0.0.2:70000", "::1:8001"])
def test_what_is_no_address_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\[stage_id=1\].address='.*' is not allowed; allowed: HOST:PORT"):
        _load(tmp_path, TWO.replace("127.0.0.2:8001", address))


def test_a_pipeline_of_one_process_has_no_other_address(tmp_path: Path) -> None:
    text = "pipeline: bagel_single_stage\nstages: [{stage_id: 0, address: '10.0.0.1:8001'}]"
    with pytest.raises(ConfigError, match="pipeline bagel_single_stage is one process"):
        _load(tmp_path, text)
