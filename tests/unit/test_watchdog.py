"""What the watchdog decides: whom it loads anew, what it clears away, when it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bagel_triton.ipc.liveness import dead_stages, processes
from bagel_triton.serving import CommandError
from bagel_triton.serving.watchdog import MAX_TRIES, STABLE_S, ReloadError, RestartNeeded, Watchdog
from tests.support.stage_process import PREFIX, AnnouncedProcess
from tests.support.waiting import soon


class Server:
    """Stage processes, and a repository that starts a new one; ``broken`` stages cannot be loaded."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory, self._stack = directory, stack
        self.broken: set[str] = set()
        self.reloads: list[str] = []
        self.back: list[str] = []
        self.now = 0.0
        self.watchdog = Watchdog(PREFIX, self, self.back.append, directory, clock=lambda: self.now)

    def start(self, stage: str) -> AnnouncedProcess:
        return self._stack.enter_context(AnnouncedProcess(self.directory, stage))

    def kill(self, process: AnnouncedProcess) -> None:
        process.kill()
        assert soon(lambda: any(process.pid == p.pid for dead in self.dead.values() for p in dead))

    @property
    def dead(self) -> dict[str, list[object]]:
        return dead_stages(PREFIX, self.directory)

    async def reload(self, model: str) -> None:
        self.reloads.append(model)
        if model in self.broken:
            raise ReloadError("no memory")
        self.newest = self.start(model)

    def check(self) -> None:
        asyncio.run(self.watchdog.check())

    def check_on(self, then: Callable[[], None], seconds: float) -> None:
        """Check every ``seconds``, and let ``then`` happen in between, for ever."""
        while True:
            self.check()
            self.now += seconds
            then()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with ExitStack() as stack:
        yield Server(tmp_path, stack)


def test_only_the_stage_that_died_is_loaded_anew_and_said_so(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    dit = server.start("dit")
    server.start("thinker")
    server.check()
    assert server.reloads == []
    server.kill(dit)
    server.check()
    server.check()
    assert server.reloads == ["dit"]
    assert server.dead == {}
    assert sorted(process.stage for process in processes(PREFIX, directory=server.directory)) == ["dit", "thinker"]
    said = capsys.readouterr().out.splitlines()
    without_time = [line.split(maxsplit=2)[2] for line in said]
    assert without_time == [
        f"stage dit died (process {dit.pid}); reloading",
        "stage dit is back after 0.0 s (reload 1)",
    ]


def test_a_survivor_of_the_old_processes_does_not_stay_beside_the_new_ones(server: Server) -> None:
    first, second = server.start("cfg_expand"), server.start("cfg_expand")
    server.kill(first)
    server.check()
    [left] = processes(PREFIX, directory=server.directory)
    assert left.alive
    assert left.pid not in (first.pid, second.pid)


def test_a_stage_stays_dead_until_it_could_be_loaded(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.broken = {"dit"}
    server.kill(server.start("dit"))
    server.check()
    assert "stage dit could not be reloaded: no memory" in capsys.readouterr().out
    assert set(server.dead) == {"dit"}
    assert server.back == []
    server.check()
    assert server.reloads == ["dit"], "it is not tried again at once"
    server.broken, server.now = set(), 1.0
    server.check()
    assert server.reloads == ["dit", "dit"]
    assert server.back == ["dit"]
    assert server.dead == {}


def test_a_stage_that_cannot_be_loaded_ends_the_server(server: Server) -> None:
    server.broken = {"dit"}
    process = server.start("dit")
    server.kill(process)
    with pytest.raises(CommandError, match=rf"^stage dit \(process {process.pid}\) died and {MAX_TRIES} reloads"):
        server.check_on(lambda: None, seconds=1.0)
    assert len(server.reloads) == MAX_TRIES


def test_a_stage_that_dies_at_every_start_ends_the_server(server: Server) -> None:
    server.kill(server.start("dit"))
    with pytest.raises(CommandError, match="did not keep it alive"):
        server.check_on(lambda: server.kill(server.newest), seconds=STABLE_S / 2)
    assert len(server.reloads) == MAX_TRIES


def test_a_stage_may_die_as_often_as_it_likes_if_it_serves_in_between(server: Server) -> None:
    server.kill(server.start("dit"))
    for _ in range(2 * MAX_TRIES):
        server.check()
        server.now += STABLE_S
        server.kill(server.newest)
    assert len(server.reloads) == 2 * MAX_TRIES


def test_a_triton_that_hangs_is_not_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(model: str) -> None:
        raise TimeoutError

    monkeypatch.setattr(server, "reload", hang)
    server.kill(server.start("dit"))
    with pytest.raises(RestartNeeded, match="and Triton hangs"):
        server.check()
