"""Where a server is: what the clients' ``--server`` takes."""

from __future__ import annotations

from argparse import ArgumentTypeError
from urllib.parse import SplitResult, urlsplit


def http_url(text: str) -> str:
    """The URL that ``text`` is, or means by HOST:PORT, without a slash at its end; raises ArgumentTypeError."""
    parts = _parts(text, ("http", "https"))
    if parts is None:
        raise _not_allowed(text, "HOST:PORT, http://HOST:PORT, https://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def without_login(url: str) -> str:
    """``url`` as it may be shown: a password in it is nobody else's business."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def grpc_address(text: str) -> str:
    """The HOST:PORT that ``text`` is, with or without a scheme; raises ArgumentTypeError."""
    parts = _parts(text, ("grpc", "http"))
    if parts is None or not parts.port or parts.path.strip("/") or parts.username is not None:
        raise _not_allowed(text, "HOST:PORT, grpc://HOST:PORT, http://HOST:PORT; there is no TLS")
    return parts.netloc


def _parts(text: str, schemes: tuple[str, ...]) -> SplitResult | None:
    """``text`` taken apart; None where it is neither HOST:PORT nor a URL of one of ``schemes``."""
    has_scheme = "://" in text
    try:
        parts = urlsplit(text if has_scheme else f"{schemes[0]}://{text}")
        port = parts.port
        named = parts.hostname and (has_scheme or port)
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port that is none, half an IPv6 address, a name that no host can have
        return None
    strange = parts.scheme not in schemes or parts.query or parts.fragment or any(map(str.isspace, text))
    return parts if named and not strange else None


def _not_allowed(text: str, allowed: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{text!r} is not allowed; allowed: {allowed}")
