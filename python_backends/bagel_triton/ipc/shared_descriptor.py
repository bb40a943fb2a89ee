"""One open file that all processes of a server hold, made by the first.

Processes find each other by abstract Unix sockets, which the kernel removes with their process.
Each holder listens at ``NAME_0``, ``NAME_1`` and so on, and sends a duplicate of the descriptor
to any process that connects. There is no owner whose death would need handling: the file can be
had as long as one holder lives. A process that looks for the file, or makes it, binds
``NAME_turn`` meanwhile, so that one does at a time.

Abstract names belong to a network namespace.
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

from bagel_triton.protocol.intervals import TURN_S

HOLDERS = 32
ANSWER_S = 10.0
CREDENTIALS = struct.Struct("iII")  # process, user and group id, as SO_PEERCRED has them
log = logging.getLogger(__name__)


class SharedDescriptor:
    """The descriptor called ``name``: a duplicate of another process's, or else what ``make`` returns.

    Waiting: one process makes it and the others wait without a limit, as loading may take
    minutes. If it dies or its ``make`` raises, the next one starts over. A holder that does not
    answer within ``ANSWER_S`` seconds, for example a stopped process, is skipped; without
    another holder the file is made again.

    Lifetime: this process holds the descriptor and sends it to others until :meth:`close`, or
    until it ends. Threads: a daemon that sends.

    Access: processes of one user.

    Raises:
        PermissionError: another user's process has one of the names.
        OSError: ``HOLDERS`` processes hold it already, or this one has no free descriptor.
        Exception: any that ``make`` raises.
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
        self._thread = threading.Thread(target=self._send, name=f"sends {name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sending it, and close it; other processes keep theirs."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(OSError):  # it is closed if the thread has failed
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        os.close(self.descriptor)

    def _send(self) -> None:
        with self._listener:
            try:
                while True:
                    peer, _ = self._listener.accept()
                    with peer:
                        self._answer(peer)
            except Exception:
                if not self._closing:  # closing the socket ends the loop
                    log.exception("%s: this process no longer sends it", self.name)

    def _answer(self, peer: socket.socket) -> None:
        try:
            _check_user(peer, self.name)
            socket.send_fds(peer, [b"\0"], [self.descriptor])
        except PermissionError as error:
            log.warning("not sent: %s", error)
        except (BrokenPipeError, ConnectionResetError) as error:  # the other process died, or did not wait
            log.info("%s: a process disconnected before it was sent: %s", self.name, error)
        except OSError as error:  # the next process may still get it
            log.warning("%s could not be sent: %s", self.name, error)


@contextlib.contextmanager
def _turn(name: str) -> Iterator[None]:
    """Keep other processes from looking for ``name`` meanwhile."""
    place = f"{name}_turn"
    while (held := _bound(place)) is None:
        _wait_for_end(place)
    with held:
        yield


def _receive(name: str) -> int | None:
    """A duplicate of another process's descriptor; None where none holds it."""
    for number in range(HOLDERS):
        peer = _connected(f"{name}_{number}")
        if peer is None:
            continue
        with peer:
            peer.settimeout(ANSWER_S)
            try:
                data, descriptors, _, _ = socket.recv_fds(peer, 1, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:  # the process has just ended
                continue
            except TimeoutError:
                log.warning("%s_%d: its process did not answer within %g s", name, number, ANSWER_S)
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
    """A socket that listens at ``place``; None where another does."""
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
    """A connection to the process at ``place``; None where none listens."""
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
    """Wait until the process at ``place`` has left it or died."""
    peer = _connected(place)
    if peer is None:  # the process has just left, or does not listen yet
        time.sleep(TURN_S)
        return
    with peer, contextlib.suppress(ConnectionResetError):  # so an unaccepted connection ends
        peer.recv(1)


def _check_user(peer: socket.socket, place: str) -> None:
    process, user, _ = CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    if user != os.geteuid():
        raise PermissionError(f"{place}: process {process} is user {user}'s, and not user {os.geteuid()}'s")
