"""What can be checked of the image and the compose file without an engine to build or run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from bagel_triton.serving.cli import build_parser
from tests.support.dockerfile import instructions

ROOT = Path(__file__).parents[2]
PROFILES = {"cpu": {"triton", "proxy"}, "single": {"single"}, "two-hosts": {"stage0", "stage1"}}
WATCHERS = {"prometheus", "grafana"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def commands(compose: dict[str, Any]) -> dict[str, list[str]]:
    """The ``bagel-triton`` command lines, by service."""
    given = {name: service.get("command", []) for name, service in compose["services"].items()}
    return {name: command[1:] for name, command in given.items() if command[:1] == ["bagel-triton"]}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_starts_the_server_and_what_watches_it(compose: dict[str, Any], profile: str) -> None:
    started = {name for name, service in compose["services"].items() if profile in service["profiles"]}
    assert started == PROFILES[profile] | WATCHERS


def test_every_service_starts_with_options_that_there_are(compose: dict[str, Any]) -> None:
    for name, command in commands(compose).items():
        parser, _ = build_parser(command)
        parsed = parser.parse_args([re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in command])
        assert "healthcheck" in compose["services"][name]
        deploy = getattr(parsed, "deploy_config", None)
        if deploy and deploy.startswith("/opt/containers/"):
            assert (ROOT / "build/containers" / Path(deploy).name).is_file(), name


def test_what_is_mounted_and_copied_is_there(compose: dict[str, Any]) -> None:
    mounts = [mount for service in compose["services"].values() for mount in service["volumes"]]
    for mount in mounts:
        source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", mount).partition(":")[0]
        assert (ROOT / source).exists(), mount
    for name, arguments in instructions(ROOT / "build" / "Dockerfile"):
        if name == "COPY":
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists(), source


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_prometheus_scrapes_each_api_and_grafana_reads_it(compose: dict[str, Any]) -> None:
    folder = ROOT / "build" / "containers"
    scraped = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for config in scraped for group in config["static_configs"] for target in group["targets"]}
    ports = {name: 8002 if "--headless" in command else 8091 for name, command in commands(compose).items()}
    assert targets == {f"{name}:{port}" for name, port in ports.items()}
    assert {"--triton-metrics-host=0.0.0.0", "--triton-metrics-port=8002"} <= set(commands(compose)["stage1"])
    [source] = yaml.safe_load((folder / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((folder / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert any(provider["options"]["path"] in mount for mount in compose["services"]["grafana"]["volumes"])


def test_the_two_hosts_are_the_preset_between_two_services(compose: dict[str, Any]) -> None:
    ours, preset = (
        yaml.safe_load((ROOT / "build" / name).read_text())
        for name in ("containers/two_hosts.yaml", "deploy/bagel_two_hosts.yaml")
    )
    host, _, _ = ours["stages"][1].pop("address").partition(":")
    assert compose["services"][host]["hostname"] == host
    del preset["stages"][1]["address"]
    assert ours == preset


def test_hadolint_has_no_objections() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not here: install the extra bagel-triton[charts]")
    found = subprocess.run([program, ROOT / "build" / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_has_what_stages_on_two_hosts_need(compose: dict[str, Any]) -> None:
    [default] = [text for name, text in instructions(ROOT / "build" / "Dockerfile") if text.startswith("EXTRAS=")]
    assert default == f"EXTRAS={compose['x-image']['build']['args']['EXTRAS'].partition(':-')[2].rstrip('}')}"
    assert "mooncake" in default


def test_the_images_requirements_are_the_projects_without_a_second_tritonserver(tmp_path: Path) -> None:
    [run] = [text for name, text in instructions(ROOT / "build" / "Dockerfile") if name == "RUN" and "tomllib" in text]
    script = run.partition(" && ")[0]
    for file in ("pyproject.toml", "build/constraints.txt"):
        (tmp_path / Path(file).name).write_text((ROOT / file).read_text())
    environment = {**os.environ, "EXTRAS": "tracing,mooncake"}
    subprocess.run(["sh", "-euc", script], cwd=tmp_path, env=environment, check=True)
    needed = (tmp_path / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert needed == [*project["dependencies"], *extras["tracing"], *extras["mooncake"]]
    assert not any("pytriton" in need for need in needed)
