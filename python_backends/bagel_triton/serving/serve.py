"""``bagel-triton serve``: check everything, start the server, stop it on a signal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import bagel_triton
from bagel_triton.deploy import hosts
from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import ConfigError, DeployConfig
from bagel_triton.deploy.connector import ConnectorChoice, choose
from bagel_triton.ipc import prefix as shared_memory
from bagel_triton.openai.settings import HttpOptions, OptionError, ProxySettings, http_options
from bagel_triton.openai.settings import add_arguments as add_http_arguments
from bagel_triton.serving import memory, ports, run_directory, source_tree, tritonserver
from bagel_triton.serving.command_error import CommandError
from bagel_triton.serving.stop_signals import Stopped, StopSignals
from bagel_triton.telemetry import tracing

# Heavy modules are imported once the arguments are known to be good: --help must not wait for torch.
if TYPE_CHECKING:
    from bagel_triton.model.device import Placement

ALIASES = ("bagel", "BAGEL-7B-MoT", "ByteDance-Seed/BAGEL-7B-MoT")


@dataclass(frozen=True)
class ServeOptions:
    """The command's arguments; port 0 means any free one."""

    checkpoint: Path
    host: str
    port: int
    triton_http_port: int
    triton_grpc_port: int
    triton_metrics_port: int
    device: str | None
    dtype: str | None
    deploy_config: Path | None
    served_model_name: str | None
    model_repository: Path | None
    verbose: bool
    fetch_remote: bool = True
    stage_id: int | None = None
    headless: bool = False
    host_address: str | None = None
    http: HttpOptions = field(default_factory=HttpOptions)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names requests may use, the one that replies carry first."""
        own = self.served_model_name or self.checkpoint.resolve().name
        return tuple(dict.fromkeys((own, *ALIASES)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments, one per field of :class:`ServeOptions`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    parser.add_argument("--host", default=ports.LOOPBACK, help="address of the OpenAI API (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8091, help="its port, 0 for a free one (default: %(default)s)")
    for protocol in ("http", "grpc", "metrics"):
        parser.add_argument(
            f"--triton-{protocol}-port", type=int, default=0, help="0 for a free one (default: %(default)s)"
        )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the deploy YAML's, or auto)")
    parser.add_argument("--dtype", help="auto, float32 or bfloat16 (default: the deploy YAML's, or auto)")
    parser.add_argument(
        "--deploy-config", "--stage-configs-path", metavar="YAML", type=Path, help="topology and limits of the stages"
    )
    parser.add_argument("--stage-id", metavar="N", type=int, help="serve this stage only; others are at their address")
    parser.add_argument("--headless", action="store_true", help="no OpenAI API, for a stage that stage 0 calls")
    parser.add_argument("--host-address", metavar="HOST", help="this host, as the other stage's reaches it")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the checkpoint folder's name")
    parser.add_argument("--model-repository", metavar="DIR", type=Path, help="default: the source tree's")
    parser.add_argument("--verbose", action="store_true", help="show Triton's log, with its details")
    add_http_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; the exit status.

    Raises:
        CommandError: the server cannot start, or ended by itself.
    """
    given = options(args)
    with StopSignals() as signals:
        try:
            asyncio.run(_serve(given, signals))
        except Stopped:
            print("stopping", flush=True)
    return 0


def options(args: argparse.Namespace) -> ServeOptions:
    """The options in ``args``.

    Raises:
        CommandError: one is not allowed.
    """
    names = (option.name for option in fields(ServeOptions) if option.name != "http")
    try:
        return ServeOptions(**{name: getattr(args, name) for name in names}, http=http_options(args))
    except OptionError as error:
        raise CommandError(str(error)) from error


async def _serve(options: ServeOptions, signals: StopSignals) -> None:
    from bagel_triton.openai import http_server

    config = _configuration(options)
    with _listeners(options) as listeners, run_directory.created() as directory:
        grpc_host, grpc_port = config.own_address or (ports.LOOPBACK, 0)
        http_port, grpc_port, metrics_port = ports.choose(
            {
                "--triton-http-port": options.triton_http_port,
                "--triton-grpc-port": options.triton_grpc_port or grpc_port,
                "--triton-metrics-port": options.triton_metrics_port,
            },
            {"--triton-grpc-port": grpc_host},
        ).values()
        grpc = f"{grpc_host}:{grpc_port}"
        urls = [http_server.base_url(listener, options.http) for listener in listeners]
        metrics_url = f"http://{ports.LOOPBACK}:{metrics_port}/metrics"
        placement = _check(config)
        connector = _connector(config, placement)
        repository = _model_repository(options)

        from bagel_triton.openai.app import create_app
        from bagel_triton.serving.supervisor import Launch, supervise

        for prefix in shared_memory.sweep_leftovers():
            print(f"removed the shared memory of a server that died: {prefix}", flush=True)
        with _shared_memory() as shared:
            server = tritonserver.find(directory)
            deploy = msgspec.structs.replace(
                config, shm_prefix=shared.prefix, device=placement.device, dtype=placement.dtype_name
            )
            memory.require(deploy)
            deploy.write(directory / "deploy.yaml")
            choices = {
                "checkpoint": deploy.checkpoint,
                "pipeline": deploy.pipeline,
                **hosts.format_value(deploy),
                "model names": ", ".join(options.model_names),
                "device": placement.device,
                "dtype": placement.dtype_name,
                "attention": placement.attention,
                "KV connector": connector,
                "OpenAI API": " and ".join(urls) or "none (headless)",
                "Triton HTTP": f"{ports.LOOPBACK}:{http_port}",
                "Triton gRPC": grpc,
                "Triton metrics": metrics_url,
                **({"traces": traces} if (traces := tracing.destination()) else {}),
                "tritonserver": server.program,
                "log": directory / run_directory.LOG_FILE,
            }
            print(f"bagel-triton {bagel_triton.__version__}")
            print("\n".join(f"  {name:<15} {value}" for name, value in choices.items()), flush=True)
            # What is loaded now is never garbage, and walking it took half a second at the end.
            gc.freeze()
            http_server.configure_logging()
            await supervise(
                Launch(
                    command=server.command(
                        repository,
                        deploy.models,
                        http_port=http_port,
                        grpc_port=grpc_port,
                        metrics_port=metrics_port,
                        shm_prefix=shared.prefix,
                        verbose=options.verbose,
                        grpc_host=grpc_host,
                    ),
                    environment=server.environment(directory / "deploy.yaml"),
                    models=deploy.models,
                    http_port=http_port,
                    log=directory / run_directory.LOG_FILE,
                    proxy=None
                    if not listeners
                    else create_app(
                        ProxySettings(
                            grpc,
                            options.model_names,
                            fetch_remote=options.fetch_remote,
                            models=deploy.models,
                            shm_prefix=shared.prefix,
                            remote=deploy.remote,
                            metrics_url=metrics_url,
                            http=options.http,
                        )
                    ),
                    shared=shared,
                    listeners=listeners,
                    url=urls[0] if urls else grpc,
                    addresses=dict.fromkeys(deploy.models, grpc) | deploy.remote,
                    verbose=options.verbose,
                ),
                signals.awaited(),
            )


def _configuration(options: ServeOptions) -> DeployConfig:
    """The deploy YAML's configuration, or the default one, with the command line's say on top."""
    checkpoint = str(options.checkpoint.resolve())
    try:
        path = options.deploy_config
        config = DeployConfig(checkpoint) if path is None else deploy_yaml.load(path, checkpoint)
        config = hosts.on_this_host(config, options.stage_id, options.host_address, options.headless)
    except ConfigError as error:
        raise CommandError(str(error)) from error
    given = {"device": options.device, "dtype": options.dtype}
    return msgspec.structs.replace(config, **{name: value for name, value in given.items() if value is not None})


@contextlib.contextmanager
def _listeners(options: ServeOptions) -> Iterator[list[socket.socket]]:
    """The sockets of the HTTP API; none where there is no API."""
    from bagel_triton.openai import http_server

    try:
        http_server.check_tls(options.http)
        listeners = [] if options.headless else http_server.listen(options.host, options.port)
    except OptionError as error:
        raise CommandError(str(error)) from error
    with contextlib.ExitStack() as held:
        for listener in listeners:
            held.enter_context(listener)
        if (warning := http_server.exposure(listeners, options.http)) is not None:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        yield listeners


def _shared_memory() -> shared_memory.SharedMemoryPrefix:
    try:
        return shared_memory.SharedMemoryPrefix()
    except shared_memory.SharedMemoryUnavailable as error:
        raise CommandError(str(error)) from error


def _check(config: DeployConfig) -> Placement:
    """Where the checkpoint will run, once it is known to be one."""
    from bagel_triton.model.device import resolve
    from bagel_triton.model.tokenizer import Tokenizer
    from bagel_triton.weights.checkpoint import inspect

    try:
        model = inspect(config.checkpoint)
        Tokenizer(config.checkpoint, model.language.vocab_size)  # else each stage would find out, minutes later
        return resolve(config.device, config.dtype)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _connector(config: DeployConfig, placement: Placement) -> ConnectorChoice:
    """What will carry contexts there, before a stage that cannot use it has loaded anything."""
    try:
        return choose(config, placement.device)
    except ConfigError as error:
        raise CommandError(str(error)) from error


def _model_repository(options: ServeOptions) -> Path:
    if options.model_repository is None:
        return source_tree.find("model_repository", "give one with --model-repository")
    if not options.model_repository.is_dir():
        raise CommandError(f"--model-repository={options.model_repository} is not a folder")
    return options.model_repository.resolve()
