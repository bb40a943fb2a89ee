"""Which models are ready, as the proxy hears it from Triton, from other hosts and from the processes themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bagel_triton.deploy.topology import BAGEL
from bagel_triton.ipc import liveness
from bagel_triton.openai.settings import ProxySettings
from bagel_triton.triton.client import TritonClient
from tests.support.stage_process import PREFIX, AnnouncedProcess, announced_in
from tests.support.triton_service import TritonService, serving
from tests.support.waiting import soon

REMOTE = ("dit", "vae_decode")


def readiness(triton: TritonService, **settings: Any) -> dict[str, bool]:
    """What a proxy of these settings says before ``triton``."""

    async def ask(address: str) -> dict[str, bool]:
        client = TritonClient(ProxySettings(address, ("bagel",), **settings))
        try:
            return (await client.readiness()).models
        finally:
            await client.close()

    with serving(triton) as address:
        return asyncio.run(ask(address))


def triton_with(*ready: str, unloaded: tuple[str, ...] = ()) -> TritonService:
    service = TritonService()
    service.ready, service.unloaded = set(ready), set(unloaded)
    return service


def test_readiness_is_reported_by_model() -> None:
    states = readiness(triton_with("bagel", "dit"), models=BAGEL.models)
    assert states == {model: model in ("bagel", "dit") for model in BAGEL.models}


@pytest.mark.parametrize(
    ("ready", "unloaded", "expected"),
    [
        (("bagel",), (), {"bagel": True}),
        (("cfg_expand", "thinker", "bagel"), (), {"cfg_expand": True, "thinker": True, "bagel": True}),
        (("thinker", "bagel"), ("cfg_expand",), {"cfg_expand": False, "thinker": True, "bagel": True}),
        (("dit",), (), {"dit": True, "bagel": False}),
        ((), (), {"bagel": False}),
    ],
)
def test_without_a_list_of_models_those_that_triton_loads_count(
    ready: tuple[str, ...], unloaded: tuple[str, ...], expected: dict[str, bool]
) -> None:
    assert readiness(triton_with(*ready, unloaded=unloaded)) == expected


def test_models_elsewhere_are_counted_by_their_own_address() -> None:
    with serving(triton_with("dit")) as address:
        remote = {"remote": ("dit", "vae_decode"), "remote_addresses": lambda: (address,)}
        states = readiness(triton_with("bagel"), models=("bagel",), **remote)
    assert states == {"bagel": True, "dit": True, "vae_decode": False}
    gone = readiness(triton_with("bagel"), models=("bagel",), remote=("dit",), remote_addresses=lambda: (address,))
    assert gone == {"bagel": True, "dit": False}


def test_a_server_that_drains_counts_as_none() -> None:
    service = triton_with("dit", "vae_decode")
    service.draining = True
    with serving(service) as draining, serving(triton_with("dit", "vae_decode")) as other:
        alone = readiness(triton_with("bagel"), models=("bagel",), remote=REMOTE, remote_addresses=lambda: (draining,))
        assert alone == {"bagel": True, "dit": False, "vae_decode": False}
        both = readiness(
            triton_with("bagel"), models=("bagel",), remote=REMOTE, remote_addresses=lambda: (draining, other)
        )
    assert both == {"bagel": True, "dit": True, "vae_decode": True}


def test_a_model_whose_process_died_is_not_ready_even_if_triton_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shm = announced_in(tmp_path, monkeypatch)
    with AnnouncedProcess(shm, "dit") as dit, AnnouncedProcess(shm, "thinker"):
        dit.kill()
        assert soon(lambda: bool(liveness.dead_stages(PREFIX)))
        states = readiness(triton_with(*BAGEL.models), models=BAGEL.models, shm_prefix=PREFIX)
    assert states == {model: model != "dit" for model in BAGEL.models}
