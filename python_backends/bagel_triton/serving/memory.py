"""``bagel-triton memory``: what each stage will take, and whether this machine has it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bagel_triton.deploy.config import ConfigError, DeployConfig
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import TEXT2IMG, GenerationRequest
from bagel_triton.protocol.validation import resolve_flow
from bagel_triton.serving import available_memory
from bagel_triton.serving.command_error import CommandError

# Heavy modules are imported once the arguments are known to be good: --help must not wait for torch.
if TYPE_CHECKING:
    from bagel_triton.model.device import Placement
    from bagel_triton.serving.memory_plan import MemoryPlan
    from bagel_triton.weights.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    parser.add_argument("--deploy-config", metavar="YAML", type=Path, help="deploy YAML")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of the KV arena (thinker.kv_tokens)")
    parser.add_argument("--max-requests", type=int, metavar="N", help="images denoised together (dit.max_num_seqs)")
    side = TEXT2IMG.side
    parser.add_argument("--height", type=int, help=f"of every image, in pixels (default: {side})")
    parser.add_argument("--width", type=int, help=f"of every image, in pixels (default: {side})")
    parser.add_argument("--device", help="auto, cpu, cuda, also where there is none, or cuda:N (default: the YAML's)")
    parser.add_argument("--dtype", help="auto, float32 or bfloat16 (default: the YAML's)")


def run(args: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        CommandError: the checkpoint or an argument is wrong, or the device does not answer.
    """
    from bagel_triton.serving import memory_plan as memory
    from bagel_triton.weights.checkpoint import Checkpoint

    try:
        config = _configuration(args)
        placement, here = _placement(config)
        checkpoint = Checkpoint(args.checkpoint)
        height, width = _size(checkpoint, args.height, args.width)
        available = available_memory.read(placement) if here else None
    except (ValueError, InvalidRequest) as error:
        raise CommandError(str(error)) from error
    private = None if available is None else available.private_weights
    need = memory.plan(checkpoint, config, placement, height, width, private is None)
    print(f"pipeline {config.pipeline} on {placement.device} in {placement.dtype_name}")
    together = f"images of {width}x{height} pixels denoised together: {config.dit.max_num_seqs}"
    print(f"KV arena of {config.thinker.kv_tokens} tokens; {together}")
    print(f"\n{table(need)}\n")
    print("The dit's KV are its copies of the contexts of editing such images. Activations are estimates.")
    print("Together, weights that stages share count once." if need.shares_weights else "No stages share weights.")
    if private is not None and not config.topology.one_process:
        print(f"They cannot on {placement.device}: {private}.")
    if available is not None:
        try:
            memory.check(need, config, placement, available)
            print("This machine has it.")
        except memory.NotEnoughMemory as error:
            print(f"This machine does not have it: {error}")
    return 0


def require(config: DeployConfig) -> None:
    """Refuse to start stages that would not fit into this machine.

    Raises:
        CommandError: what is needed, what there is, and what to lower.
    """
    from bagel_triton.model.device import resolve
    from bagel_triton.serving import memory_plan as memory
    from bagel_triton.weights.checkpoint import Checkpoint

    try:
        checkpoint, placement = Checkpoint(config.checkpoint), resolve(config.device, config.dtype)
        available = available_memory.read(placement)
        shares_weights = available.private_weights is None
        need = memory.plan(checkpoint, config, placement, *_size(checkpoint, None, None), shares_weights)
        memory.check(need, config, placement, available)
    except ValueError as error:
        raise CommandError(str(error)) from error


def table(need: MemoryPlan) -> str:
    """``need`` for a person: a row a stage, and one for all together."""
    from bagel_triton.serving.memory_plan import readable

    rows: list[tuple[str, ...]] = [("stage", "weights", "KV a token", "KV", "activations", "total")]
    for stage in need.stages:
        token = readable(need.kv_token) if stage.kv else "-"
        sizes = (readable(size) for size in (stage.kv, stage.activations, stage.total))
        rows.append((stage.stage, readable(stage.weights), token, *sizes))
    sizes = (readable(size) for size in (need.kv, need.activations, need.total))
    rows.append(("together", readable(need.weights), "", *sizes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(map("  ".join, lines))


def _configuration(args: argparse.Namespace) -> DeployConfig:
    """The deploy YAML's configuration, or the default one, with what the arguments change."""
    from bagel_triton.deploy import yaml as deploy_yaml

    checkpoint = str(args.checkpoint)
    config = deploy_yaml.load(args.deploy_config, checkpoint) if args.deploy_config else DeployConfig(checkpoint)
    changes: dict[str, Any] = {name: getattr(args, name) for name in ("device", "dtype") if getattr(args, name)}
    if args.max_model_len is not None:
        changes["thinker"] = msgspec.structs.replace(config.thinker, kv_tokens=args.max_model_len)
    if args.max_requests is not None:
        changes["dit"] = msgspec.structs.replace(config.dit, max_num_seqs=args.max_requests)
    return msgspec.structs.replace(config, **changes)


def _placement(config: DeployConfig) -> tuple[Placement, bool]:
    """Where the stages would be, and whether that is on this machine."""
    import torch

    from bagel_triton.model.device import DTYPES, Placement, resolve

    if config.device != "cuda" or torch.cuda.is_available():
        return resolve(config.device, config.dtype), True
    if config.dtype not in DTYPES:
        raise ConfigError(f"this machine has no device cuda, so dtype must be one of {', '.join(DTYPES)}")
    return Placement(torch.device("cuda"), DTYPES[config.dtype]), False


def _size(checkpoint: Checkpoint, height: int | None, width: int | None) -> tuple[int, int]:
    """The images' height and width in pixels, checked, with their defaults."""
    request = GenerationRequest(height=height, width=width)
    flow = resolve_flow(request, checkpoint.config.latent.max_side, TEXT2IMG)
    return flow.height, flow.width
