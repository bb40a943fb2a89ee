"""One open file that every process which asks for it by name comes to hold, whoever made it.

The names are abstract Unix sockets', which the kernel takes back with their process; nothing
is left behind and no process id is trusted. Under ``NAME_turn`` is whoever looks for the file
or makes it, one process at a time. Under ``NAME_0``, ``NAME_1`` and so on is each process that
holds it, and every one of them gives it. So there is no owner whose death would have to be
noticed and made up for: the file is found as long as one holder lives.

Abstract names belong to a network namespace: processes in two of them do not meet.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

HOLDERS = 32
ANSWER_S = 10.0
RETRY_S = 0.01
CREDENTIALS = struct.Struct("iII")  # process, user and group id, as SO_PEERCRED has them
log = logging.getLogger(__name__)


class SharedDescriptor:
    """The descriptor called ``name``: a duplicate of another process's, or else what ``make`` returns.

    Waiting: of those that ask at once, one makes it and the others wait, without a limit,
    for loading may take minutes; if it dies or its ``make`` raises, the next in line starts
    over. A holder that gives no answer, as when it is stopped, is passed over after
    ``ANSWER_S`` seconds, and without any other the file is made once more.

    Lifetime: from construction to :meth:`close` or the end of the process, this process
    holds the descriptor and gives it. Threads: one, a daemon, that gives.

    Access: processes of one user. A descriptor is neither given to nor taken from another's.

    Raises:
        PermissionError: another user's process is under one of the names.
        OSError: ``HOLDERS`` processes hold it already, or this one has no room for a descriptor.
        Exception: whatever ``make`` raises.
    """

    def __init__(self, name: str, make: Callable[[], int]) -> None:
        self.name, self._closing = name, False
        with _turn(name):
            received = _receive(name)
            self.made_here = received is None
            self.descriptor = make() if received is None else received
            try:
                self._listener = _first_free(name)
            except BaseException:
                os.close(self.descriptor)
                raise
        self._thread = threading.Thread(target=self._give, name=f"gives {name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give it to nobody any more, and close it; what others hold stays."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(OSError):  # closed already, where the thread has failed
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        self._thread.join()
        os.close(self.descriptor)

    def _give(self) -> None:
        with self._listener:
            try:
                while True:
                    peer, _ = self._listener.accept()
                    with peer:
                        self._answer(peer)
            except Exception:
                if not self._closing:  # else it is how the loop ends
                    log.exception("%s is no longer given by this process", self.name)

    def _answer(self, peer: socket.socket) -> None:
        try:
            _check_user(peer, self.name)
            socket.send_fds(peer, [b"\0"], [self.descriptor])
        except PermissionError as error:
            log.warning("not given: %s", error)
        except (BrokenPipeError, ConnectionResetError) as error:  # it has died, or passed this process over
            log.info("%s was asked for by a process that went away: %s", self.name, error)
        except OSError as error:  # this one's failure is not the next one's
            log.warning("%s could not be given: %s", self.name, error)


@contextlib.contextmanager
def _turn(name: str) -> Iterator[None]:
    """Be the only process inside."""
    place = f"{name}_turn"
    while (held := _bound(place)) is None:
        _wait_for_end(place)
    with held:
        yield


def _receive(name: str) -> int | None:
    """A duplicate of what some process holds; None where none does."""
    for number in range(HOLDERS):
        peer = _connected(f"{name}_{number}")
        if peer is None:
            continue
        with peer:
            peer.settimeout(ANSWER_S)
            try:
                data, descriptors, _, _ = socket.recv_fds(peer, 1, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:  # it has just ended
                continue
            except TimeoutError:
                log.warning("%s_%d: its process has not answered for %g s", name, number, ANSWER_S)
                continue
        if descriptors:
            return descriptors[0]
        if data:  # the kernel drops a descriptor for which the table has no room
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), name)
    return None


def _first_free(name: str) -> socket.socket:
    for number in range(HOLDERS):
        if (listener := _bound(f"{name}_{number}")) is not None:
            return listener
    raise OSError(errno.EADDRINUSE, f"{HOLDERS} processes hold it already", name)


def _bound(place: str) -> socket.socket | None:
    """A socket that listens under ``place``; None where another does."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{place}")
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return listener


def _connected(place: str) -> socket.socket | None:
    """A connection to the process under ``place``; None where none listens."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        peer.connect(f"\0{place}")
        _check_user(peer, place)
    except ConnectionRefusedError:
        peer.close()
        return None
    except BaseException:
        peer.close()
        raise
    return peer


def _wait_for_end(place: str) -> None:
    """Return when the process that was under ``place`` has left it, or died."""
    peer = _connected(place)
    if peer is None:  # it has just left, or does not listen yet
        time.sleep(RETRY_S)
        return
    with peer, contextlib.suppress(ConnectionResetError):  # which is how an unaccepted connection ends
        peer.recv(1)


def _check_user(peer: socket.socket, place: str) -> None:
    process, user, _ = CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    if user != os.geteuid():
        raise PermissionError(f"{place}: process {process} is user {user}'s, and not user {os.geteuid()}'s")
