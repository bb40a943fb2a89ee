"""One stage a host, as a user serves it: two ``bagel-triton serve`` at two addresses of this machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from bagel_triton.serving import machine
from tests.serving.test_cases import assert_recorded
from tests.serving.test_leaving import LONG, connection
from tests.serving.test_leaving import until as until_gauge
from tests.serving.test_metrics import scrape, told
from tests.support.cases import load_cases
from tests.support.connectors import require_mooncake
from tests.support.killing import Load, arguments, descendants, health, kill, until
from tests.support.serving import Server, chat_body, reply_images

REMOTE = "127.0.0.2"
CASES = {case.name: case for case in load_cases(Path(__file__).parents[1] / "data" / "cases-a")}
DEPLOY = """
device: cpu
dtype: float32
stages:
  - {stage_id: 1, address: "ADDRESS"}
connectors:
  between_hosts: {name: MooncakeTransferEngineConnector}
"""
# A request that is lost there is noticed within FAIL_S; RELOAD_S is for a slow machine.
FAIL_S, RELOAD_S, CLIENT_S = 15.0, 120.0, 120.0


@dataclass
class Hosts:
    """The server of stage 0, and what starts that of stage 1; ``remote`` is the latest of those.

    All end with ``running``, whatever became of the others.
    """

    checkpoint: Path
    deploy: Path
    running: ExitStack

    def __post_init__(self) -> None:
        with ThreadPoolExecutor(1) as other:  # in whatever order they come up
            local = other.submit(self._start, "0")
            self.start_remote()
            self.local = local.result()

    def start_remote(self) -> None:
        self.remote = self._start("1", "--headless")

    def _start(self, stage: str, *options: str) -> Server:
        server = Server(self.checkpoint, "--deploy-config", str(self.deploy), "--stage-id", stage, *options)
        return self.running.enter_context(server)


@pytest.fixture(scope="module")
def hosts(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require_mooncake()
    folder = tmp_path_factory.mktemp("hosts")
    deploy = folder / "deploy.yaml"
    port = machine.choose_ports({"--grpc": 0}, {"--grpc": REMOTE})["--grpc"]
    deploy.write_text(DEPLOY.replace("ADDRESS", f"{REMOTE}:{port}"))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        patch.setenv("TMPDIR", str(folder))  # a server that is killed leaves its folder there
        served = Hosts(checkpoint_dir, deploy, running)
        yield served
        assert served.local.stop() == 0
        assert served.remote.stop() == 0


def test_each_server_says_what_it_serves(hosts: Hosts) -> None:
    local, remote = "".join(hosts.local.output), "".join(hosts.remote.output)
    assert f"0: cfg_expand, thinker, bagel, bagel_infer, dit at {hosts.remote.grpc}, vae_decode at" in local
    assert "self-test: mooncake carried a pattern from thinker to dit" in local
    assert "1: dit, vae_decode" in remote
    assert f"READY {hosts.remote.grpc}\n" in remote
    assert hosts.remote.grpc.startswith(f"{REMOTE}:")


@pytest.mark.parametrize("name", ["t2i_default", "t2i_think", "edit_wide"])
def test_recorded_cases_agree(hosts: Hosts, name: str) -> None:
    case = CASES[name]
    response = hosts.local.chat(chat_body(case.request))
    assert response.status_code == 200, response.text
    (pixels,) = reply_images(response.json())
    assert_recorded(pixels, case)
    assert response.json()["choices"][0]["message"].get("reasoning_content") == case.text


@pytest.mark.long
def test_edits_after_silence_are_answered(hosts: Hosts) -> None:
    """Of Mooncake's engine it is known that the first transfer after some seconds of silence can fail."""
    case = CASES["edit_wide"]
    for silence_s in (0, 8, 30, 100):
        time.sleep(silence_s)
        response = hosts.local.chat(chat_body(case.request))
        assert response.status_code == 200, f"after {silence_s} s: {response.text}"
        assert_recorded(reply_images(response.json())[0], case)


def test_a_client_that_leaves_stops_the_work_there(hosts: Hosts) -> None:
    with connection(hosts.local, LONG):
        until_gauge(hosts.remote, "bagel_dit_active", 1)
    until_gauge(hosts.remote, "bagel_dit_active", 0)
    assert hosts.remote.gauge("bagel_dit_cancelled_total") >= 1


def test_a_stage_process_that_is_killed_there_fails_its_requests_and_comes_back(hosts: Hosts) -> None:
    restarts = ('bagel_stage_reloads_total{stage="dit"}', "bagel_server_restarts_total")
    before = sum(scrape(hosts.remote)[name] for name in restarts)

    def counted() -> bool:
        found = scrape(hosts.remote)
        return sum(found.get(name, 0.0) for name in restarts) == before + 1

    load = Load(hosts.local, [LONG], CLIENT_S)
    until_gauge(hosts.remote, "bagel_dit_active", 1)
    kill(hosts.remote, "dit")
    _check_refused(load)
    _check_back(hosts)
    # Of what it holds at that moment, a lock may bring down tritonserver itself, which is then started again.
    until(counted, "it is not counted", FAIL_S)


@pytest.mark.long
def test_reloads_there_are_counted_there_and_each_once(hosts: Hosts) -> None:
    counts = {f'bagel_stage_reloads_total{{stage="{stage}"}}': stage for stage in ("dit", "vae_decode")}
    before = scrape(hosts.remote)
    for stage in ("vae_decode", "dit", "dit"):
        kill(hosts.remote, stage)
        until(lambda: health(hosts.local) == 503, "a dead stage looks healthy", FAIL_S)
        until(lambda: health(hosts.local) == 200, "the stage is not back", RELOAD_S)
    added = {"vae_decode": 1, "dit": 2}
    told(hosts.remote, {name: before[name] + added[stage] for name, stage in counts.items()})


@pytest.mark.long
def test_a_server_that_falls_silent_fails_its_requests_too(hosts: Hosts) -> None:
    load = Load(hosts.local, [LONG], CLIENT_S)
    until_gauge(hosts.remote, "bagel_dit_active", 1)
    [triton] = [pid for pid in descendants(hosts.remote.process.pid) if "--model-control-mode" in arguments(pid)]
    os.kill(triton, signal.SIGSTOP)  # as a host that is cut off, it closes no connection
    try:
        later = Load(hosts.local, [chat_body(CASES["t2i_default"].request)], CLIENT_S)
        assert health(hosts.local) == 503
        _check_refused(load)
        _check_refused(later)
    finally:
        os.kill(triton, signal.SIGCONT)
    _check_back(hosts)


def test_a_server_that_is_gone_fails_its_requests_and_comes_back(hosts: Hosts) -> None:
    load = Load(hosts.local, [LONG], CLIENT_S)
    until_gauge(hosts.remote, "bagel_dit_active", 1)
    family = descendants(hosts.remote.process.pid)
    hosts.remote.process.kill()
    _check_refused(load)
    hosts.remote.process.wait(CLIENT_S)
    until(lambda: not any(map(arguments, family)), "a process is left", CLIENT_S)
    assert health(hosts.local) == 503
    _check_refused(Load(hosts.local, [chat_body(CASES["t2i_default"].request)], CLIENT_S))
    hosts.start_remote()
    _check_back(hosts)


def _check_refused(load: Load) -> None:
    at = time.monotonic()
    for ended in load:
        assert ended.status == 503, ended.reply
        assert ended.at - at < FAIL_S


def _check_back(hosts: Hosts) -> None:
    until(lambda: health(hosts.local) == 200, "the stage is not back", RELOAD_S)
    case = CASES["t2i_default"]
    assert_recorded(hosts.local.images(chat_body(case.request))[0], case)
