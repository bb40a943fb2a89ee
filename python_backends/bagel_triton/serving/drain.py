"""``bagel-triton drain``: take one server of stage 1 out of service without losing a request, or put it back."""

from __future__ import annotations

import argparse
import math

from bagel_triton.serving import CommandError, flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("address", metavar="HOST:PORT", help="stage 1's Triton gRPC, as its READY line has it")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="for the jobs in flight (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="take requests again")


def run(args: argparse.Namespace) -> int:
    """Have the server refuse new jobs, and wait for those that it has.

    Raises:
        CommandError: it does not answer, or jobs are left after the timeout.
    """
    if not 0 <= args.timeout < math.inf:
        raise CommandError(f"--timeout={args.timeout:g} is not allowed; allowed: seconds >= 0")
    address = flags.host_port("HOST:PORT", args.address)

    from bagel_triton.protocol.errors import BagelError
    from bagel_triton.triton import draining
    from bagel_triton.triton.client import TritonServer

    server = TritonServer(address)
    try:
        draining.set_draining(server, not args.resume)
        if args.resume:
            print(f"{address} takes requests again")
            return 0
        print(f"{address} takes no more requests", flush=True)
        if left := draining.until_idle(server, args.timeout):
            raise CommandError(f"{left} jobs are left at {address} after {args.timeout:g} s; it still drains")
        print(f"{address} is idle")
    except BagelError as error:
        raise CommandError(f"{address}: {error.message}") from error
    finally:
        server.close()
    return 0
