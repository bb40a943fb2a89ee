"""Arguments that several commands take: declared once, and checked before anything starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from bagel_triton.deploy.files import PRESETS, preset
from bagel_triton.serving import CommandError
from bagel_triton.serving.machine import source_file

TOY = "build/tiny_bagel/checkpoint"  # small, trained, shipped with the package


def add_checkpoint(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Declare the positional argument CHECKPOINT and ``--revision``, for :func:`checkpoint`.

    Where it is ``optional``, the toy is the default.
    """
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?" if optional else None,
        help="folder of the checkpoint, or its name at the Hugging Face hub (ByteDance-Seed/BAGEL-7B-MoT): taken from "
        "the cache, or downloaded to it" + ("; without it, a toy that comes with this package" if optional else ""),
    )
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Declare ``--revision``, for :func:`checkpoint`."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub's checkpoint (default: main)")


def checkpoint(given: str | None, revision: str | None = None) -> Path:
    """The folder that ``given`` names, with every file of a checkpoint, downloaded where it has to be; or the toy's.

    Raises:
        CommandError: says what is wrong and how to get the checkpoint.
    """
    from bagel_triton.model.config import CheckpointError
    from bagel_triton.weights.folder import check_folder
    from bagel_triton.weights.hub import find_checkpoint

    try:
        folder = source_file(TOY) if given is None else find_checkpoint(given, revision)
        check_folder(folder)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    except OSError as error:  # such as a folder that this user may not read
        raise CommandError(f"checkpoint {given}: {error.filename}: {error.strerror}") from error
    return folder


def add_deploy_config(parser: argparse.ArgumentParser) -> None:
    """Declare ``--deploy-config``, for :func:`deploy_file`."""
    parser.add_argument(
        "--deploy-config",
        "--stage-configs-path",
        metavar="YAML",
        help=f"topology and limits of the stages: a file, or one of {', '.join(PRESETS)} (default: bagel)",
    )


def deploy_file(given: str | None) -> Path | None:
    """The file that ``--deploy-config`` names, a preset's or one's own; None where it is not given."""
    if given is None:
        return None
    path = Path(given)
    return path if path.is_file() else preset(given) or path


def host_port(flag: str, given: str) -> str:
    """HOST:PORT as ``given``, with or without ``http://`` or ``grpc://`` before it.

    Raises:
        CommandError: it has no host or no port; names ``flag``.
    """
    address = given.partition("://")[2].rstrip("/") if "://" in given else given
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed) or not port.isdigit() or not 0 < int(port) < 65536:
        hint = f", such as {address}:8001" if address and ":" not in address else ""
        raise CommandError(f"{flag}={given} is not allowed; allowed: HOST:PORT of Triton's gRPC{hint}")
    return address
