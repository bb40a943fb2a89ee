"""The command line: ``bagel-triton COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import bagel_triton
from bagel_triton.serving.command_error import CommandError

PROGRAM = "bagel-triton"
INTERRUPTED, OUTPUT_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE


class Command(NamedTuple):
    """A command's module: add_arguments(parser) and run(args) -> exit status. It is imported only when asked for."""

    module: str
    summary: str


COMMANDS = {
    "serve": Command("bagel_triton.serving.serve", "start Triton and the OpenAI API on a checkpoint"),
    "proxy": Command("bagel_triton.serving.proxy", "start the OpenAI API alone, for a Triton that runs elsewhere"),
    "demo": Command("bagel_triton.serving.demo", "serve a checkpoint, make one image, stop"),
    "tiny-checkpoint": Command("bagel_triton.weights.tiny.checkpoint", "write a small checkpoint of random weights"),
    "memory": Command("bagel_triton.serving.memory", "show the memory that each stage of a configuration takes"),
    "perf-analyzer": Command(
        "bagel_triton.serving.perf_analyzer", "run Triton's perf_analyzer with the libraries it needs"
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others of the program."""

    def error(self, message: str) -> NoReturn:
        _say(f"{message} (see {self.prog} --help)")
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error, 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=PROGRAM, description=bagel_triton.__doc__)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {bagel_triton.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = None
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary, description=command.summary)
        if arguments[:1] == [name]:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
    args = parser.parse_args(arguments)
    assert module is not None, "argparse knows the commands and accepts no option before them"
    try:
        status: int = module.run(args)
        sys.stdout.flush()
    except CommandError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # who reads the output has enough of it, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left of it may go
        return OUTPUT_CLOSED
    return status


def _say(message: str) -> None:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
