"""Registration: each server of stage 1 tells stage 0 its address.

Stage 1 connects to stage 0's ``--omni-master-address`` and ``-port``, retrying until that is there, and sends its own
gRPC address in a line of JSON. The connection stays open, so stage 1 notices a stage 0 that starts again and registers
anew. Either may start first, and servers of stage 1 may join at any time. An address whose connection has been closed
for a minute is forgotten. A name with several addresses stands for several servers of stage 0: stage 1 registers with
each. There is no authentication, as on Triton's own ports.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator

import bagel_triton
from bagel_triton.protocol.intervals import RESOLVE_S, RETRY_S, WATCH_S
from bagel_triton.serving import CommandError, machine
from bagel_triton.serving.process import log_event

DEFAULT_PORT = 8092
REPORT_S, REPLY_S = 10.0, 10.0
FORGET_S = 60.0
KEEPALIVE_S = 10
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
    """The servers of stage 1 that have registered."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        # Open connections by address, and when the last one of an address was closed.
        self._registered: dict[str, int] = {}
        self._left: dict[str, float] = {}
        self._hosts: dict[str, str] = {}  # that an address with an open connection is registered from
        self._changed = threading.Condition()
        self._open: set[socket.socket] = {listener}
        self._closing = False
        self.at = "{}:{}".format(*listener.getsockname()[:2])

    def addresses(self) -> tuple[str, ...]:
        """HOST:PORT of each server, in the order of their first registration."""
        with self._changed:
            now = time.monotonic()
            gone = [address for address, at in self._left.items() if now - at > FORGET_S]
            for address in gone:
                del self._left[address], self._registered[address], self._hosts[address]
            return tuple(self._registered)

    def is_open(self, address: str) -> bool:
        """Whether the server at ``address`` is connected."""
        with self._changed:
            return self._registered.get(address, 0) > 0

    def wait(self, until: float = math.inf) -> str:
        """The HOST:PORT of stage 1, as soon as it registers; says every ten seconds that it is awaited.

        Raises:
            TimeoutError: none did by ``until``, on the monotonic clock.
        """
        began = time.monotonic()
        while True:
            print(f"  waiting for stage 1 to register at {self.at} ({time.monotonic() - began:.0f} s)", flush=True)
            report_at = time.monotonic() + REPORT_S
            while (now := time.monotonic()) < report_at:  # in short waits, so that a signal ends it
                if now > until:
                    raise TimeoutError(f"no stage 1 has registered at {self.at}")
                with self._changed:
                    if self._changed.wait_for(lambda: bool(self._registered), WATCH_S):
                        return next(iter(self._registered))

    def accept(self) -> None:
        """Follow every connection until the listener closes."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                if self._closing:
                    connection.close()
                    return
                self._open.add(connection)
            threading.Thread(target=self._follow, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """End the accept and every connection, so that stage 1 looks for another stage 0."""
        with self._changed:
            self._closing = True
            for each in tuple(self._open):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _follow(self, connection: socket.socket) -> None:
        with contextlib.ExitStack() as held:
            held.enter_context(contextlib.suppress(OSError))
            held.enter_context(connection)
            held.callback(self._open.discard, connection)
            _keep_alive(connection)
            connection.settimeout(REPLY_S)
            line = _read_line(connection)
            host = connection.getpeername()[0]
            refused = _refused(line) or self._taken(str(json.loads(line)["address"]), host)
            connection.sendall(json.dumps({"error": refused} if refused else {"ok": True}).encode() + b"\n")
            if refused:
                log_event(f"a registration from {host} was refused: {refused}")
                return
            address = str(json.loads(line)["address"])
            held.callback(self._leave, address)
            self._join(address, host)
            connection.settimeout(None)
            connection.recv(1)  # until stage 1 ends

    def _taken(self, address: str, host: str) -> str:
        """The reason that a server on ``host`` cannot have ``address``; empty if it can."""
        other = self._hosts.get(address, host) if self.is_open(address) else host
        return "" if other == host else f"{address} is the address of a server that registered from {other}"

    def _join(self, address: str, host: str) -> None:
        with self._changed:
            self._hosts[address] = host
            self._registered[address] = self._registered.get(address, 0) + 1
            self._left.pop(address, None)
            self._changed.notify_all()

    def _leave(self, address: str) -> None:
        with self._changed:
            self._registered[address] -= 1
            if not self._registered[address]:
                self._left[address] = time.monotonic()


def _refused(line: bytes) -> str:
    """The reason that a registration is refused; empty if it is accepted."""
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
    return ""


@contextlib.contextmanager
def registering(master: tuple[str, int], address: str) -> Iterator[None]:
    """Keep the stage 0 at ``master`` informed, from threads, that stage 1 listens at ``address``."""
    ended = threading.Event()
    threading.Thread(target=_register_everywhere, args=(master, address, ended), name="rendezvous", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _register_everywhere(master: tuple[str, int], address: str, ended: threading.Event) -> None:
    """Stay registered at every address that the name of ``master`` has, as they come and go."""
    running: dict[tuple[str, int], threading.Event] = {}
    while not ended.is_set():
        found = _resolved(master)
        for one in found - running.keys():
            running[one] = threading.Event()
            threading.Thread(target=_register, args=(one, address, running[one]), daemon=True).start()
        for one in running.keys() - (found or running.keys()):  # a name without any address is a fault of its server
            running.pop(one).set()
        ended.wait(RESOLVE_S)
    for stopped in running.values():
        stopped.set()


def _resolved(master: tuple[str, int]) -> set[tuple[str, int]]:
    """The IPv4 addresses of ``master``."""
    host, port = master
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return set()
    return {(str(address[0]), port) for *_, address in found}


def _register(master: tuple[str, int], address: str, ended: threading.Event) -> None:
    line = json.dumps({"version": bagel_triton.__version__, "stage": 1, "address": address}).encode() + b"\n"
    shown = ""
    while not ended.is_set():
        news = _registered(master, line, ended)
        if news and news != shown:
            log_event(f"stage 0 at {master[0]}:{master[1]} {news}")
        shown = news or shown
        ended.wait(RETRY_S)


def _registered(master: tuple[str, int], line: bytes, ended: threading.Event) -> str:
    """Stay registered until the connection ends; what a person should know of it."""
    try:
        with socket.create_connection(master, timeout=REPLY_S) as connection:
            _keep_alive(connection)
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


def _keep_alive(connection: socket.socket) -> None:
    """Notice within a minute that the other host is gone, which closes no connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, KEEPALIVE_S)


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
