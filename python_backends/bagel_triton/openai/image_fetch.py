"""Images from other hosts, fetched without opening a way into this network.

A user's URL may name any host. Every address of that host is checked, again after each
redirect, and the connection goes to the checked address, so a later change of DNS has no effect.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import html
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable

import httpx

from bagel_triton import __version__
from bagel_triton.openai.settings import AllowedSources
from bagel_triton.protocol.validation import MAX_IMAGE_BYTES

MAX_REDIRECTS = 3
TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0  # of one address, so that a dead one leaves time for the next
SCHEMES = {"http": 80, "https": 443}  # and their ports
_USER_AGENT = f"bagel-triton/{__version__} (inference server fetching an image for its user) httpx/{httpx.__version__}"
_HEADERS = {"User-Agent": _USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
_MAX_REASON = 4096  # bytes of an error page that are read
_REDIRECTS = (301, 302, 303, 307, 308)

Resolver = Callable[[str, int], Awaitable[list[str]]]


class FetchError(Exception):
    """The message says why an image could not be fetched."""


async def resolve(host: str, port: int) -> list[str]:
    """The numeric addresses of ``host``, the system's preferred one first.

    Raises:
        FetchError: it has none.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError(f"the name {host} cannot be resolved: {error}") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def connect() -> httpx.AsyncBaseTransport:
    """A transport of its own: a connection must not serve another host at the same address."""
    return httpx.AsyncHTTPTransport(verify=_tls())


# Of IANA's special-purpose registries, what is_global of some Python version takes for public: protocol assignments
# (metadata servers of clouds), relay anycast, documentation, segment routing.
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16")))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


class RemoteImages:
    """Fetches what public hosts serve, within limits of time and size."""

    def __init__(
        self,
        resolve: Resolver = resolve,
        connect: Callable[[], httpx.AsyncBaseTransport] = connect,
        timeout_s: float = TIMEOUT_S,
        max_bytes: int = MAX_IMAGE_BYTES,
        allowed: AllowedSources | None = None,
    ) -> None:
        self._resolve, self._connect = resolve, connect
        self._allowed = allowed or AllowedSources()
        self._timeout_s, self._max_bytes = timeout_s, max_bytes

    async def fetch(self, url: str) -> bytes:
        """The bytes at ``url``.

        Raises:
            FetchError: it leads to nothing, to an address that is not allowed, or to too much.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(httpx.URL(url))
        except TimeoutError as error:
            raise FetchError(f"it took longer than {self._timeout_s:g} s") from error
        except httpx.InvalidURL as error:
            raise FetchError(f"the URL is malformed: {error}") from error
        except httpx.HTTPError as error:
            raise FetchError(f"the connection failed: {error or type(error).__name__}") from error

    async def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._visit(url)
            if isinstance(found, bytes):
                return found
            url = url.join(found)
        raise FetchError(f"it is redirected more than {MAX_REDIRECTS} times")

    async def _visit(self, url: httpx.URL) -> bytes | str:
        """The body of the answer, or where a redirect leads."""
        *others, last = await self._addresses(url)
        for address in others:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._get(url, address)
        return await self._get(url, last)

    async def _addresses(self, url: httpx.URL) -> list[str]:
        if url.scheme not in SCHEMES:
            raise FetchError(f"it leads to a {url.scheme or 'relative'} URL; allowed: {', '.join(SCHEMES)}")
        host = url.raw_host.decode()
        if not host:
            raise FetchError("the URL names no host")
        port = url.port if url.port is not None else SCHEMES[url.scheme]
        if not 1 <= port <= 65535:
            raise FetchError(f"port {port} does not exist; allowed: 1 to 65535")
        addresses = await self._resolve(host, port)
        for address in addresses:
            if not is_public(address) and not self._allowed.permits(host, address):
                raise FetchError(f"{host} has the address {address}; allowed: public addresses")
        return addresses

    async def _get(self, url: httpx.URL, address: str) -> bytes | str:
        headers = {**_HEADERS, "Host": url.netloc.decode()}
        if url.userinfo:
            login = f"{url.username}:{url.password}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
        request = httpx.Request(
            "GET",
            url.copy_with(host=address, fragment=None, userinfo=b""),
            headers=headers,
            extensions={
                "sni_hostname": url.raw_host.decode(),
                "timeout": httpx.Timeout(None, connect=CONNECT_TIMEOUT_S).as_dict(),
            },
        )
        async with self._connect() as transport:
            response = await transport.handle_async_request(request)
            async with contextlib.aclosing(response):
                return await self._read(response)

    async def _read(self, response: httpx.Response) -> bytes | str:
        if response.status_code in _REDIRECTS and (location := response.headers.get("Location")):
            return str(location)
        if response.status_code != 200:
            status = f"{response.status_code} {response.reason_phrase}".rstrip()
            raise FetchError(f"the host answered {status}{await _reason(response)}")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("identity", ""):  # it could grow without bound
            raise FetchError(f"the host sent it with Content-Encoding {encoding}")
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > self._max_bytes:
                raise FetchError(f"it has too many bytes; allowed: at most {self._max_bytes}")
        return bytes(body)


async def _reason(response: httpx.Response) -> str:
    """The host's own text about its refusal; empty if it sent none."""
    if not response.headers.get("Content-Type", "").startswith(("text/", "application/json")):
        return ""
    page = b""
    async for piece in response.aiter_raw():
        page += piece
        if len(page) >= _MAX_REASON:
            break
    text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>|<[^>]*>", " ", page[:_MAX_REASON].decode(errors="replace"))
    words = " ".join(html.unescape(text).split())
    return f": {words}" if words else ""


def without_login(url: str) -> str:
    """``url`` as an error may show it: without the user and password in it."""
    return re.sub(r"^([a-zA-Z]+://)[^/?#]*@", r"\1***@", url)


def is_public(address: str) -> bool:
    """Whether the numeric ``address`` is one of the public internet.

    An IPv6 address that carries an IPv4 one (mapped, 6to4, or NAT64) is as public as that.
    """
    number = ipaddress.ip_address(address)
    if isinstance(number, ipaddress.IPv6Address):
        inner = number.ipv4_mapped or number.sixtofour
        if number in _NAT64:
            inner = ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
        if inner is not None:
            number = inner
        elif number.is_site_local:
            return False
    if any(number in network for network in _SPECIAL if network.version == number.version):
        return False
    return number.is_global and not (number.is_multicast or number.is_reserved)
