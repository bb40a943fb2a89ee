"""The thinker and the DiT in two tritonservers at two addresses: contexts travel by mooncake."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from bagel_triton.deploy.config import DeployConfig, MooncakeConfig
from bagel_triton.messages import MooncakeAddress, Thoughts, decode, decode_handle, encode
from bagel_triton.request import REQUEST_TENSORS, to_tensors
from tests.support.cases import Case, load_cases
from tests.support.connectors import require_mooncake
from tests.support.serving import infer
from tests.support.triton_host import TritonHost, triton_host

CASES = load_cases(Path(__file__).parents[1] / "data" / "cases-a")
HOSTS = ("127.0.0.1", "127.0.0.2")
Hosts = tuple[TritonHost, TritonHost]


@pytest.fixture(scope="module")
def hosts(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require_mooncake()
    directory = tmp_path_factory.mktemp("hosts")
    with contextlib.ExitStack() as running:
        yield tuple(  # type: ignore[misc]
            running.enter_context(triton_host(_config(checkpoint_dir, host), models, directory / host, host))
            for host, models in zip(HOSTS, (("cfg_expand", "thinker"), ("dit", "vae_decode")), strict=True)
        )


def _config(checkpoint: Path, host: str) -> DeployConfig:
    return DeployConfig(
        str(checkpoint), device="cpu", dtype="float32", connector="mooncake", mooncake=MooncakeConfig(host)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_recorded_case_agrees(hosts: Hosts, case: Case) -> None:
    thinker, dit = (host.grpc for host in hosts)
    types = {name: spec.datatype for name, spec in REQUEST_TENSORS.items()}
    plan = infer(thinker, "cfg_expand", to_tensors(case.request), types).last("plan")
    thoughts = decode(infer(thinker, "thinker", {"plan": plan}, {"plan": "BYTES"}).last("thoughts")[0], Thoughts)
    texts = [answer.reasoning or answer.content for answer in thoughts.answers]
    assert texts == ([] if case.text is None else [case.text])
    if not case.height:
        return
    assert thoughts.job is not None
    addresses = [handle.address for handle in thoughts.job.handles if handle.lease]
    assert all(isinstance(address, MooncakeAddress) for address in addresses)
    contexts = np.array([encode(thoughts.job)], dtype=np.object_)
    flow = infer(dit, "dit", {"contexts": contexts}, {"contexts": "BYTES"})
    latents = {"latents": flow.last("latents"), "latent_grid": flow.last("latent_grid")}
    pixels = infer(dit, "vae_decode", latents, {"latents": "FP32", "latent_grid": "INT32"}).last("generated_image")
    difference = np.abs(pixels.astype(int) - case.picture().numpy())
    assert difference.max() <= 2
    assert (difference == 0).mean() >= 0.99


def test_the_selftest_passes_from_host_to_host(hosts: Hosts) -> None:
    thinker, dit = hosts
    lent = _selftest(thinker, "thinker", "lend")
    address = decode_handle(lent.encode()).address
    assert isinstance(address, MooncakeAddress)
    assert address.peer.startswith(f"{HOSTS[0]}:")
    assert _selftest(dit, "dit", lent) == "mooncake"


def test_a_lease_of_nobody_is_a_clear_error_and_the_next_request_is_served(hosts: Hosts) -> None:
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
