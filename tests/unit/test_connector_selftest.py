"""The start-up test's way through Triton's gRPC: what the thinker answers is what the DiT is given."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from bagel_triton.protocol.errors import StageUnavailable
from bagel_triton.serving import supervisor
from bagel_triton.serving.supervisor import check_connector
from tests.support.triton_service import TritonService, serving


@pytest.fixture
def triton() -> TritonService:
    service = TritonService()
    service.answers = {"thinker": "a lease", "dit": "shm"}
    return service


@pytest.fixture
def address(triton: TritonService) -> Iterator[str]:
    with serving(triton) as address:
        yield address


def _check(address: str) -> str:
    return asyncio.run(check_connector({"thinker": address, "dit": address}))


def test_the_dit_reads_what_the_thinker_lent(triton: TritonService, address: str) -> None:
    assert _check(address) == "shm"
    assert triton.asked == [("thinker", "lend"), ("dit", "a lease")]


def test_a_dit_elsewhere_is_asked_there(triton: TritonService, address: str) -> None:
    other = TritonService()
    other.answers = {"dit": "mooncake"}
    with serving(other) as elsewhere:
        assert asyncio.run(check_connector({"thinker": address, "dit": elsewhere})) == "mooncake"
    assert other.asked == [("dit", "a lease")]


def test_a_stages_error_is_the_reason_given(triton: TritonService, address: str) -> None:
    triton.answers["dit"] = ValueError("LeaseError(): read 3 of 240 numbers wrong")
    with pytest.raises(StageUnavailable, match="self-test failed at dit: read 3 of 240 numbers wrong"):
        _check(address)


def test_an_answer_without_a_lease_fails(triton: TritonService, address: str) -> None:
    del triton.answers["thinker"]
    with pytest.raises(StageUnavailable, match="self-test failed at thinker: it answered nothing"):
        _check(address)


def test_nothing_there_fails() -> None:
    with pytest.raises(
        StageUnavailable, match=r"failed at thinker: Triton at 127\.0\.0\.1:1 cannot be reached: UNAVAILABLE"
    ):
        _check("127.0.0.1:1")


def test_no_answer_fails(triton: TritonService, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SELFTEST_S", 0.1)
    triton.answers_after_s = 0.5
    with pytest.raises(StageUnavailable, match=r"self-test failed at thinker: .* DEADLINE_EXCEEDED"):
        _check(address)
