"""``bagel-triton config``: the resolved values of a deploy file, and the origin of each."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec

from bagel_triton.deploy import hosts
from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError
from bagel_triton.deploy.files import PRESETS
from bagel_triton.deploy.yaml import Deployment
from bagel_triton.serving import CommandError, flags

_INTERNAL = ("checkpoint", "shm_prefix", "stage_id")  # the server's own
_WIDTH = 48  # of a line before its origin, unless it is longer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help=f"a deploy file, or one of {', '.join(PRESETS)} (default: bagel)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the file's, or auto)")
    parser.add_argument("--dtype", help="auto, float32 or bfloat16 (default: the file's, or auto)")
    parser.add_argument("--stage-id", type=int, metavar="N", help="the stage that flags are for (default: each)")
    flags.add_arguments(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of deploy files")
    parser.add_argument("--json", action="store_true", help="print values and origins as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the configuration.

    Raises:
        CommandError: the file has errors, a line for each.
    """
    if args.schema:
        from bagel_triton.deploy.json_schema import schema

        print(json.dumps(schema(), indent=2))
        return 0
    try:
        deployment = deploy_yaml.resolve(flags.deploy_file(args.file), "", flags.flags_of(args))
        hosts.check_stage(deployment.config, args.stage_id)
    except ConfigError as error:
        raise CommandError(str(error)) from error
    if args.json:
        origins = {name: str(origin) for name, origin in deployment.origins.items()}
        print(json.dumps({"config": _shown(deployment), "origins": origins, "notes": deployment.notes}, indent=2))
        return 0
    print("\n".join(_lines(deployment)))
    for note in deployment.notes:
        print(f"# note: {note}")
    return 0


def _shown(deployment: Deployment) -> dict[str, Any]:
    """The configuration as a user knows it: without the server's own values, and options of connectors not in use."""
    values: dict[str, Any] = msgspec.to_builtins(deployment.config, str_keys=True)
    unused = {"mooncake", "mooncake_store"} - {deployment.config.connector}
    return {name: value for name, value in values.items() if name not in unused and name not in _INTERNAL}


def _lines(deployment: Deployment) -> list[str]:
    """YAML, with the origin of each value as a comment beside it."""
    lines: list[tuple[str, str]] = []
    for name, value in _shown(deployment).items():
        if not isinstance(value, dict) or not value:
            lines.append((f"{name}: {_scalar(value)}", name))
            continue
        lines.append((f"{name}:", ""))
        lines += [(f"  {key}: {_scalar(entry)}", f"{name}.{key}") for key, entry in value.items()]
    origins = deployment.origins
    return [f"{text:<{_WIDTH}} # {origins.get(name, 'default')}" if name else text for text, name in lines]


def _scalar(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
