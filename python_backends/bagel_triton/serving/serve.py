"""``bagel-triton serve``: check everything, start the server, stop it on a signal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import math
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import bagel_triton
from bagel_triton.deploy import hosts
from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.deploy.config import POLICIES, ConfigError, DeployConfig, Policy
from bagel_triton.deploy.connector import ConnectorChoice, choose
from bagel_triton.deploy.topology import DECODER, DIT, THINKER
from bagel_triton.ipc import shm as shared_memory
from bagel_triton.model.cpu.row_stable import kernels_summary
from bagel_triton.openai.settings import MIB, HttpOptions, OptionError, ProxySettings, http_options
from bagel_triton.openai.settings import add_arguments as add_http_arguments
from bagel_triton.parallel import sizes
from bagel_triton.protocol.adapters import is_a_models
from bagel_triton.protocol.errors import format_value
from bagel_triton.protocol.messages import LATENT_STRIDE
from bagel_triton.serving import CommandError, flags, machine, memory, rendezvous, tritonserver
from bagel_triton.serving.machine import LOOPBACK
from bagel_triton.serving.process import GRACE_S, Stopped, StopSignals, log_event
from bagel_triton.telemetry import tracing

# Heavy modules are imported once the arguments are known to be good: --help must not wait for torch.
if TYPE_CHECKING:
    from bagel_triton.model.device import Placement

ALIASES = ("bagel", "BAGEL-7B-MoT", "ByteDance-Seed/BAGEL-7B-MoT")
API_ONLY = ("served_model_name", "omni_lb_policy", "while_asleep")  # beside the HTTP API's own options
PORTS = ("triton_http_port", "triton_grpc_port", "triton_metrics_port")


@dataclass(frozen=True)
class ServeOptions:
    """The command's arguments; port 0 means any free one."""

    checkpoint: str
    revision: str | None
    host: str
    port: int
    triton_http_port: int
    triton_grpc_port: int
    triton_metrics_port: int
    triton_metrics_host: str
    deploy_config: str | None
    served_model_name: list[str] | None
    model_repository: Path | None
    verbose: bool
    fetch_remote: bool = True
    stage_id: int | None = None
    headless: bool = False
    host_address: str | None = None
    omni_master_address: str | None = None
    omni_master_port: int | None = None
    omni_lb_policy: Policy | None = None
    init_timeout: float | None = None
    shutdown_timeout: float = GRACE_S
    http: HttpOptions = field(default_factory=HttpOptions)
    overrides: deploy_yaml.Flags = deploy_yaml.NO_FLAGS
    unused: tuple[str, ...] = ()

    def model_names(self, checkpoint: Path) -> tuple[str, ...]:
        """The names that requests may use, the one that replies carry first."""
        from bagel_triton.weights.hub import checkpoint_name, repository_name

        own, repository = self.served_model_name or [checkpoint_name(checkpoint)], repository_name(checkpoint)
        return tuple(dict.fromkeys((*own, *ALIASES, *([] if repository is None else [repository]))))


@dataclass(frozen=True)
class Addresses:
    """Addresses of a server; ``listeners`` are the HTTP API's sockets, none for a headless server."""

    listeners: list[socket.socket]
    urls: list[str]
    http_port: int
    grpc_host: str
    grpc_port: int
    metrics_host: str
    metrics_port: int

    @property
    def grpc(self) -> str:
        return f"{self.grpc_host}:{self.grpc_port}"

    @property
    def url(self) -> str:
        """The server's address: the HTTP API, or Triton's gRPC if there is none."""
        return self.urls[0] if self.urls else self.grpc

    @property
    def metrics_url(self) -> str:
        return f"http://{self.metrics_host}:{self.metrics_port}/metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments, one per field of :class:`ServeOptions`."""
    flags.add_checkpoint(parser)
    parser.add_argument("--host", default=LOOPBACK, help="address of the OpenAI API (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8091, help="its port, 0 for a free one (default: %(default)s)")
    for protocol in ("http", "grpc", "metrics"):
        parser.add_argument(
            f"--triton-{protocol}-port", type=int, default=0, help="0 for a free one (default: %(default)s)"
        )
    parser.add_argument(
        "--triton-metrics-host",
        default=LOOPBACK,
        metavar="HOST",
        help="address of Triton's metrics, for a stage without an API of its own (default: %(default)s)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the deploy YAML's, or auto)")
    parser.add_argument("--dtype", help="auto, float32 or bfloat16 (default: the deploy YAML's, or auto)")
    flags.add_deploy_config(parser)
    parser.add_argument("--stage-id", metavar="N", type=int, help="serve this stage only; others are at their address")
    parser.add_argument("--headless", action="store_true", help="no OpenAI API, for a stage that stage 0 calls")
    parser.add_argument("-oma", "--omni-master-address", metavar="HOST", help="stage 0's host, where stage 1 registers")
    parser.add_argument(
        "-omp",
        "--omni-master-port",
        metavar="PORT",
        type=int,
        help=f"port for that (default: {rendezvous.DEFAULT_PORT})",
    )
    parser.add_argument(
        "--host-address",
        "-ora",
        "--omni-replica-address",
        metavar="HOST",
        action=flags.Once,
        help="this host, as the other stage's reaches it",
    )
    parser.add_argument(
        "--omni-lb-policy",
        choices=POLICIES,
        help=f"how stage 0 shares requests among the servers of stage 1 (default: {POLICIES[0]})",
    )
    parser.add_argument(
        "--while-asleep",
        choices=("wait", "refuse"),
        help="what becomes of requests while the server sleeps: they wait, or get 503 (default: wait)",
    )
    parser.add_argument(
        "--init-timeout", metavar="S", type=_seconds, help="give up a start that takes longer (default: never)"
    )
    parser.add_argument(
        "--shutdown-timeout",
        metavar="S",
        type=_seconds,
        default=GRACE_S,
        help="after SIGTERM, let requests in flight finish for so long (default: %(default)s)",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests may give as model; replies carry the first (default: the checkpoint's name)",
    )
    parser.add_argument("--model-repository", metavar="DIR", type=Path, help="default: the installed one")
    parser.add_argument("--verbose", action="store_true", help="show Triton's log, with its details")
    add_http_arguments(parser)
    flags.add_arguments(parser, exclude=("init_timeout", "omni_lb_policy", "omni_replica_address"))


def _seconds(text: str) -> float:
    """A flag's value in seconds; argparse names the flag in the error."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: seconds >= 0")
    return value


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
            log_event("stopping")
    return 0


def options(args: argparse.Namespace) -> ServeOptions:
    """The options in ``args``.

    Raises:
        CommandError: one is not allowed.
    """
    names = (option.name for option in fields(ServeOptions) if option.name not in ("http", "overrides", "unused"))
    given = {name: getattr(args, name) for name in names}
    try:
        options = ServeOptions(**given, http=http_options(args), overrides=flags.flags_of(args))
    except OptionError as error:
        raise CommandError(str(error)) from error
    return replace(options, unused=_unused(args) if options.headless and options.stage_id == 1 else ())


def _unused(args: argparse.Namespace) -> tuple[str, ...]:
    """The flags in ``args`` of the OpenAI API, which a headless server does not have.

    Raises:
        CommandError: one says where the API listens.
    """
    http, every = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_http_arguments(http)
    add_arguments(every)
    names = {action.dest for action in http._actions} | {"host", "port", *API_ONLY}
    found = {
        action.dest: action.option_strings[-1]
        for action in every._actions
        if action.dest in names and getattr(args, action.dest, action.default) != action.default
    }
    for name in ("host", "port"):
        if found.pop(name, None) and getattr(args, name) != 0:  # any free port is none at all
            raise CommandError(
                f"--{name}={getattr(args, name)} with --headless: there is no OpenAI API; stage 1 listens on "
                "--host-address at --triton-grpc-port"
            )
    return tuple(found.values())


async def _serve(options: ServeOptions, signals: StopSignals) -> None:
    for name in PORTS:
        machine.check_port(f"--{name.replace('_', '-')}", getattr(options, name))
    repository = _model_repository(options)
    deployment = _configuration(options)  # before a download, which takes long
    checkpoint = flags.checkpoint(options.checkpoint, options.revision)
    names = options.model_names(checkpoint)
    config = _with_folders(deployment.config, checkpoint, names)
    if options.omni_lb_policy is not None:
        bagel = msgspec.structs.replace(config.bagel, lb_policy=options.omni_lb_policy)
        config = msgspec.structs.replace(config, bagel=bagel)
    ready_by = math.inf if options.init_timeout is None else time.monotonic() + options.init_timeout
    with (
        _registered(options, config, ready_by) as (config, registrations),
        _addresses(options, config) as addresses,
        machine.run_directory() as directory,
    ):
        placement = _placement(config)
        _check_adapters(config)
        dit_device = _dit_device(config, placement)
        connector = _connector(config, placement.device, dit_device)
        _check_ranks(msgspec.structs.replace(config, device=placement.device, dit_device=dit_device))
        _check_default_size(config)

        from bagel_triton.openai import http_server
        from bagel_triton.openai.app import create_app
        from bagel_triton.serving.supervisor import Launch, StageServers, supervise

        for prefix in shared_memory.sweep_leftovers():
            print(f"removed the shared memory of a server that died: {prefix}", flush=True)
        with _shared_memory() as shared:
            server = tritonserver.find(directory)
            deploy = msgspec.structs.replace(
                config,
                shm_prefix=shared.prefix,
                device=placement.device,
                dit_device=dit_device,
                dtype=placement.dtype_name,
            )
            deploy = memory.require(deploy, deployment.default_pool)
            deploy.write(directory / "deploy.yaml")
            summary = {
                **_summary(options, config, deploy, placement, names),
                "KV connector": connector,
                **({"ranks": ranks} if (ranks := sizes.summary(deploy)) else {}),
                **_request_defaults(deploy),
                "OpenAI API": " and ".join(addresses.urls) or "none (headless)",
                "Triton HTTP": f"{LOOPBACK}:{addresses.http_port}",
                "Triton gRPC": addresses.grpc,
                "Triton metrics": addresses.metrics_url,
                **({"traces": traces} if (traces := tracing.destination()) else {}),
                "tritonserver": server.program,
                "log": directory / machine.LOG_FILE,
            }
            _print_summary(summary, deployment.notes, options)
            servers = StageServers(lambda: deploy.remote_addresses)
            if registrations is not None:
                servers = StageServers(registrations.addresses)
            proxy = ProxySettings(
                addresses.grpc,
                names,
                fetch_remote=options.fetch_remote,
                models=deploy.models,
                shm_prefix=shared.prefix,
                remote=deploy.remote_models,
                remote_addresses=servers.addresses,
                lora_modules=tuple(deploy.lora_modules),
                output_modalities=("text",) if deploy.load == "understanding" else ("text", "image"),
                metrics_url=addresses.metrics_url,
                max_body_bytes=options.http.max_body_mib * MIB,
                http=options.http,
            )
            # What is loaded now is never garbage, and walking it took half a second at the end.
            gc.freeze()
            http_server.configure_logging()
            await supervise(
                Launch(
                    command=server.command(
                        repository,
                        deploy.models,
                        http_port=addresses.http_port,
                        grpc_port=addresses.grpc_port,
                        metrics_port=addresses.metrics_port,
                        metrics_host=addresses.metrics_host,
                        shm_prefix=shared.prefix,
                        verbose=options.verbose,
                        grpc_host=addresses.grpc_host,
                    ),
                    environment=server.environment(directory / "deploy.yaml"),
                    models=deploy.models,
                    http_port=addresses.http_port,
                    log=directory / machine.LOG_FILE,
                    proxy=create_app(proxy) if addresses.listeners else None,
                    shared=shared,
                    listeners=addresses.listeners,
                    url=addresses.url,
                    grpc=addresses.grpc,
                    remote=deploy.remote_models,
                    servers=servers,
                    ready_by=ready_by,
                    shutdown_timeout_s=options.shutdown_timeout,
                    verbose=options.verbose,
                ),
                signals.awaited(),
            )


def _with_folders(config: DeployConfig, checkpoint: Path, names: tuple[str, ...]) -> DeployConfig:
    """``config`` with the folders that it names as the stages find them, whatever their working directory.

    Raises:
        CommandError: a folder is not there, or an adapter has one of the model's ``names``.
    """
    config = msgspec.structs.replace(config, checkpoint=str(checkpoint.resolve()))
    if config.lora_path:
        config = msgspec.structs.replace(config, lora_path=str(Path(config.lora_path).expanduser().resolve()))
    if config.lora_dir:
        if not Path(config.lora_dir).expanduser().is_dir():
            raise CommandError(f"--lora-dir={config.lora_dir} is not a folder")
        config = msgspec.structs.replace(config, lora_dir=str(Path(config.lora_dir).expanduser().resolve()))
    modules = {name: str(Path(folder).resolve()) for name, folder in config.lora_modules.items()}
    if twice := sorted(name for name in modules if is_a_models(name, names)):
        allowed = "another name, and none that begins with one of the model's and a colon"
        raise CommandError(f"--lora-modules={twice[0]} is a name of the model as well; allowed: {allowed}")
    return msgspec.structs.replace(config, lora_modules=modules)


def _summary(
    options: ServeOptions, config: DeployConfig, deploy: DeployConfig, placement: Placement, names: tuple[str, ...]
) -> dict[str, object]:
    """What is served, and on what: ``deploy``, which ``config`` became."""
    stage_1 = "" if deploy.dit_device is None else f", stage 1 on {deploy.dit_device}"
    shares_gpu = placement.torch_device.type == "cuda" and not deploy.topology.one_process
    return {
        "checkpoint": deploy.checkpoint,
        "pipeline": f"{deploy.pipeline} ({_source(options)})",
        **hosts.stage_summary(deploy),
        "model names": ", ".join(names),
        "device": _reason(placement.device, config.device) + stage_1,
        "dtype": _reason(placement.dtype_name, config.dtype, f"for {placement.device}"),
        "quantization": _quantization(config, deploy),
        **({"weights": f"{deploy.load} only"} if deploy.load != "all" else {}),
        **({"LoRA adapter": f"{deploy.lora_path} x {deploy.lora_scale:g}"} if deploy.lora_path else {}),
        **({"LoRA modules": ", ".join(deploy.lora_modules)} if deploy.lora_modules else {}),
        "attention": placement.attention,
        **({"kernels": kernels_summary(placement.torch_dtype)} if placement.device == "cpu" else {}),
        **({"GPU shared by": machine.gpu_sharing()} if shares_gpu else {}),
        **({"KV pool": memory.pool_summary(deploy)} if deploy.stage_id != 1 else {}),
    }


def _print_summary(summary: dict[str, object], notes: tuple[str, ...], options: ServeOptions) -> None:
    """Print the choices, and what of them changes nothing."""
    print(f"bagel-triton {bagel_triton.__version__}")
    print("\n".join(f"  {name:<15} {value}" for name, value in summary.items()))
    if options.unused:
        unused = ", ".join(options.unused)
        notes += (f"{unused}: of the OpenAI API, which a --headless server does not have",)
    print("".join(f"  note: {note}\n" for note in notes), end="", flush=True)


def _configuration(options: ServeOptions) -> deploy_yaml.Deployment:
    """The deploy file's configuration, or the default one; the command line's options come before the file's."""
    master = _master(options)
    try:
        path = flags.deploy_file(options.deploy_config)
        found = deploy_yaml.resolve(path, options.checkpoint, options.overrides)
        if master is None:
            config = hosts.on_this_host(found.config, options.stage_id, options.host_address, options.headless)
            found = replace(found, config=config)
        else:  # checked with another address in place of the one that is not known yet
            hosts.refuse_addresses(found.config)
            config = _with_stage_1(options, found.config, "{}:{}".format(*master))
    except ConfigError as error:
        raise CommandError(str(error)) from error
    _check_mooncake(config)
    return found


def _check_mooncake(config: DeployConfig) -> None:
    """Refuse a Mooncake that could not start here, before a stage finds out and the reason is in Triton's log."""
    if config.connector not in hosts.BETWEEN_HOSTS:
        return
    from bagel_triton.kv.connectors import mooncake, mooncake_store
    from bagel_triton.kv.connectors.base import ConnectorUnavailable

    try:
        if config.connector == "mooncake":
            mooncake.check_here(config.mooncake)
        elif config.mooncake_store.master:  # without one the connector is refused where it is chosen
            mooncake.check_here(config.mooncake_store)
            mooncake_store.check_master(config.mooncake_store)
    except ConnectorUnavailable as error:
        raise CommandError(str(error)) from error


def _master(options: ServeOptions) -> tuple[str, int] | None:
    master = rendezvous.master_of(options.omni_master_address, options.omni_master_port, options.stage_id)
    if master is not None and not options.headless and master[1] == options.port:
        raise CommandError(
            f"{rendezvous.FLAG}={master[1]} is --port as well, which the OpenAI API listens on; allowed: another port "
            "for one of them, as in --port 8000"
        )
    return master


@contextlib.contextmanager
def _registered(
    options: ServeOptions, config: DeployConfig, ready_by: float
) -> Iterator[tuple[DeployConfig, rendezvous.Registrations | None]]:
    """``config`` with the address of stage 1, which registers with stage 0; and who registers, on stage 0.

    Raises:
        CommandError: nothing registered by ``ready_by``.
    """
    master = _master(options)
    if master is None:
        yield config, None
    elif options.stage_id == 0:
        _placement(config)  # a bad checkpoint is an error before any wait
        with rendezvous.listening(*master) as registrations:
            try:
                first = registrations.wait(ready_by)
            except TimeoutError as error:
                raise CommandError(f"--init-timeout={options.init_timeout:g} has passed: {error}") from error
            yield _with_stage_1(options, config, first), registrations
    else:
        try:
            host = options.host_address or hosts.facing("{}:{}".format(*master))
        except ConfigError as error:
            raise CommandError(f"--omni-master-address: {error}") from error
        # The same port each time, where it is free.
        port = options.triton_grpc_port or machine.free_port(host, min(master[1] + 1, 65535))
        with rendezvous.registering(master, f"{host}:{port}"):
            yield _with_stage_1(options, config, f"{host}:{port}"), None


def _with_stage_1(options: ServeOptions, config: DeployConfig, address: str) -> DeployConfig:
    try:
        config = msgspec.structs.replace(config, addresses={1: (address,)})
        return hosts.on_this_host(config, options.stage_id, options.host_address, options.headless)
    except ConfigError as error:
        raise CommandError(str(error)) from error


@contextlib.contextmanager
def _addresses(options: ServeOptions, config: DeployConfig) -> Iterator[Addresses]:
    """Free ports for Triton, and listening sockets for the HTTP API."""
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
        grpc_host, grpc_port = config.own_address or (LOOPBACK, 0)
        wanted = {
            "--triton-http-port": options.triton_http_port,
            "--triton-grpc-port": options.triton_grpc_port or grpc_port,
            "--triton-metrics-port": options.triton_metrics_port,
        }
        metrics_host = options.triton_metrics_host
        places = {"--triton-grpc-port": grpc_host, "--triton-metrics-port": metrics_host}
        http, grpc, metrics = machine.choose_ports(wanted, places).values()
        urls = [http_server.base_url(listener, options.http) for listener in listeners]
        yield Addresses(listeners, urls, http, grpc_host, grpc, metrics_host, metrics)


def _shared_memory() -> shared_memory.SharedMemoryPrefix:
    try:
        return shared_memory.SharedMemoryPrefix()
    except shared_memory.SharedMemoryUnavailable as error:
        raise CommandError(str(error)) from error


def _placement(config: DeployConfig) -> Placement:
    """The device and dtype of the checkpoint, after a check of its tensors and tokenizer."""
    from bagel_triton.model.device import resolve
    from bagel_triton.model.tokenizer import Tokenizer
    from bagel_triton.weights.checkpoint import inspect

    try:
        model = inspect(config.checkpoint)
        Tokenizer(config.checkpoint, model.language.vocab_size)  # else each stage would find out, minutes later
        return resolve(config.device, config.dtype)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _check_adapters(config: DeployConfig) -> None:
    """Read the adapters that requests may choose, before each stage would find out that one is wrong."""
    import torch

    from bagel_triton.weights.adapters import load_adapter
    from bagel_triton.weights.checkpoint import inspect

    try:
        language = inspect(config.checkpoint).language
        for name, folder in config.lora_modules.items():
            load_adapter(name, folder, language, torch.device("cpu"), torch.float32, config.max_lora_rank)
    except ValueError as error:
        raise CommandError(f"--lora-modules: {error}") from error
    for values in config.request_defaults.values():
        default = values.get("lora")
        if default and default not in config.lora_modules and not config.lora_dir:
            allowed = ", ".join(config.lora_modules) or "none, as there are no lora_modules"
            raise CommandError(
                f"default_sampling_params.lora={format_value(default)} is not allowed; allowed: {allowed}"
            )


def _quantization(config: DeployConfig, deploy: DeployConfig) -> str:
    """The form of the weights of ``deploy``, and why where it was left to the server."""
    from bagel_triton.weights.checkpoint import Checkpoint

    chosen = memory.quantization_summary(Checkpoint(deploy.checkpoint), deploy)
    auto = "auto" in (config.thinker.quantization, config.dit.quantization)
    tried = f"{', '.join(map(str, memory.AUTO)).lower()}, and that with layers on the host,"
    return f"{chosen} (auto: the first of {tried} that fits)" if auto else chosen


def _dit_device(config: DeployConfig, placement: Placement) -> str | None:
    """The device of stage 1 where it is not that of ``placement``."""
    from bagel_triton.model.device import resolve

    if config.dit_device is None:
        return None
    try:
        found = resolve(config.dit_device, placement.dtype_name).device
    except ValueError as error:
        raise CommandError(str(error)) from error
    return None if found == placement.device else found


def _connector(config: DeployConfig, device: str, dit_device: str | None) -> ConnectorChoice:
    """The connector for these devices, refused here before a stage that cannot use it has loaded anything."""
    try:
        return choose(config, device, dit_device)
    except ConfigError as error:
        raise CommandError(str(error)) from error


def _check_ranks(config: DeployConfig) -> None:
    """Refuse ranks that the checkpoint or this machine's devices do not allow, before anything is loaded."""
    from bagel_triton.model.device import resolve
    from bagel_triton.weights.checkpoint import inspect

    try:
        sizes.check(config, inspect(config.checkpoint).language)
        for stage in (THINKER, DIT, DECODER):
            ranks = sizes.Sizes.of(config, stage).ranks
            if config.worker_backend == "process" and (stage in config.models or config.topology.one_process):
                for rank in range(1, ranks):
                    try:
                        resolve(config.rank_device_of(stage, rank), config.dtype)
                    except ValueError as error:
                        raise ConfigError(f"{stage} has {ranks} ranks, each on a device of its own: {error}") from error
    except ConfigError as error:
        raise CommandError(str(error)) from error


def _check_default_size(config: DeployConfig) -> None:
    """Refuse a default size of images that the checkpoint does not draw, which every request would be refused for."""
    from bagel_triton.weights.checkpoint import Checkpoint

    largest = Checkpoint(config.checkpoint, most_pixels=config.max_generated_image_size).config.latent.max_side
    for name in ("height", "width"):
        side = config.image_defaults.get(name, LATENT_STRIDE)
        if side % LATENT_STRIDE or not LATENT_STRIDE <= side <= largest:
            allowed = f"a multiple of {LATENT_STRIDE} from {LATENT_STRIDE} to {largest}"
            raise CommandError(f"default_sampling_params.{name}={side} is not allowed; allowed: {allowed}")


def _model_repository(options: ServeOptions) -> Path:
    if options.model_repository is None:
        return machine.source_file("model_repository")
    if not options.model_repository.is_dir():
        raise CommandError(f"--model-repository={options.model_repository} is not a folder")
    return options.model_repository.resolve()


def _request_defaults(config: DeployConfig) -> dict[str, str]:
    """The lines of the summary for values that a request which leaves them out gets from the deploy file."""
    kinds = {"text defaults": config.text_defaults, "image defaults": config.image_defaults}
    return {
        kind: ", ".join(f"{name}={format_value(value)}" for name, value in values.items())
        for kind, values in kinds.items()
        if values
    }


def _source(options: ServeOptions) -> str:
    return "the default" if options.deploy_config is None else f"--deploy-config {options.deploy_config}"


def _reason(chosen: str, configured: str, why: str = "no CUDA device") -> str:
    """``chosen``, and why where it was left to the server."""
    if configured != "auto":
        return chosen
    return f"{chosen} (auto: {'the first CUDA device' if chosen.startswith('cuda') else why})"
