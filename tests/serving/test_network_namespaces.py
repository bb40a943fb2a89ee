"""Three hosts with network devices of their own: a DiT's is cut off in mid-load, and comes back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.serving.test_cases import assert_recorded
from tests.support.cases import load_cases
from tests.support.connectors import require_mooncake
from tests.support.killing import Load, until
from tests.support.namespaces import Host, hosts
from tests.support.serving import Server, chat_body, reply_images

pytestmark = pytest.mark.long
CASE = next(case for case in load_cases(Path(__file__).parents[1] / "data" / "cases-a") if case.name == "t2i_default")
STATE_S, CLIENT_S = 40.0, 300.0


@pytest.fixture
def network() -> Iterator[list[Host]]:
    require_mooncake()
    with hosts(["thinker", "dit_a", "dit_b"]) as made:
        yield made


def test_a_host_that_is_cut_off_in_mid_load_loses_no_request_and_is_taken_back(
    network: list[Host], checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    thinker, *dits = network
    common = ("-oma", thinker.address, "-omp", "8092", "--device", "cpu", "--dtype", "float32")

    def serve(host: Host, *options: str) -> Server:
        return Server(checkpoint_dir, *common, *options, prefix=host.prefix)

    with ExitStack() as running, ThreadPoolExecutor(3) as starting:
        others = ["--stage-id", "1", "--headless", "--triton-metrics-host"]
        started = [starting.submit(serve, host, *others, host.address) for host in dits]
        for one in started:
            running.callback(lambda one=one: one.result().stop())
        local = running.enter_context(serve(thinker, "--stage-id", "0", "--host", thinker.address))
        stage_1 = {host: one.result() for host, one in zip(dits, started, strict=True)}

        def states() -> set[str]:
            answer = httpx.get(f"{local.url}/health", trust_env=False, timeout=30).json()
            return set(answer.get("replicas", {}).values())

        def given_requests() -> int:
            """How many servers get requests: what a check found, which is later than what /health finds."""
            page = httpx.get(f"{local.url}/metrics", trust_env=False, timeout=30).text
            return len(re.findall(r"^bagel_replica_ready{.*} 1(?:\.0)?$", page, re.MULTILINE))

        until(lambda: states() == {"ready"} and given_requests() == 2, "both are not in", STATE_S)
        load = Load(local, [chat_body(CASE.request)] * 16, CLIENT_S)
        lost = dits[0]
        until(lambda: stage_1[lost].gauge("bagel_dit_active") >= 1, "nothing is denoised there", STATE_S)
        lost.connect(False)
        try:
            ended = list(load)
            assert [one.status for one in ended] == [200] * 16, [one.reply for one in ended if one.status != 200]
            for one in ended:
                assert_recorded(reply_images(one.reply)[0], CASE)
            assert states() == {"ready", "down"}
        finally:
            lost.connect(True)
        until(lambda: states() == {"ready"} and given_requests() == 2, "it is not taken back", STATE_S)
        made = stage_1[lost].gauge("bagel_images_total")
        again = list(Load(local, [chat_body(CASE.request)] * 8, CLIENT_S))
        assert [one.status for one in again] == [200] * 8
        assert stage_1[lost].gauge("bagel_images_total") > made
