"""Processes that ask for a shared descriptor, told what to do through a pipe; they need no torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from bagel_triton.ipc.shared_descriptor import SharedDescriptor

SPAWN = multiprocessing.get_context("spawn")
WAIT_S = 60.0


def file_with(text: str) -> int:
    """A descriptor of a new file in memory."""
    descriptor = os.memfd_create("test")
    os.write(descriptor, text.encode())
    return descriptor


def contents(held: SharedDescriptor) -> str:
    return os.pread(held.descriptor, 100, 0).decode()


class Asker:
    """A process that asks for ``name`` as soon as it has started.

    It says ``making`` when it is its turn to make the file, and goes on when told its
    contents or ``fail``; then it says ``holds CONTENTS``, or its error.
    """

    def __init__(self, name: str, user: int | None = None) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_ask, args=(theirs, name, user), daemon=True)
        self.process.start()
        theirs.close()
        assert self.says() == "asks"

    def says(self) -> Any:
        assert self.pipe.poll(WAIT_S), "the process says nothing"
        return self.pipe.recv()

    def silent(self, seconds: float) -> bool:
        return not self.pipe.poll(seconds)

    def tell(self, text: str) -> None:
        self.pipe.send(text)

    def make(self, text: str) -> Self:
        """Let it make the file."""
        assert self.says() == "making"
        self.tell(text)
        assert self.says() == f"holds {text}"
        return self

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.pipe.close()


def _ask(pipe: Connection, name: str, user: int | None) -> None:
    if user is not None:
        os.setuid(user)

    def make() -> int:
        pipe.send("making")
        text = pipe.recv()
        if text == "fail":
            raise RuntimeError("the file is broken")
        return file_with(text)

    pipe.send("asks")
    try:
        held = SharedDescriptor(name, make)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    else:
        pipe.send(f"holds {contents(held)}")
    with contextlib.suppress(EOFError):
        pipe.recv()


def grab(name: str, user: int) -> tuple[bytes, int]:
    """What a process of ``user`` that does not check its peer receives: data, and the number of descriptors."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_grab, args=(theirs, name, user), daemon=True)
    process.start()
    theirs.close()
    with ours:
        assert ours.poll(WAIT_S), "the process says nothing"
        data, count = ours.recv()
    process.join()
    return data, count


def _grab(pipe: Connection, name: str, user: int) -> None:
    os.setuid(user)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(f"\0{name}_0")
        data, descriptors, _, _ = socket.recv_fds(peer, 1, 1)
    pipe.send((data, len(descriptors)))


@contextlib.contextmanager
def askers(name: str, count: int) -> Iterator[list[Asker]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Asker(name)) for _ in range(count)]
