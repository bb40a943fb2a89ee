"""Settings of the HTTP API, and their command-line options.

Nothing heavy is imported here: every command that starts the API declares its options with
:func:`add_arguments`, and ``--help`` must not wait for a web framework.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MIB = 1024 * 1024
API_KEY_VARIABLE = "BAGEL_API_KEY"
ADMIN_KEY_VARIABLE = "BAGEL_ADMIN_API_KEY"


class OptionError(ValueError):
    """An option has a value that is not allowed; the message names both and what is allowed."""


class AllowedSources:
    """Hosts and networks that images may come from although their addresses are not public.

    Args:
        sources: host names, addresses, and networks such as ``10.0.0.0/8``.

    Raises:
        ValueError: one is none of these.
    """

    def __init__(self, sources: Iterable[str] = ()) -> None:
        self._hosts: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for source in sources:
            try:
                self._networks.append(ipaddress.ip_network(source.strip("[]")))
            except ValueError:
                if not re.fullmatch(r"(?=.*[a-z])[a-z0-9]([a-z0-9.-]*[a-z0-9])?", source.lower()):
                    raise ValueError(f"{source!r} is not a host name, an address or a network") from None
                self._hosts.add(source.lower())

    def permits(self, host: str, address: str) -> bool:
        """Whether images may come from ``address``, which ``host`` resolved to."""
        number = ipaddress.ip_address(address)
        return host.lower() in self._hosts or any(number in network for network in self._networks)


@dataclass(frozen=True)
class HttpOptions:
    """Settings of the HTTP server, which do not depend on Triton.

    With ``api_keys`` a request must carry one of them, and a change of the server one of ``admin_api_keys``.
    ``cors_origins`` are the origins whose
    pages may call the API, ``*`` for any. Times are in seconds: a connection has
    ``header_timeout_s`` to send a request's header, ``body_timeout_s`` to send its body,
    ``write_timeout_s`` to read on once the send buffer is full, and stays open for
    ``keep_alive_s`` between two requests. ``image_reply`` says where a reply has its images, unless
    the request does: ``list``, ``images``, ``both``, or ``auto`` for what the client can read.
    One body has at most ``max_body_mib``, and all that are being received ``max_receiving_mib``.
    ``allowed_image_hosts`` are hosts and networks that images may be fetched from although their
    addresses are not public.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    keep_alive_s: int = 90
    header_timeout_s: int = 30
    body_timeout_s: int = 300
    write_timeout_s: int = 300
    access_log: bool = True
    max_body_mib: int = 64
    max_receiving_mib: int = 1024
    image_reply: Literal["auto", "list", "images", "both"] = "auto"
    allowed_image_hosts: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        """``https`` with a certificate."""
        return "https" if self.ssl_certfile else "http"


@dataclass(frozen=True)
class ProxySettings:
    """Triton's address, the model's names, and the proxy's own limits.

    ``triton_grpc`` is ``host:port``. A request for any of ``served_model_names`` is served;
    replies to requests that name none carry the first. ``lora_modules`` are names of adapters, which requests may give
    in place of the model's, or behind it and a colon. ``output_modalities`` are what the server makes. A stream that
    stays silent for ``silence_timeout_s`` is aborted: it must exceed the time ``bagel`` itself allows a stage.
    ``retry_after_s`` is the ``Retry-After`` of an overloaded server. ``fetch_remote`` lets
    requests name images by ``http`` and ``https`` URLs. ``models`` are the Triton models that
    must be ready for the server to be, and ``remote`` those that must be ready at one of the gRPC
    addresses that ``remote_addresses`` gives; None means that Triton's repository index says which.
    Where Triton's processes run on this host, ``shm_prefix`` names their server's shared memory, so
    a dead one is noticed at once. ``metrics_url`` is Triton's metrics page, if it is known.
    """

    triton_grpc: str
    served_model_names: tuple[str, ...]
    max_body_bytes: int = 64 * MIB
    silence_timeout_s: float = 660.0
    ready_timeout_s: float = 5.0
    retry_after_s: int = 1
    fetch_remote: bool = True
    models: tuple[str, ...] | None = None
    shm_prefix: str | None = None
    remote: tuple[str, ...] = ()
    remote_addresses: Callable[[], Sequence[str]] = tuple
    metrics_url: str | None = None
    lora_modules: tuple[str, ...] = ()
    output_modalities: tuple[str, ...] = ("text", "image")
    http: HttpOptions = HttpOptions()

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ValueError("served_model_names=() is not allowed; allowed: at least one name")
        for name in ("max_body_bytes", "silence_timeout_s", "ready_timeout_s", "retry_after_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; allowed: a number > 0")


def add_fetch_remote(parser: argparse.ArgumentParser) -> None:
    """Declare the switch for ``fetch_remote``, which every command that runs the proxy has."""
    parser.add_argument(
        "--no-remote-images",
        dest="fetch_remote",
        action="store_false",
        help="refuse images that a request names by an http or https URL",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the HTTP API: those of :class:`HttpOptions`, and of images by URL."""
    add_fetch_remote(parser)
    group = parser.add_argument_group("HTTP API")
    defaults = HttpOptions()
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key that requests must carry as 'Authorization: Bearer KEY'; may be repeated; or ${API_KEY_VARIABLE}",
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="more keys, a line each; empty lines and # lines are skipped"
    )
    group.add_argument(
        "--admin-api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key for /v1/sleep, /v1/wake and loading adapters, which no other key opens; without one they are "
        f"closed; may be repeated; or ${ADMIN_KEY_VARIABLE}",
    )
    group.add_argument("--admin-api-key-file", type=Path, metavar="FILE", help="more of them, as --api-key-file")
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may call the API, such as https://app.example, or '*'; may be repeated",
    )
    group.add_argument("--ssl-certfile", metavar="PEM", help="certificate chain; the API is then served over HTTPS")
    group.add_argument("--ssl-keyfile", metavar="PEM", help="its private key, if it is not in the same file")
    for flag, seconds, meaning in (
        ("--timeout-keep-alive", defaults.keep_alive_s, "an idle connection is kept open"),
        ("--timeout-header", defaults.header_timeout_s, "a client may take to send a request's header"),
        ("--timeout-body", defaults.body_timeout_s, "a client may take to send a request's body"),
        ("--timeout-write", defaults.write_timeout_s, "a client may leave a full connection unread"),
    ):
        group.add_argument(
            flag, type=int, default=seconds, metavar="S", help=f"seconds {meaning} (default: %(default)s)"
        )
    group.add_argument(
        "--max-body-mib",
        type=int,
        default=defaults.max_body_mib,
        metavar="MIB",
        help="largest request body (default: %(default)s)",
    )
    group.add_argument(
        "--max-receiving-mib",
        type=int,
        default=defaults.max_receiving_mib,
        metavar="MIB",
        help="memory of all bodies being received; a request beyond it gets 429 (default: %(default)s)",
    )
    group.add_argument(
        "--image-reply",
        choices=("auto", "list", "images", "both"),
        default=defaults.image_reply,
        help="where a chat message has its images: in a list as content, in its member images, in both, "
        "or as the client that asks can read them (default: %(default)s)",
    )
    group.add_argument(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="a host, address or network (10.0.0.0/8) that images may be fetched from although it is not public; "
        "may be repeated",
    )
    group.add_argument("--no-access-log", dest="access_log", action="store_false", help="do not log each request")


def http_options(args: argparse.Namespace) -> HttpOptions:
    """The settings in the options of :func:`add_arguments`, with the keys of the environment.

    Raises:
        OptionError: a value is not allowed, or a file cannot be read.
    """
    for flag in ("timeout_keep_alive", "timeout_header", "timeout_body", "timeout_write"):
        if getattr(args, flag) < 1:
            name = f"--{flag.replace('_', '-')}"
            raise OptionError(f"{name}={getattr(args, flag)} is not allowed; allowed: whole seconds, 1 or more")
    if args.max_body_mib < 1:
        raise OptionError(f"--max-body-mib={args.max_body_mib} is not allowed; allowed: an integer >= 1")
    if args.max_receiving_mib < args.max_body_mib:
        raise OptionError(
            f"--max-receiving-mib={args.max_receiving_mib} is not allowed; "
            f"allowed: at least --max-body-mib, {args.max_body_mib}"
        )
    if args.ssl_keyfile and not args.ssl_certfile:
        raise OptionError("--ssl-keyfile is given without --ssl-certfile; allowed: both, or the certificate alone")
    for flag, path in (("--ssl-certfile", args.ssl_certfile), ("--ssl-keyfile", args.ssl_keyfile)):
        if path is not None and not Path(path).is_file():
            raise OptionError(f"{flag}={path} is not a file")
    try:
        AllowedSources(args.allow_image_host)
    except ValueError as error:
        raise OptionError(f"--allow-image-host={error}") from error
    return HttpOptions(
        api_keys=_api_keys("--api-key", API_KEY_VARIABLE, args.api_key, args.api_key_file),
        admin_api_keys=_api_keys("--admin-api-key", ADMIN_KEY_VARIABLE, args.admin_api_key, args.admin_api_key_file),
        cors_origins=tuple(_origin(origin) for origin in args.cors_origin),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        keep_alive_s=args.timeout_keep_alive,
        header_timeout_s=args.timeout_header,
        body_timeout_s=args.timeout_body,
        write_timeout_s=args.timeout_write,
        access_log=args.access_log,
        max_body_mib=args.max_body_mib,
        max_receiving_mib=args.max_receiving_mib,
        image_reply=args.image_reply,
        allowed_image_hosts=tuple(args.allow_image_host),
    )


def _api_keys(flag: str, variable: str, given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Every key, from the flags, the environment and the file; an error never shows one."""
    sources = {flag: list(given)}
    if key := os.environ.get(variable):
        sources[f"${variable}"] = [key]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{flag}-file={file} cannot be read: {error}") from error
        sources[f"{flag}-file"] = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not sources[f"{flag}-file"]:
            raise OptionError(f"{flag}-file={file} holds no key; allowed: a key a line")
    for source, keys in sources.items():
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise OptionError(f"{source} holds an empty key or a blank; allowed: printable ASCII without blanks")
    return tuple(dict.fromkeys(key for keys in sources.values() for key in keys))


def _origin(origin: str) -> str:
    scheme, separator, host = origin.partition("://")
    if origin != "*" and (not separator or not scheme or not host or "/" in host):
        raise OptionError(
            f"--cors-origin={origin} is not allowed; allowed: scheme://host or scheme://host:port, or '*'"
        )
    return origin
