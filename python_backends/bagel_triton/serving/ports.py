"""The TCP ports that tritonserver will bind."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping

from bagel_triton.serving.command_error import CommandError

LOOPBACK = "127.0.0.1"


def listen(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket on ``host``; ``port`` 0 means any free one.

    Raises:
        CommandError: the port is busy or the address cannot be used; names ``flag``.
    """
    if not 0 <= port <= 65535:
        raise CommandError(f"{flag}={port} is not allowed; allowed: 0 (a free port) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CommandError(f"cannot listen on {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise CommandError(
            f"cannot listen on {host} port {port}: {error.strerror}; {flag} chooses another, 0 a free one"
        ) from error
    return listener


def choose(wanted: Mapping[str, int], hosts: Mapping[str, str] | None = None) -> dict[str, int]:
    """A free port for each flag in ``wanted``, whose value is a port or 0 for any.

    They are ports of the loopback address, or of the one that ``hosts`` gives a flag.

    All are held until all are chosen, so they differ. They are free on return, for
    another process to bind.

    Raises:
        CommandError: a wanted port is busy.
    """
    with contextlib.ExitStack() as held:
        # Given ports first: a free one must not take the place of one asked for.
        ordered = sorted(wanted, key=lambda flag: wanted[flag] == 0)
        chosen = {}
        for flag in ordered:
            listener = held.enter_context(listen((hosts or {}).get(flag, LOOPBACK), wanted[flag], flag))
            chosen[flag] = int(listener.getsockname()[1])
    return {flag: chosen[flag] for flag in wanted}
