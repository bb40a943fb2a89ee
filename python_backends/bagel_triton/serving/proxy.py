"""``bagel-triton proxy``: the HTTP API alone, for a Triton that runs elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import sys

import uvicorn

from bagel_triton.openai import http_server
from bagel_triton.openai.app import create_app
from bagel_triton.openai.settings import MIB, OptionError, ProxySettings, http_options
from bagel_triton.openai.settings import add_arguments as add_http_arguments
from bagel_triton.serving import CommandError, flags
from bagel_triton.serving.machine import LOOPBACK

SHUTDOWN_GRACE_S = 5
TRITON_METRICS_PORT = 8002  # tritonserver's default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--triton-grpc",
        default=f"{LOOPBACK}:8001",
        metavar="HOST:PORT",
        help="Triton's gRPC address (default: %(default)s)",
    )
    parser.add_argument(
        "--triton-metrics",
        metavar="URL",
        help=f"Triton's metrics, a part of /metrics here (default: its gRPC host, port {TRITON_METRICS_PORT})",
    )
    parser.add_argument("--host", default=LOOPBACK, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8091, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        default=["bagel"],
        metavar="NAME",
        help="names that requests may give as model; the first is listed, and is the default (default: bagel)",
    )
    parser.add_argument(
        "--lora-modules",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the server's LoRA adapters, which requests may give as model too; listed beside it",
    )
    add_http_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; uvicorn raises the signal again once all is closed.

    Raises:
        CommandError: an argument is not allowed, or the port is busy.
    """
    triton = flags.host_port("--triton-grpc", args.triton_grpc)
    try:
        options = http_options(args)
        http_server.check_tls(options)
        listeners = http_server.listen(args.host, args.port)
    except OptionError as error:
        raise CommandError(str(error)) from error
    settings = ProxySettings(
        triton_grpc=triton,
        served_model_names=tuple(args.served_model_name),
        max_body_bytes=options.max_body_mib * MIB,
        fetch_remote=args.fetch_remote,
        metrics_url=args.triton_metrics or f"http://{triton.rpartition(':')[0]}:{TRITON_METRICS_PORT}/metrics",
        lora_modules=tuple(name.partition("=")[0] for name in args.lora_modules),
        http=options,
    )
    with contextlib.ExitStack() as held:
        for listener in listeners:
            held.enter_context(listener)
        urls = " and ".join(http_server.base_url(listener, options) for listener in listeners)
        print(f"proxy at {urls} for Triton at {triton}", flush=True)
        if (warning := http_server.exposure(listeners, options)) is not None:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        http_server.configure_logging()
        config = http_server.config(create_app(settings), options, SHUTDOWN_GRACE_S)
        uvicorn.Server(config).run(sockets=listeners)
    return 0
