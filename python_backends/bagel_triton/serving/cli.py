"""The command line: ``bagel-triton COMMAND``, or ``python -m bagel_triton COMMAND``."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import bagel_triton
from bagel_triton.protocol.errors import NEAR, format_value
from bagel_triton.serving import CommandError

PROGRAM = "bagel-triton"
VERSION = f"{PROGRAM} {bagel_triton.__version__}"
_VALUE = re.compile(r"argument (\S+): invalid (int|float) value: (.*)", re.DOTALL)
_TYPES = {"int": "an integer", "float": "a number"}
INTERRUPTED, OUTPUT_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE
PASSED_ON = "perf-analyzer"
SHELLS = ("bash", "zsh", "tcsh")
FOLDERS = ("checkpoint", "directory", "model_repository")  # arguments that name one, for completion
FILES = ("admin_api_key_file", "api_key_file", "deploy_config", "file", "output", "ssl_certfile", "ssl_keyfile")


class Command(NamedTuple):
    """A command's module: add_arguments(parser) and run(args) -> exit status. It is imported when it is called for."""

    module: str
    summary: str


COMMANDS = {
    "serve": Command("bagel_triton.serving.serve", "start Triton and the OpenAI API on a checkpoint"),
    "proxy": Command("bagel_triton.serving.proxy", "start the OpenAI API alone, for a Triton that runs elsewhere"),
    "drain": Command("bagel_triton.serving.drain", "take a server out of service once its work is done"),
    "demo": Command("bagel_triton.serving.demo", "serve a checkpoint, run one request of each task, stop"),
    "config": Command("bagel_triton.serving.config", "print a resolved deploy file, and the origin of each value"),
    "memory": Command("bagel_triton.serving.memory", "show the memory that each stage of a configuration takes"),
    "quantize": Command("bagel_triton.serving.quantize", "write a checkpoint with quantised weights"),
    "tiny-checkpoint": Command("bagel_triton.weights.tiny.checkpoint", "write a small checkpoint of random weights"),
    "perf-analyzer": Command(
        "bagel_triton.serving.perf_analyzer", "run Triton's perf_analyzer with the libraries it needs"
    ),
    "completion": Command("bagel_triton.serving.cli", "print a script that completes commands and options in a shell"),
    "version": Command("bagel_triton.serving.cli", "print the version"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others of the program, and which takes no abbreviated options."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{**options, "allow_abbrev": False})  # type: ignore[arg-type]

    def check_names(self, arguments: Sequence[str]) -> None:
        """Refuse an option that there is not before anything else is missing, and name one like it."""
        listed = [action for action in self._actions if action.help is not argparse.SUPPRESS]
        for argument in arguments:
            name = argument.partition("=")[0]
            if name == "--":
                return
            if name.startswith("--") and name not in self._option_string_actions:
                options = [option for action in listed for option in action.option_strings]
                self.error(f"{name} is not an option{_similar(name, options)}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or str(action.metavar or action.dest)
            choices = [str(choice) for choice in action.choices]
            similar = _similar(str(value), choices)
            allowed = f"{similar}{' ' if similar else '; '}allowed: {', '.join(choices)}"
            self.error(f"{name}={format_value(value)} is not allowed{allowed}")

    def error(self, message: str) -> NoReturn:
        if invalid := _VALUE.fullmatch(message):
            message = f"{invalid[1]}={invalid[3]} is not allowed; allowed: {_TYPES[invalid[2]]}"
        _print_error(f"{message} (see {self.prog} --help)")
        sys.exit(2)


def _similar(name: str, names: Iterable[str]) -> str:
    """The end of an error about ``name``: the one of ``names`` that may have been meant."""
    near = difflib.get_close_matches(name[:100], list(names), n=1, cutoff=NEAR)
    return f"; did you mean {near[0]}?" if near else ""


def build_parser(arguments: Sequence[str]) -> tuple[_Parser, dict[str, _Parser]]:
    """The program's parser and its commands'; only the command that ``arguments`` begin with has its options.

    With no ``arguments`` all commands have theirs, which imports all of them.
    """
    parser = _Parser(prog=PROGRAM, description=bagel_triton.__doc__)
    parser.add_argument("-V", "--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers: dict[str, _Parser] = {}
    for name, command in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=command.summary, description=command.summary)
        if arguments[:1] == [name] or not arguments:
            _module_of(name).add_arguments(parsers[name])
    return parser, parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error, 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [PASSED_ON] and arguments[1:2] not in (["-h"], ["--help"], ["--"]):
        arguments.insert(1, "--")  # all of its arguments are another program's
    _open_standard_files()
    parser, parsers = build_parser(arguments or ["--help"])
    parsers.get("".join(arguments[:1]), parser).check_names(arguments)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parsers[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status: int = _module_of(args.command).run(args)
        sys.stdout.flush()
    except CommandError as error:
        _print_error(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        _discard_output()
        return OUTPUT_CLOSED
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _discard_output()
        _print_error(f"the output cannot be written: {error.strerror}")
        return 1
    return status


def _open_standard_files() -> None:
    """Open those that are closed, or the next file would become one; print any text in any locale."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Nothing that the interpreter still flushes reaches standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``completion``; ``version`` ignores them."""
    if parser.prog.endswith("completion"):
        parser.add_argument("shell", choices=SHELLS, help="for example: bagel-triton completion bash >> ~/.bashrc")


def run(args: argparse.Namespace) -> int:
    """The commands ``completion`` and ``version``."""
    if args.command == "version":
        print(VERSION)
        return 0
    # The script is static: pressing Tab starts no Python.
    import shtab

    parser, parsers = build_parser(())
    for action in (action for command in parsers.values() for action in command._actions):
        if action.dest in FOLDERS or action.dest in FILES:
            action.complete = shtab.DIRECTORY if action.dest in FOLDERS else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _module_of(name: str) -> Any:
    return importlib.import_module(COMMANDS[name].module)


def _print_error(message: str) -> None:
    for line in message.splitlines():  # a deploy file's errors come all at once
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
