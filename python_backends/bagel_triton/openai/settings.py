"""What the proxy needs to know to run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field

MIB = 1024 * 1024


@dataclass(frozen=True)
class ProxySettings:
    """Where Triton is, which names requests may use, and the proxy's own limits.

    ``triton_grpc`` is ``host:port``. A request for any of ``served_model_names`` is
    served; replies to requests that name none carry the first. A stream that stays
    silent for ``silence_timeout_s`` is given up: it must exceed what ``bagel`` itself
    grants a stage. ``retry_after_s`` is what a client of an overloaded server is told.
    ``fetch_remote`` lets requests name images by ``http`` and ``https`` URLs. ``models``
    are the Triton models that must be ready for the server to be, and ``remote`` those that must
    be so elsewhere, with the gRPC address of each; None where nobody knows which models there
    are before Triton says so. Where Triton's processes
    run on this host, ``shm_prefix`` is their server's: one that dies is noticed at once.
    ``metrics_url`` is where Triton's metrics are, if that is known, for those who look for them here.
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
    remote: Mapping[str, str] = field(default_factory=dict)
    metrics_url: str | None = None

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
