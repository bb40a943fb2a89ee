"""The servers of stage 1 as an orchestrator follows them: in, out, draining, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bagel_triton.deploy.topology import DECODER, DIT
from bagel_triton.protocol.errors import StageUnavailable
from bagel_triton.telemetry.metrics import NoMetrics
from bagel_triton.triton.replicas import Replicas
from tests.support.triton_service import TritonService, serving
from tests.support.waiting import soon

MODELS = (DIT, DECODER)


class Gauges(NoMetrics):
    """The newest value of each gauge, by its name and address."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], float] = {}

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self.seen[name, labels["address"]] = value


@pytest.fixture
def services() -> list[TritonService]:
    made = [TritonService(), TritonService()]
    for service in made:
        service.ready = set(MODELS)
    return made


@pytest.fixture
def addresses(services: list[TritonService]) -> Iterator[list[str]]:
    with ExitStack() as running:
        yield [running.enter_context(serving(service)) for service in services]


@pytest.fixture
def gauges() -> Gauges:
    return Gauges()


@pytest.fixture
def replicas(addresses: list[str], gauges: Gauges) -> Iterator[Replicas]:
    made = Replicas(MODELS, addresses, "least-outstanding-tokens", gauges)
    yield made
    made.close(1.0)


def taken(replicas: Replicas, count: int = 4) -> set[str]:
    return {replicas.take(1)[0].address for _ in range(count)}


def test_a_server_is_out_while_a_model_of_it_is_missing_and_in_again(
    replicas: Replicas, services: list[TritonService], addresses: list[str], gauges: Gauges
) -> None:
    first, second = addresses
    assert taken(replicas) == {first, second}
    services[0].ready = {DIT}
    assert soon(lambda: replicas.balancer.state(first) == "down")
    assert taken(replicas) == {second}
    assert soon(lambda: gauges.seen["replica_ready", first] == 0)
    services[0].ready = set(MODELS)
    assert soon(lambda: replicas.balancer.state(first) == "ready")
    assert soon(lambda: gauges.seen["replica_ready", first] == 1)


def test_a_request_that_comes_just_as_a_server_is_back_is_taken(
    replicas: Replicas, services: list[TritonService], addresses: list[str]
) -> None:
    for service in services:
        service.ready = set()
    assert soon(lambda: {replicas.balancer.state(address) for address in addresses} == {"down"})
    with pytest.raises(StageUnavailable, match=f"{addresses[0]} is down"):
        replicas.take(1)
    services[1].ready = set(MODELS)
    assert replicas.take(1)[0].address == addresses[1]


def test_a_server_that_drains_gets_no_more(
    replicas: Replicas, services: list[TritonService], addresses: list[str], gauges: Gauges
) -> None:
    services[1].draining = True
    assert soon(lambda: gauges.seen.get(("replica_draining", addresses[1])) == 1)
    assert taken(replicas) == {addresses[0]}


def test_the_work_of_other_orchestrators_counts(
    replicas: Replicas, services: list[TritonService], addresses: list[str]
) -> None:
    services[0].work_of_others = 1000
    assert soon(lambda: taken(replicas, 8) == {addresses[1]})


def test_servers_that_leave_are_called_no_more(replicas: Replicas, addresses: list[str], gauges: Gauges) -> None:
    replicas.set_addresses(addresses[1:])
    assert taken(replicas) == {addresses[1]}
    assert gauges.seen["replica_ready", addresses[0]] == 0
    replicas.set_addresses([])
    with pytest.raises(StageUnavailable, match="none is known"):
        replicas.take(1)


def test_a_server_that_comes_later_gets_the_adapters_of_now(
    services: list[TritonService], addresses: list[str]
) -> None:
    """``style`` was there at the start, and is another one by now."""
    for service in services:
        service.adapters = {"style": "first"}
    now = {"style": "second", "sketch": "third"}
    replicas = Replicas(MODELS, addresses, "least-outstanding-tokens", NoMetrics(), lambda: now, ["style"])
    try:
        assert soon(lambda: all(service.adapters == now for service in services))
        assert soon(lambda: taken(replicas) == set(addresses))
    finally:
        replicas.close(1.0)
