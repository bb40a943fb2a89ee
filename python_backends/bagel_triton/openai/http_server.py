"""The web server under the API: sockets, TLS, time limits of connections, and the log."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import re
import socket
import ssl
import sys
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import h11
import msgspec
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from bagel_triton.openai.errors import HeaderTooLarge, error_body
from bagel_triton.openai.request_head import MAX_HEADER
from bagel_triton.openai.request_log import RequestIdFilter
from bagel_triton.openai.settings import HttpOptions, OptionError
from bagel_triton.protocol.errors import InvalidRequest, truncate

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_MAX_TRIES = 20  # free ports that one family has and the other does not


def listen(host: str, port: int, flag: str = "--port") -> list[socket.socket]:
    """Listening sockets, one for each address of ``host``; ``port`` 0 takes one that is free in all.

    ``localhost`` has an IPv4 and an IPv6 address on most machines, and clients try either.
    An address that this machine does not have is skipped as long as another one works.

    Raises:
        OptionError: the port is busy or no address can be used; names ``flag`` and the address.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"{flag}={port} is not allowed; allowed: 0 (a free port) to 65535")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise OptionError(f"cannot listen on {host}: {reason}") from error
    addresses = list(dict.fromkeys((int(family), str(address[0])) for family, _, _, _, address in found))
    for tries_left in reversed(range(_MAX_TRIES)):
        try:
            return _bind(addresses, port)
        except _AddressError as error:
            if port == 0 and error.busy and tries_left:
                continue
            raise OptionError(
                f"cannot listen on {host} ({error.address}) port {port}: {error.reason}; "
                f"{flag} chooses another, 0 a free one"
            ) from error
    raise AssertionError("the last try returns or raises")


class _AddressError(Exception):
    def __init__(self, address: str, cause: OSError) -> None:
        super().__init__(address)
        self.address, self.reason, self.busy = address, cause.strerror, cause.errno == errno.EADDRINUSE


def _bind(addresses: Sequence[tuple[int, str]], port: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    absent: _AddressError | None = None
    try:
        for family, address in addresses:
            try:
                listener = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:  # the family is switched off
                absent = _AddressError(address, error)
                continue
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(len(addresses) > 1))
            try:
                listener.bind((address, port))
                listener.listen(socket.SOMAXCONN)
            except OSError as error:
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise _AddressError(address, error) from error
                absent = _AddressError(address, error)
                listeners.remove(listener)
                listener.close()
                continue
            port = listener.getsockname()[1]
        if not listeners:
            assert absent is not None, "a host has at least one address"
            raise absent
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def base_url(listener: socket.socket, options: HttpOptions) -> str:
    """The URL at which this machine reaches ``listener``."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"{options.scheme}://[{host}]:{port}" if ":" in host else f"{options.scheme}://{host}:{port}"


def exposure(listeners: Sequence[socket.socket], options: HttpOptions) -> str | None:
    """A warning for an API that other machines can reach and that needs no key, else None."""
    hosts = [listener.getsockname()[0].partition("%")[0] for listener in listeners]
    open_to = [host for host in hosts if not ipaddress.ip_address(host).is_loopback]
    if options.api_keys or not open_to:
        return None
    return (
        f"the API at {', '.join(open_to)} is open to every machine that reaches it: "
        "no --api-key is set (docs/security.md)"
    )


def check_tls(options: HttpOptions) -> None:
    """Read the certificate and its key once, so that a wrong file is found at the start.

    Raises:
        OptionError: they are not a certificate and its key.
    """
    if options.ssl_certfile is None:
        return
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password=_no_password)
    except (OSError, ValueError) as error:
        keyfile = options.ssl_keyfile or options.ssl_certfile
        raise OptionError(
            f"--ssl-certfile={options.ssl_certfile} and the key in {keyfile} cannot be used: {error}"
        ) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted; allowed: a key without a passphrase")


def config(app: Starlette, options: HttpOptions, grace_s: int) -> uvicorn.Config:
    """uvicorn's configuration for ``app``; at a shutdown, requests have ``grace_s`` seconds to end."""
    return uvicorn.Config(
        app,
        http=_protocol(options),
        log_level="warning",
        access_log=False,  # the API writes its own, with times and request ids
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER,
        timeout_keep_alive=options.keep_alive_s,
        timeout_graceful_shutdown=grace_s,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )


def _protocol(options: HttpOptions) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 with limits for slow headers and slow readers, and errors in OpenAI's shape."""

    class TimedProtocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._header_timer = self.loop.call_later(options.header_timeout_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
                data = data.lstrip(b"\r\n")  # some clients end a body with a line (RFC 9112, section 2.2)
                if not data:  # to the parser, nothing is the connection's end
                    return
            super().data_received(data)
            in_header = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
            if not in_header:
                self._cancel_timers()
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(options.header_timeout_s, self.transport.abort)

        def send_400_response(self, msg: str) -> None:
            # uvicorn calls this where it catches the parser's error, and its own answer is a plain text.
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._refuse(sys.exception() or ValueError(msg))
            self.transport.close()  # after a reply that has begun, nothing else can be said

        def _refuse(self, reason: BaseException) -> None:
            status = reason.error_status_hint if isinstance(reason, h11.RemoteProtocolError) else 400
            shown = re.sub(r"bytearray\(b(.*)\)", r"\1", str(reason))
            error: InvalidRequest = InvalidRequest(f"the request is not HTTP/1.1: {truncate(shown)}")
            if status == HeaderTooLarge.http_status:
                error = HeaderTooLarge(f"the header is too large; allowed: at most {MAX_HEADER} bytes")
            body = msgspec.json.encode(error_body(error))
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")

        def pause_writing(self) -> None:
            super().pause_writing()
            # close() would wait until the client has read what is buffered.
            self._write_timer = self.loop.call_later(options.write_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_timers()
            if self._write_timer is not None:
                self._write_timer.cancel()
            super().connection_lost(exc)

        def _cancel_timers(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return TimedProtocol


def configure_logging() -> None:
    """Write the package's log to stderr, with times and request ids; calling it again changes nothing."""
    logger = logging.getLogger("bagel_triton")
    if any(isinstance(handler, _Handler) for handler in logger.handlers):
        return
    handler = _Handler()
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    handler.addFilter(RequestIdFilter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Handler(logging.StreamHandler[Any]):
    pass
