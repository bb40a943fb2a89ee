"""How the server of stage 0 learns where stage 1 listens: stage 1 tells it, at ``--omni-master-address`` and ``-port``.

Stage 1 connects to stage 0's address, retrying until that is there, and says its own gRPC address in a line of
JSON. The connection stays open, so stage 1 notices a stage 0 that starts again, and tells it anew. Either may
start first. There is no authentication, as on Triton's own ports.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator

import bagel_triton
from bagel_triton.protocol.intervals import RETRY_S, WATCH_S
from bagel_triton.serving import CommandError, machine
from bagel_triton.serving.process import log_event

DEFAULT_PORT = 8092
REPORT_S, REPLY_S = 10.0, 10.0
MAX_LINE = 4096
FLAG = "--omni-master-port"


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[Registrations]:
    """The registrations at ``host`` and ``port``, which belong to stage 0.

    Raises:
        CommandError: the port is busy, or the address is not this host's.
    """
    with machine.listen(host, port, FLAG) as listener:
        registrations = Registrations(listener)
        threading.Thread(target=registrations.accept, name="rendezvous", daemon=True).start()
        try:
            yield registrations
        finally:
            registrations.close()


class Registrations:
    """What stage 1 said; the first address is kept for as long as this server runs."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._address = listener, ""
        self._first: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = {listener}
        self._closing = False
        self.at = "{}:{}".format(*listener.getsockname()[:2])

    def wait(self) -> str:
        """The HOST:PORT of stage 1, as soon as it registers; says every ten seconds that it is awaited."""
        began = time.monotonic()
        while True:
            print(f"  waiting for stage 1 to register at {self.at} ({time.monotonic() - began:.0f} s)", flush=True)
            until = time.monotonic() + REPORT_S
            while time.monotonic() < until:  # in short waits, so that a signal ends it
                with contextlib.suppress(queue.Empty):
                    return self._first.get(timeout=WATCH_S)

    def accept(self) -> None:
        """Follow every connection until the listener closes."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closing:
                    connection.close()
                    return
                self._open.add(connection)
            threading.Thread(target=self._follow, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """End the accept and every connection, so that stage 1 looks for another stage 0."""
        with self._lock:
            self._closing = True
            for each in tuple(self._open):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _follow(self, connection: socket.socket) -> None:
        with contextlib.ExitStack() as held:
            held.enter_context(contextlib.suppress(OSError))
            held.enter_context(connection)
            held.callback(self._open.discard, connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.settimeout(REPLY_S)
            refused = self._refused(_read_line(connection))
            connection.sendall(json.dumps({"error": refused} if refused else {"ok": True}).encode() + b"\n")
            if refused:
                log_event(f"a registration from {connection.getpeername()[0]} was refused: {refused}")
                return
            connection.settimeout(None)
            connection.recv(1)  # until stage 1 ends

    def _refused(self, line: bytes) -> str:
        """Why a registration is not taken; empty if it is."""
        try:
            said = json.loads(line)
            version, stage, address = said["version"], said["stage"], said["address"]
        except (ValueError, KeyError, TypeError):
            return "it is no registration of a stage"
        if version != bagel_triton.__version__:
            return f"it has version {version}, and stage 0 has {bagel_triton.__version__}"
        host, _, port = str(address).rpartition(":")
        if stage != 1 or not host or not port.isdigit():
            return f"stage={stage!r} at {address!r} is not allowed; allowed: stage 1 at HOST:PORT"
        with self._lock:
            if self._address and address != self._address:
                return f"stage 0 calls stage 1 at {self._address}; start stage 0 again for {address}"
            if not self._address:
                self._address = address
                self._first.put(address)
        return ""


@contextlib.contextmanager
def registering(master: tuple[str, int], address: str) -> Iterator[None]:
    """Keep stage 0 at ``master`` told, from a thread, that stage 1 listens at ``address``."""
    ended = threading.Event()
    threading.Thread(target=_register, args=(master, address, ended), name="rendezvous", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _register(master: tuple[str, int], address: str, ended: threading.Event) -> None:
    line = json.dumps({"version": bagel_triton.__version__, "stage": 1, "address": address}).encode() + b"\n"
    told = ""
    while not ended.is_set():
        news = _registered(master, line, ended)
        if news and news != told:
            log_event(f"stage 0 at {master[0]}:{master[1]} {news}")
        told = news or told
        ended.wait(RETRY_S)


def _registered(master: tuple[str, int], line: bytes, ended: threading.Event) -> str:
    """Stay registered until the connection ends; what a person should know of it."""
    try:
        with socket.create_connection(master, timeout=REPLY_S) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.sendall(line)
            reply = json.loads(_read_line(connection))
            if "error" in reply:
                return f"refused this stage: {reply['error']}"
            connection.settimeout(RETRY_S)
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1):
                        break
            return ""
    except (OSError, ValueError) as error:
        return (
            f"is not there yet ({error})" if isinstance(error, ConnectionRefusedError) else f"does not answer: {error}"
        )


def _read_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < MAX_LINE:
        piece = connection.recv(MAX_LINE - len(data))
        if not piece:
            break
        data += piece
    return data


def master_of(address: str | None, port: int | None, stage_id: int | None) -> tuple[str, int] | None:
    """Host and port at which the stages meet; None where the flags do not say so.

    Raises:
        CommandError: a flag is missing, or has a value that is not allowed.
    """
    if address is None and port is None:
        return None
    if address is None:
        raise CommandError(f"{FLAG}={port} needs --omni-master-address, stage 0's host as stage 1 reaches it")
    if stage_id is None:
        raise CommandError(f"--omni-master-address={address} needs --stage-id: without it all stages are on one server")
    if not address or any(mark in address for mark in "/ :"):
        raise CommandError(f"--omni-master-address={address!r} is not allowed; allowed: a host or an IPv4 address")
    port = DEFAULT_PORT if port is None else port
    if not 0 < port < 65536:
        raise CommandError(f"{FLAG}={port} is not allowed; allowed: 1 to 65535")
    return address, port
