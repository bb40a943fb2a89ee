"""Running the proxy on its own, beside a Triton that runs elsewhere."""

from __future__ import annotations

import argparse

import uvicorn

from bagel_triton.openai.app import create_app
from bagel_triton.openai.settings import MIB, ProxySettings, add_fetch_remote
from bagel_triton.serving import ports
from bagel_triton.serving.command_error import CommandError

SHUTDOWN_GRACE_S = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the proxy's arguments to ``parser``."""
    parser.add_argument("--triton-grpc", default="127.0.0.1:8001", metavar="HOST:PORT", help="Triton's gRPC address")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8091, help="port to listen on; 0 takes a free one")
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        default=["bagel"],
        metavar="NAME",
        help="names requests may give as model; the first is reported where none was given",
    )
    parser.add_argument("--max-body-mib", type=int, default=64, metavar="MIB", help="largest request body")
    add_fetch_remote(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; uvicorn raises the signal again once all is closed.

    Raises:
        CommandError: an argument is not allowed, or the port is busy.
    """
    if args.max_body_mib < 1:
        raise CommandError(f"--max-body-mib={args.max_body_mib} is not allowed; allowed: an integer >= 1")
    settings = ProxySettings(
        triton_grpc=args.triton_grpc,
        served_model_names=tuple(args.served_model_name),
        max_body_bytes=args.max_body_mib * MIB,
        fetch_remote=args.fetch_remote,
    )
    with ports.listen(args.host, args.port, "--port") as listener:
        print(f"proxy at {ports.base_url(listener)} for Triton at {args.triton_grpc}", flush=True)
        config = uvicorn.Config(
            create_app(settings),
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0
