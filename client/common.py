"""Helpers of the clients: parsing a server's address, and a progress bar of the steps."""

from __future__ import annotations

import io
import sys
from argparse import ArgumentTypeError
from typing import Any, TextIO
from urllib.parse import SplitResult, urlsplit

from tqdm import tqdm


def http_url(text: str) -> str:
    """The URL that ``text`` is, or means by HOST:PORT, without a slash at its end; raises ArgumentTypeError."""
    parts = _parts(text, ("http", "https"))
    if parts is None:
        raise _not_allowed(text, "HOST:PORT, http://HOST:PORT, https://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def without_login(url: str) -> str:
    """``url`` without a user name and password, as it may be printed."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def grpc_address(text: str) -> str:
    """The HOST:PORT that ``text`` is, with or without a scheme; raises ArgumentTypeError."""
    parts = _parts(text, ("grpc", "http"))
    if parts is None or not parts.port or parts.path.strip("/") or parts.username is not None:
        raise _not_allowed(text, "HOST:PORT, grpc://HOST:PORT, http://HOST:PORT; there is no TLS")
    return parts.netloc


def _parts(text: str, schemes: tuple[str, ...]) -> SplitResult | None:
    """``text`` split; None where it is neither HOST:PORT nor a URL of one of ``schemes``."""
    has_scheme = "://" in text
    try:
        parts = urlsplit(text if has_scheme else f"{schemes[0]}://{text}")
        port = parts.port
        named = parts.hostname and (has_scheme or port)
        (parts.hostname or "").encode("idna")
    except ValueError:  # an invalid port, half an IPv6 address, or an impossible host name
        return None
    strange = parts.scheme not in schemes or parts.query or parts.fragment or any(map(str.isspace, text))
    return parts if named and not strange else None


def _not_allowed(text: str, allowed: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{text!r} is not allowed; allowed: {allowed}")


def print_any_text() -> None:
    """Let standard output take characters that the locale's encoding lacks, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class ProgressBar:
    """A bar on standard error, from the first progress on; only on a terminal, never in a file."""

    def __init__(self, unit: str = "step") -> None:
        self._unit = unit
        self._bar: tqdm[Any] | None = None

    def show(self, name: str, done: int, total: int) -> None:
        if self._bar is None:
            hidden = True if sys.stderr is None else None  # None: only on a terminal
            self._bar = tqdm(desc=name, total=total, unit=self._unit, leave=False, disable=hidden)
        self._bar.total, self._bar.n = total, done
        self._bar.set_description(name)

    def write(self, text: str, file: TextIO | None = None) -> None:
        """Print ``text`` above the bar, on standard output unless a ``file`` is given."""
        tqdm.write(text, file=file)

    def close(self) -> None:
        """Clear the bar until there is progress again."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
