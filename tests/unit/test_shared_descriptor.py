"""A file shared by processes: made once, whichever of them dies, and never another user's."""

from __future__ import annotations

import os
import resource
import secrets
from multiprocessing.connection import wait

import pytest

from bagel_triton.ipc import shared_descriptor
from bagel_triton.ipc.shared_descriptor import SharedDescriptor
from tests.support.descriptor_process import Asker, askers, contents, file_with, grab
from tests.support.leaks import NO_LEAKS, Leaks

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start another user's process")


@pytest.fixture
def name() -> str:
    return f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}"


def never() -> int:
    raise AssertionError("another process holds it")


def received(name: str) -> str:
    """What a process finds that asks now, and must not make it."""
    held = SharedDescriptor(name, never)
    assert not held.made_here
    try:
        return contents(held)
    finally:
        held.close()


def test_later_requests_get_the_first_descriptors(name: str) -> None:
    with Asker(name) as first, Asker(f"{name}_other") as other:
        first.make("one")
        other.make("two")
        assert received(name) == "one"
        assert received(f"{name}_other") == "two"


def test_of_many_that_ask_at_once_one_makes_it(name: str) -> None:
    with askers(name, 5) as asking:
        pipes = {asker.pipe: asker for asker in asking}
        (ready,) = wait(list(pipes), 60)
        maker = pipes.pop(ready)  # type: ignore[index]
        assert maker.says() == "making"
        assert all(asker.silent(0.1) for asker in pipes.values())
        maker.tell("once")
        assert [asker.says() for asker in asking] == ["holds once"] * 5


def test_any_survivor_gives_it(name: str) -> None:
    with Asker(name) as maker:
        maker.make("here")
        with Asker(name) as second, Asker(name) as third:
            assert (second.says(), third.says()) == ("holds here", "holds here")
            maker.kill()
            assert received(name) == "here"
            second.kill()
            with Asker(name) as fourth:
                assert fourth.says() == "holds here"
                third.kill()
                assert received(name) == "here"


def test_nothing_is_left_of_holders_that_are_gone(name: str) -> None:
    with Asker(name) as first:
        first.make("old")
        first.kill()
        held = SharedDescriptor(name, lambda: file_with("new"))
        assert held.made_here
        assert contents(held) == "new"
        held.close()


def test_one_that_waits_takes_over_from_one_that_is_killed_while_it_makes_it(name: str) -> None:
    with Asker(name) as maker:
        assert maker.says() == "making"
        with Asker(name) as waiting:
            assert waiting.silent(0.3)
            maker.kill()
            waiting.make("after all")


def test_one_whose_making_fails_has_its_own_error_and_the_next_tries(name: str) -> None:
    with Asker(name) as maker:
        assert maker.says() == "making"
        with Asker(name) as waiting:
            assert waiting.silent(0.3)
            maker.tell("fail")
            assert maker.says() == "RuntimeError: the file is broken"
            waiting.make("not broken")


@pytest.mark.parametrize("others", [0, 1])
def test_a_holder_that_is_stopped_is_passed_over(
    name: str, others: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_descriptor, "ANSWER_S", 0.2)
    with Asker(name) as stopped:
        stopped.make("first")
        with askers(name, others) as holding:
            assert [holder.says() for holder in holding] == ["holds first"] * others
            stopped.stop()
            held = SharedDescriptor(name, lambda: file_with("again"))
            assert contents(held) == ("first" if others else "again")
            held.close()
    assert f"{name}_0: its process did not answer within 0.2 s" in caplog.text


@AS_ROOT
def test_it_is_not_taken_from_another_users_process(name: str) -> None:
    with Asker(name, NOBODY) as foreign:
        foreign.make("theirs")
        message = f"{name}_0: process {foreign.process.pid} is user {NOBODY}'s, and not user 0's"
        with pytest.raises(PermissionError, match=message):
            SharedDescriptor(name, never)


@AS_ROOT
def test_another_users_loading_is_not_waited_for(name: str) -> None:
    with Asker(name, NOBODY) as foreign:
        assert foreign.says() == "making"
        with pytest.raises(PermissionError, match=f"{name}_turn: process"):
            SharedDescriptor(name, never)


@AS_ROOT
def test_it_is_not_given_to_another_users_process(name: str, caplog: pytest.LogCaptureFixture) -> None:
    held = SharedDescriptor(name, lambda: file_with("ours"))
    with Asker(name, NOBODY) as polite:
        assert polite.says().startswith("PermissionError")
    assert grab(name, NOBODY) == (b"", 0)
    assert f"is user {NOBODY}'s, and not user 0's" in caplog.text
    assert received(name) == "ours"
    held.close()


def test_closing_leaves_neither_threads_nor_descriptors(name: str) -> None:
    leaks = Leaks()
    first = SharedDescriptor(name, lambda: file_with("text"))
    second = SharedDescriptor(name, never)
    first.close()
    assert received(name) == contents(second) == "text"
    second.close()
    second.close()
    assert leaks.found() == NO_LEAKS
    with pytest.raises(AssertionError, match="another process holds it"):
        received(name)
    assert leaks.found() == NO_LEAKS


def test_no_room_for_a_descriptor_is_an_error_and_not_a_second_copy(name: str) -> None:
    with Asker(name) as holder:
        holder.make("text")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = [os.dup(0) for _ in range(3)]  # for the turn's socket, the connection, and no more
        for descriptor in free:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[2], limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                SharedDescriptor(name, never)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert received(name) == "text"


def test_more_holders_than_there_are_places_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_descriptor, "HOLDERS", 1)
    held = SharedDescriptor(name, lambda: file_with("text"))
    leaks = Leaks()
    with pytest.raises(OSError, match="1 processes hold it already"):
        SharedDescriptor(name, never)
    assert leaks.found() == NO_LEAKS
    held.close()
