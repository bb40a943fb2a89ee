"""Arguments that several commands take: declared once, and checked before anything starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bagel_triton.serving import CommandError
from bagel_triton.serving.machine import source_file

PRESETS = ("bagel", "bagel_think", "bagel_single_stage", "bagel_two_hosts")
# Flags of `vllm serve` for BAGEL that change nothing here, and what to do in place of those that would.
IGNORED_FLAGS = ("--omni", "--trust-remote-code")
REPLACED_FLAGS = {
    "--gpu-memory-utilization": "memory is what kv_tokens and max_num_seqs of --deploy-config make it; see "
    "`bagel-triton memory`",
    "--max-model-len": "set stages[0].max_model_len in --deploy-config",
    "--max-num-seqs": "set stages[].max_num_seqs in --deploy-config",
    "--omni-master-address": "stages[].address in --deploy-config says where a stage listens (bagel_two_hosts)",
    "--omni-master-port": "stages[].address in --deploy-config says where a stage listens (bagel_two_hosts)",
    "--pipeline-parallel-size": "a stage runs on one device",
    "--vae-patch-parallel-size": "the decoder runs on one device",
    "--vae-use-tiling": "set stages[].vae_use_tiling in --deploy-config",
}


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Declare the positional argument CHECKPOINT and ``--revision``, for :func:`checkpoint`."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of the checkpoint, or its name at the Hugging Face hub (ByteDance-Seed/BAGEL-7B-MoT): taken from "
        "the cache, or downloaded to it",
    )
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Declare ``--revision``, for :func:`checkpoint`."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub's checkpoint (default: main)")


def checkpoint(given: str, revision: str | None = None) -> Path:
    """The folder that ``given`` names, with every file of a checkpoint, downloaded where it has to be.

    Raises:
        CommandError: says what is wrong and how to get the checkpoint.
    """
    from bagel_triton.model.config import CheckpointError
    from bagel_triton.weights.folder import check_folder
    from bagel_triton.weights.hub import find_checkpoint

    try:
        folder = find_checkpoint(given, revision)
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
    if given in PRESETS and not Path(given).exists():
        return source_file(f"build/deploy/{given}.yaml")
    return Path(given)


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


class _Replaced(argparse.Action):
    """A flag of another server: refused, with what to do in its place."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option_string: str | None = None
    ) -> NoReturn:
        assert option_string is not None, "it is no positional argument"
        parser.error(f"{option_string} has no meaning here: {REPLACED_FLAGS[self.option_strings[-1]]}")


def _only_one(value: str) -> int:
    if value != "1":
        raise argparse.ArgumentTypeError(f"{value} is not allowed; only 1 is supported")
    return 1


def add_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """Declare flags that users bring along from `vllm serve`, which --help does not list."""
    for flag in IGNORED_FLAGS:
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tensor-parallel-size", "-tp", type=_only_one, metavar="1", help=argparse.SUPPRESS)
    short = {"--omni-master-address": ["-oma"], "--omni-master-port": ["-omp"]}
    for flag in REPLACED_FLAGS:
        names: Sequence[str] = (*short.get(flag, ()), flag)
        parser.add_argument(*names, nargs="?", action=_Replaced, help=argparse.SUPPRESS)
