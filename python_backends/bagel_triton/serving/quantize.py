"""``bagel-triton quantize``: a checkpoint that is quantised already, so that a start reads less."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from bagel_triton.deploy.config import Quantization
from bagel_triton.serving import CommandError, flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    flags.add_checkpoint(parser)
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--quantization", choices=get_args(Quantization), default="int8", help="its form (default: %(default)s)"
    )
    parser.add_argument("--lora-path", metavar="DIR", help="a LoRA adapter (PEFT) to merge into the weights first")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="factor of what it adds (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint.

    Raises:
        CommandError: the checkpoint is no good, or the folder cannot be written.
    """
    folder = flags.checkpoint(args.checkpoint, args.revision)

    from bagel_triton.serving.memory_plan import readable
    from bagel_triton.weights.quantize import write

    try:
        adapter = None if args.lora_path is None else (args.lora_path, args.lora_scale)
        size = write(folder, args.output, args.quantization, adapter)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"wrote {args.output}: the transformer in {args.quantization} takes {readable(size)}")
    return 0
