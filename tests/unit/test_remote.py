"""Models of another server: calls that wait for an absent one fail, and later ones find it again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from bagel_triton.triton.client import RemoteServer
from tests.support.triton_service import TritonService, serving
from tests.support.waiting import soon


@pytest.fixture
def triton() -> TritonService:
    service = TritonService()
    service.ready = {"dit", "vae_decode"}
    return service


@pytest.fixture
def watched() -> Iterator[Callable[[str], RemoteServer]]:
    made: list[RemoteServer] = []

    def watch(address: str) -> RemoteServer:
        made.append(RemoteServer(address, ("dit", "vae_decode")))
        made[-1].start()
        return made[-1]

    yield watch
    for remote in made:
        remote.close()


def test_a_model_that_stays_ready_is_there(triton: TritonService, watched: Callable[[str], RemoteServer]) -> None:
    with serving(triton) as address:
        alive = watched(address).watch("dit")
        time.sleep(1.0)
        assert alive()


def test_a_call_that_waits_while_a_model_is_reloaded_fails_for_good(
    triton: TritonService, watched: Callable[[str], RemoteServer]
) -> None:
    with serving(triton) as address:
        remote = watched(address)
        dit, decoder = remote.watch("dit"), remote.watch("vae_decode")
        triton.ready = {"vae_decode"}
        assert soon(lambda: not dit())
        triton.ready = {"dit", "vae_decode"}
        time.sleep(1.0)
        assert (dit(), decoder()) == (False, True)
        later = remote.watch("dit")
        time.sleep(1.0)
        assert later()


def test_a_server_that_is_gone_is_found_again(triton: TritonService, watched: Callable[[str], RemoteServer]) -> None:
    with serving(triton) as address:
        remote = watched(address)
        before = remote.watch("dit")
    assert soon(lambda: not before())
    during = remote.watch("dit")
    assert soon(lambda: not during())
    with serving(triton, address):
        assert soon(lambda: _lasts(remote.watch("dit")))


def _lasts(alive: Callable[[], bool]) -> bool:
    time.sleep(1.0)
    return alive()
