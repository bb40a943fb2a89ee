"""Servers of stage 1 register with stage 0: in either order, again after a restart, and as many as there are."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bagel_triton
from bagel_triton.serving import CommandError, cli, rendezvous, supervisor
from bagel_triton.serving.machine import free_port
from bagel_triton.serving.tritonserver import StartupProgress
from tests.support.waiting import soon

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "RETRY_S", 0.05)


@pytest.fixture
def port() -> int:
    return free_port(HOST, 0)


def say(port: int, line: bytes, host: str = HOST) -> dict[str, object]:
    with socket.create_connection((HOST, port), timeout=10, source_address=(host, 0)) as connection:
        connection.sendall(line)
        reply: dict[str, object] = json.loads(connection.makefile().readline())
    return reply


def registration(**changes: object) -> bytes:
    said = {"version": bagel_triton.__version__, "stage": 1, "address": "10.0.0.2:8093", **changes}
    return json.dumps(said).encode() + b"\n"


def test_stage_0_learns_where_stage_1_is_when_it_comes_second(port: int) -> None:
    with rendezvous.registering((HOST, port), "10.0.0.2:8093"), rendezvous.listening(HOST, port) as registrations:
        assert registrations.wait() == "10.0.0.2:8093"


def test_stage_0_waits_for_a_stage_1_that_comes_later(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with rendezvous.listening(HOST, port) as registrations:
        assert say(port, registration()) == {"ok": True}
        assert registrations.wait() == "10.0.0.2:8093"
        assert f"waiting for stage 1 to register at {HOST}:{port} (0 s)" in capsys.readouterr().out
        assert say(port, registration()) == {"ok": True}  # it started again


def test_stage_1_registers_again_at_a_stage_0_that_started_again(port: int) -> None:
    with rendezvous.registering((HOST, port), "10.0.0.2:8093"):
        for _ in range(2):
            with rendezvous.listening(HOST, port) as registrations:
                assert registrations.wait() == "10.0.0.2:8093"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "it is no registration of a stage"),
        (b"[1]\n", "it is no registration of a stage"),
        (b"x" * 5000, "it is no registration of a stage"),
        (registration(version="0.0.1"), "it has version 0.0.1, and stage 0 has"),
        (registration(stage=0), "stage=0 at '10.0.0.2:8093' is not allowed; allowed: stage 1 at HOST:PORT"),
        (registration(address="here"), "allowed: stage 1 at HOST:PORT"),
        (registration(address=5), "allowed: stage 1 at HOST:PORT"),
    ],
)
def test_what_is_no_registration_is_refused(port: int, line: bytes, reason: str) -> None:
    with rendezvous.listening(HOST, port) as registrations:
        assert reason in str(say(port, line)["error"])
        assert say(port, registration()) == {"ok": True}
        assert registrations.wait() == "10.0.0.2:8093"


def test_an_address_that_another_host_has_is_refused(port: int) -> None:
    with rendezvous.listening(HOST, port) as registrations, rendezvous.registering((HOST, port), "10.0.0.2:8093"):
        assert registrations.wait() == "10.0.0.2:8093"
        reason = "10.0.0.2:8093 is the address of a server that registered from 127.0.0.1"
        assert say(port, registration(), "127.0.0.2")["error"] == reason
        assert say(port, registration()) == {"ok": True}  # the same host's, started again


def test_servers_join_and_are_forgotten_some_time_after_they_left(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = "10.0.0.2:8093", "10.0.0.3:8093"
    with rendezvous.listening(HOST, port) as registrations:
        with rendezvous.registering((HOST, port), first), rendezvous.registering((HOST, port), second):
            assert soon(lambda: set(registrations.addresses()) == {first, second})
        with rendezvous.registering((HOST, port), second):  # it has started again
            assert soon(lambda: not registrations.is_open(first) and registrations.is_open(second))
            assert set(registrations.addresses()) == {first, second}
            monkeypatch.setattr(rendezvous, "FORGET_S", 0.0)
            assert registrations.addresses() == (second,)


def test_stage_1_registers_at_every_address_of_a_name(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["127.0.0.3", "127.0.0.4"]
    monkeypatch.setattr(rendezvous, "RESOLVE_S", 0.05)
    monkeypatch.setattr(rendezvous, "_resolved", lambda master: {(host, master[1]) for host in hosts})
    with ExitStack() as running:
        several = [running.enter_context(rendezvous.listening(host, port)) for host in hosts]
        running.enter_context(rendezvous.registering(("bagel-stage0", port), "10.0.0.2:8093"))
        assert [one.wait() for one in several] == ["10.0.0.2:8093"] * 2
        gone = hosts.pop()  # a pod that was taken away is left alone
        assert gone == "127.0.0.4"
        assert soon(lambda: not several[1].is_open("10.0.0.2:8093"))
        assert several[0].is_open("10.0.0.2:8093")


def test_the_wait_for_stage_1_ends(port: int) -> None:
    with (
        rendezvous.listening(HOST, port) as registrations,
        pytest.raises(TimeoutError, match="no stage 1 has registered"),
    ):
        registrations.wait(until=0.0)


@pytest.mark.parametrize(
    ("address", "port", "stage", "message"),
    [
        (None, 8092, 0, "--omni-master-port=8092 needs --omni-master-address"),
        ("10.0.0.1", 8092, None, "--omni-master-address=10.0.0.1 needs --stage-id"),
        ("10.0.0.1:8092", None, 0, "--omni-master-address='10.0.0.1:8092' is not allowed; allowed: a host"),
        ("10.0.0.1", 70000, 0, "--omni-master-port=70000 is not allowed; allowed: 1 to 65535"),
    ],
)
def test_flags_that_cannot_be_followed(address: str | None, port: int | None, stage: int | None, message: str) -> None:
    with pytest.raises(CommandError) as caught:
        rendezvous.master_of(address, port, stage)
    assert str(caught.value).startswith(message)


def test_the_port_has_a_default_and_a_busy_one_is_said_so() -> None:
    assert rendezvous.master_of("10.0.0.1", None, 1) == ("10.0.0.1", 8092)
    assert rendezvous.master_of(None, None, None) is None
    with (
        socket.create_server((HOST, 0)) as taken,
        pytest.raises(CommandError, match="--omni-master-port chooses another"),
        rendezvous.listening(HOST, taken.getsockname()[1]),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["0", "-oma", HOST, "--port", "8092"], "--omni-master-port=8092 is --port as well"),
        (["1", "--headless", "-oma", "no-such-host.invalid"], "no-such-host.invalid is no host that is known here"),
    ],
)
def test_a_start_that_cannot_meet_the_other_stage_says_why(
    options: list[str], message: str, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", str(checkpoint_dir), "--device", "cpu", "--stage-id", *options]) == 1
    assert message in capsys.readouterr().err


def test_a_start_without_stage_1_ends_when_its_time_is_up(
    port: int, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage_0 = ["serve", str(checkpoint_dir), "--stage-id", "0", "-oma", HOST, "-omp", str(port), "--device", "cpu"]
    assert cli.main([*stage_0, "--init-timeout", "0.2"]) == 1
    said = f"--init-timeout=0.2 has passed: no stage 1 has registered at {HOST}:{port}"
    assert said in capsys.readouterr().err


def test_models_that_do_not_load_in_time_are_named() -> None:
    class Loading:
        async def until_ready(self, progress: StartupProgress) -> None:
            progress.note("dit, vae_decode")
            await asyncio.Event().wait()

    launch: Any = SimpleNamespace(ready_by=time.monotonic() + 0.05)
    loading: Any = Loading()
    control: Any = None
    with pytest.raises(CommandError, match="--init-timeout has passed: still waiting for dit, vae_decode"):
        asyncio.run(supervisor._until_ready(loading, launch, control))
