"""The command that takes a server out of service: one that clients call, and one of stage 1."""

from __future__ import annotations

import pytest

from bagel_triton.serving import cli
from tests.support.triton_service import TritonService, serving


def test_a_server_that_clients_call_is_drained_and_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    service = TritonService()
    service.ready, service.states = {"bagel", "dit"}, ["draining", "draining", "drained"]
    with serving(service) as address:
        assert cli.main(["drain", address]) == 0
        assert capsys.readouterr().out.splitlines() == [f"{address} takes no more requests", f"{address} is idle"]
        assert cli.main(["drain", address, "--resume"]) == 0
        assert capsys.readouterr().out == f"{address} takes requests again\n"
    assert service.calls == ["drain", "state", "state", "resume"]


def test_requests_that_do_not_end_in_time_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    service = TritonService()
    service.ready, service.states = {"bagel"}, ["draining"]
    with serving(service) as address:
        assert cli.main(["drain", address, "--timeout", "0.2"]) == 1
    assert f"requests are left at {address} after 0.2 s; it still drains" in capsys.readouterr().err


def test_a_server_of_stage_1_is_drained(capsys: pytest.CaptureFixture[str]) -> None:
    service = TritonService()
    service.ready = {"dit", "vae_decode"}
    with serving(service) as address:
        assert cli.main(["drain", address]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{address} is idle"
    assert service.calls == []


def test_what_is_no_server_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["drain", "127.0.0.1:9"]) == 1
    assert "Triton at 127.0.0.1:9 cannot be reached" in capsys.readouterr().err
