"""Two servers of stage 1 behind one of stage 0: shared load, one that dies in mid-load, one that is drained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from bagel_triton.serving import machine
from tests.serving.test_cases import assert_recorded
from tests.serving.test_metrics import scrape
from tests.support.cases import load_cases
from tests.support.connectors import require_mooncake
from tests.support.killing import Load, arguments, descendants, until
from tests.support.serving import Server, chat_body, reply_images

pytestmark = pytest.mark.long
CASE = next(case for case in load_cases(Path(__file__).parents[1] / "data" / "cases-a") if case.name == "t2i_think")
HOSTS = ("127.0.0.2", "127.0.0.3")
STATE_S, START_S, CLIENT_S = 15.0, 120.0, 300.0


@dataclass
class Servers:
    """Stage 0, and the latest server of stage 1 at each host."""

    checkpoint: Path
    port: int
    running: ExitStack
    stage_1: dict[str, Server] = field(default_factory=dict)

    def start(self) -> None:
        with ThreadPoolExecutor(1) as other:  # in whatever order they come up
            local = other.submit(self._serve, "--stage-id", "0", "--shutdown-timeout", "20")
            for host in HOSTS:
                self.start_stage_1(host)
            self.local = local.result()

    def start_stage_1(self, host: str) -> None:
        self.stage_1[host] = self._serve("--stage-id", "1", "--headless", "--host-address", host)

    def _serve(self, *options: str) -> Server:
        master = ("-oma", "127.0.0.1", "-omp", str(self.port), "--device", "cpu", "--dtype", "float32")
        return self.running.enter_context(Server(self.checkpoint, *master, *options))

    def states(self) -> dict[str, str]:
        """Of each server that is in, as ``/health/ready`` has it, by host."""
        answer = httpx.get(f"{self.local.url}/health/ready", trust_env=False, timeout=30).json()
        return {address.partition(":")[0]: state for address, state in answer.get("replicas", {}).items()}

    def images_made(self) -> dict[str, float]:
        return {host: server.gauge("bagel_images_total") for host, server in self.stage_1.items()}


@pytest.fixture(scope="module")
def servers(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    require_mooncake()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("replicas")))
        served = Servers(checkpoint_dir, machine.free_port("127.0.0.1", 0), running)
        served.start()
        until(lambda: served.states() == dict.fromkeys(HOSTS, "ready"), "both are not in", STATE_S)
        yield served
        for server in (served.local, *served.stage_1.values()):
            assert server.stop() == 0


def _bodies(count: int) -> list[dict[str, Any]]:
    return [chat_body(CASE.request)] * count


def _check_all(load: Load, count: int) -> None:
    """Each request was answered, and as it is recorded."""
    ended = list(load)
    assert [one.status for one in ended] == [200] * count
    for one in ended:
        (pixels,) = reply_images(one.reply)
        assert_recorded(pixels, CASE)


def test_the_load_is_shared(servers: Servers) -> None:
    before = servers.images_made()
    _check_all(Load(servers.local, _bodies(12), CLIENT_S), 12)
    made = {host: count - before[host] for host, count in servers.images_made().items()}
    assert sum(made.values()) == 12
    assert min(made.values()) >= 3


def test_a_server_that_is_killed_in_mid_load_loses_no_request_and_is_taken_back(servers: Servers) -> None:
    lost, kept = HOSTS
    retries = scrape(servers.local)["bagel_stage_retries_total"]
    load = Load(servers.local, _bodies(16), CLIENT_S)
    until(lambda: servers.stage_1[lost].gauge("bagel_dit_active") >= 1, "nothing is denoised there", STATE_S)
    family = descendants(servers.stage_1[lost].process.pid)
    servers.stage_1[lost].process.kill()
    _check_all(load, 16)
    assert scrape(servers.local)["bagel_stage_retries_total"] > retries
    assert servers.states() == {lost: "down", kept: "ready"}
    assert httpx.get(f"{servers.local.url}/health/ready", trust_env=False, timeout=30).status_code == 200
    servers.stage_1[lost].process.wait(STATE_S)
    until(lambda: not any(map(arguments, family)), "a process is left", STATE_S)
    servers.start_stage_1(lost)
    until(lambda: servers.states() == dict.fromkeys(HOSTS, "ready"), "it is not taken back", STATE_S)
    test_the_load_is_shared(servers)


def test_a_server_that_is_drained_finishes_its_work_and_gets_no_more(servers: Servers) -> None:
    drained, kept = HOSTS
    load = Load(servers.local, _bodies(24), CLIENT_S)
    until(lambda: servers.stage_1[drained].gauge("bagel_dit_active") >= 1, "nothing is denoised there", STATE_S)
    command = [Path(sys.executable).with_name("bagel-triton"), "drain", servers.stage_1[drained].grpc]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_S, check=True)
    assert done.stdout.splitlines()[-1] == f"{servers.stage_1[drained].grpc} is idle"
    _check_all(load, 24)
    assert servers.states() == {drained: "draining", kept: "ready"}
    before = servers.images_made()
    _check_all(Load(servers.local, _bodies(4), CLIENT_S), 4)
    assert servers.images_made() == {drained: before[drained], kept: before[kept] + 4}
    subprocess.run([*command, "--resume"], timeout=CLIENT_S, check=True)
    until(lambda: servers.states()[drained] == "ready", "it is not back", STATE_S)


def test_a_server_that_is_stopped_finishes_its_work_first(servers: Servers) -> None:
    host = HOSTS[1]
    load = Load(servers.local, _bodies(24), CLIENT_S)
    until(lambda: servers.stage_1[host].gauge("bagel_dit_active") >= 1, "nothing is denoised there", STATE_S)
    servers.stage_1[host].stop(STATE_S)
    _check_all(load, 24)
    until(lambda: servers.states()[host] == "down", "it looks as if it were there", STATE_S)
    servers.start_stage_1(host)
    until(lambda: servers.states()[host] == "ready", "it is not back", STATE_S)
