"""The thinker and the DiT in two tritonservers at two addresses: contexts travel by Mooncake."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from bagel_triton.deploy.config import DeployConfig, MooncakeConfig, MooncakeStoreConfig
from bagel_triton.protocol.messages import MooncakeAddress, ThinkerOutput, decode, decode_handle, encode
from bagel_triton.protocol.request import REQUEST_FIELDS
from bagel_triton.protocol.tensors import to_tensors
from tests.support.cases import Case, load_cases
from tests.support.connectors import mooncake_master, require_mooncake
from tests.support.serving import infer
from tests.support.triton_host import TritonHost, triton_host

pytestmark = pytest.mark.long  # test_stage_hosts.py has the same from end to end, with fewer cases
CASES = load_cases(Path(__file__).parents[1] / "data" / "cases-a")
HOSTS = ("127.0.0.1", "127.0.0.2")
# The store carries the same KV, so a few cases do; BAGEL_TRITON_ALL_CASES=1 runs all.
SOME = [case for case in CASES if case.name in ("t2i_think", "edit_alpha_two_pictures")]
OF_THE_STORE = CASES if os.environ.get("BAGEL_TRITON_ALL_CASES") else SOME
Hosts = tuple[TritonHost, TritonHost]


@pytest.fixture(scope="module")
def hosts(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require_mooncake()
    with _servers("mooncake", checkpoint_dir, tmp_path_factory.mktemp("hosts")) as servers:
        yield servers


@pytest.fixture(scope="module")
def hosts_of_a_store(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    directory = tmp_path_factory.mktemp("store")
    with (
        mooncake_master(directory / "master.log") as master,
        _servers("mooncake_store", checkpoint_dir, directory, master) as servers,
    ):
        yield servers


@contextlib.contextmanager
def _servers(connector: str, checkpoint: Path, directory: Path, master: str = "") -> Iterator[Hosts]:
    with contextlib.ExitStack() as running:
        yield tuple(  # type: ignore[misc]
            running.enter_context(
                triton_host(_config(checkpoint, connector, host, master), models, directory / host, host)
            )
            for host, models in zip(HOSTS, (("cfg_expand", "thinker"), ("dit", "vae_decode")), strict=True)
        )


def _config(checkpoint: Path, connector: str, host: str, master: str) -> DeployConfig:
    return DeployConfig(
        str(checkpoint),
        device="cpu",
        dtype="float32",
        connector=connector,  # type: ignore[arg-type]
        mooncake=MooncakeConfig(host),
        mooncake_store=MooncakeStoreConfig(host, master=master),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_recorded_case_agrees(hosts: Hosts, case: Case) -> None:
    _check(case, hosts, "mooncake")


@pytest.mark.parametrize("case", OF_THE_STORE, ids=lambda case: case.name)
def test_recorded_cases_agree_by_way_of_a_store(hosts_of_a_store: Hosts, case: Case) -> None:
    _check(case, hosts_of_a_store, "mooncake_store")


def _check(case: Case, hosts: Hosts, connector: str) -> None:
    thinker, dit = (host.grpc for host in hosts)
    types = {name: spec.datatype for name, spec in REQUEST_FIELDS.items()}
    plan = infer(thinker, "cfg_expand", to_tensors(case.request), types).last("plan")
    output = decode(
        infer(thinker, "thinker", {"plan": plan}, {"plan": "BYTES"}).last("thinker_output")[0], ThinkerOutput
    )
    texts = [answer.reasoning or answer.content for answer in output.answers]
    assert texts == ([] if case.text is None else [case.text])
    if not case.height:
        return
    assert output.job is not None
    assert {handle.connector for handle in output.job.handles} == {connector}
    job = np.array([encode(output.job)], dtype=np.object_)
    flow = infer(dit, "dit", {"denoise_job": job}, {"denoise_job": "BYTES"})
    latents = {"latents": flow.last("latents"), "latent_grid": flow.last("latent_grid")}
    pixels = infer(dit, "vae_decode", latents, {"latents": "FP32", "latent_grid": "INT32"}).last("generated_image")
    difference = np.abs(pixels.astype(int) - case.image().numpy())
    assert difference.max() <= 2
    assert (difference == 0).mean() >= 0.99


def test_the_selftest_passes_from_host_to_host(hosts: Hosts) -> None:
    thinker, dit = hosts
    lent = _selftest(thinker, "thinker", "lend")
    address = decode_handle(lent.encode()).address
    assert isinstance(address, MooncakeAddress)
    assert address.peer.startswith(f"{HOSTS[0]}:")
    assert _selftest(dit, "dit", lent) == "mooncake"


def test_an_unknown_lease_is_a_clear_error_and_the_next_request_is_served(hosts: Hosts) -> None:
    thinker, dit = hosts
    lent = _selftest(thinker, "thinker", "lend")
    strange = re.sub(rf"{HOSTS[0]}:\d+", f"{HOSTS[0]}:9", lent)
    answer = httpx.post(f"{dit.url}/v2/models/dit/generate", json={"selftest": strange}, trust_env=False, timeout=30)
    assert "cannot be read: its stage has ended or is out of reach" in answer.json()["error"]
    assert _selftest(dit, "dit", _selftest(thinker, "thinker", "lend")) == "mooncake"


def _selftest(host: TritonHost, model: str, text: str) -> str:
    answer = httpx.post(f"{host.url}/v2/models/{model}/generate", json={"selftest": text}, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["selftest"])
