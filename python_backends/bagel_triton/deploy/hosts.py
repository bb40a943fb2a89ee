"""A server of one of two stages: which one, where the other is, and how this one is reached."""

from __future__ import annotations

import socket

import msgspec

from bagel_triton.deploy.config import ConfigError, DeployConfig, MooncakeConfig, split_address

BETWEEN_HOSTS = ("mooncake", "mooncake_store")


def check_address(name: str, address: str) -> None:
    """Refuse an address that is not HOST:PORT.

    Raises:
        ConfigError: says ``name`` and what is allowed.
    """
    host, _, port = address.rpartition(":")
    if not host or ":" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{name}={address!r} is not allowed; allowed: HOST:PORT")


def check_stage(config: DeployConfig, stage_id: int | None) -> None:
    """Refuse a stage that the pipeline does not have.

    Raises:
        ConfigError: says which it has.
    """
    if stage_id is not None and (config.topology.one_process or not 0 <= stage_id < len(config.topology.stages)):
        allowed = "none, it is one process" if config.topology.one_process else "0, the thinker, and 1, the DiT"
        raise ConfigError(f"--stage-id={stage_id} is not allowed in pipeline {config.pipeline}; allowed: {allowed}")


def on_this_host(
    config: DeployConfig, stage_id: int | None, host_address: str | None = None, headless: bool = False
) -> DeployConfig:
    """``config`` for the server of ``stage_id``, or of all stages where that is None.

    Fills in the host that Mooncake announces: ``host_address``, else the connector's own ``host``, else the
    host of the stage's address, else the address from which this host reaches the other.

    Raises:
        ConfigError: an address is missing or has no meaning, or the connector does not reach another host.
    """
    stages = config.topology.stages
    check_stage(config, stage_id)
    if headless and stage_id is None:
        raise ConfigError("--headless needs --stage-id 1: a server of all stages serves the OpenAI API itself")
    if headless and stage_id == 0:
        raise ConfigError("--stage-id=0 with --headless: stage 0 serves the OpenAI API; remove --headless")
    if stage_id and not headless:
        raise ConfigError(f"--stage-id={stage_id} without --headless: stage 0 serves the OpenAI API; add --headless")
    if config.load == "generation" and stage_id != 1:
        raise ConfigError(
            "load='generation' is not allowed here; allowed: with --stage-id 1, as stage 0 reads prompts: all, "
            "or understanding for answers in text alone"
        )
    if stage_id is None:
        if config.addresses:
            stage, (address, *_) = next(iter(config.addresses.items()))
            raise ConfigError(
                f"stage {stage} has address={address!r}: say which stage this host serves, by --stage-id 0 to "
                f"{len(stages) - 1}, or remove the addresses to serve all of them here"
            )
        if host_address is not None:
            raise ConfigError(f"--host-address={host_address} has no meaning without --stage-id")
        return config
    # Stage 0 calls the others and is called by none, so it alone needs no address.
    if missing := [stage for stage in range(1, len(stages)) if stage not in config.addresses]:
        raise ConfigError(
            f"--stage-id={stage_id} needs the address of stage {missing[0]}: --omni-master-address HOST, where stage 1 "
            "registers, or a deploy YAML with stages[].address, HOST:PORT, such as build/deploy/bagel_two_hosts.yaml"
        )
    if config.connector == "auto":
        config = msgspec.structs.replace(config, connector="mooncake")
    if config.connector not in BETWEEN_HOSTS:
        raise ConfigError(
            f"connector={config.connector!r} does not reach another server; --stage-id needs auto, "
            f"{' or '.join(BETWEEN_HOSTS)}"
        )
    addresses, own = dict(config.addresses), _own_address(config, stage_id, host_address)
    if own is not None:
        addresses[stage_id] = (own,)
    options: MooncakeConfig = getattr(config, config.connector)
    given = options.host if options.host != MooncakeConfig().host else None
    other = next(iter(addresses.values()))[0]
    host = host_address or given or (facing(other) if own is None else split_address(own)[0])
    return msgspec.structs.replace(
        config,
        device=config.device_of(stages[stage_id][-1]),
        dit_device=None,
        stage_id=stage_id,
        addresses=addresses,
        **{config.connector: msgspec.structs.replace(options, host=host)},
    )


def _own_address(config: DeployConfig, stage_id: int, host_address: str | None) -> str | None:
    """The address of the server of ``stage_id`` on this host, among those of its stage.

    Raises:
        ConfigError: it has several, and none or more than one is this host's.
    """
    listed = config.addresses.get(stage_id)
    if listed is None:
        return None
    if len(listed) == 1:
        return listed[0] if host_address is None else f"{host_address}:{split_address(listed[0])[1]}"
    here = [one for one in listed if split_address(one)[0] == host_address]
    if host_address is None:
        here = [one for one in listed if is_local(split_address(one)[0])]
    if len(here) != 1:
        where = "this host" if host_address is None else f"--host-address={host_address}"
        raise ConfigError(
            f"stage {stage_id} has address={list(listed)}, of which {len(here)} are at {where}; allowed: one"
        )
    return here[0]


def is_local(host: str) -> bool:
    """Whether ``host`` is an address of this machine."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def stage_summary(config: DeployConfig) -> dict[str, str]:
    """The line of ``serve``'s summary for a server that has one stage of several."""
    if config.stage_id is None:
        return {}
    where = " and ".join(config.remote_addresses)
    remote = [f"{model} at {where}" for model in config.remote_models]
    return {"stage": f"{config.stage_id}: {', '.join([*config.models, *remote])}"}


def refuse_addresses(config: DeployConfig) -> None:
    """Refuse a file that says where stage 1 is, where stage 1 says so itself.

    Raises:
        ConfigError: the file has an address.
    """
    for stage, (address, *_) in config.addresses.items():
        raise ConfigError(
            f"stage {stage} has address={address!r} and registers at --omni-master-address: remove one of the two"
        )


def facing(address: str) -> str:
    """This host's address on the way to ``address``, HOST:PORT; nothing is sent there.

    Raises:
        ConfigError: there is no way.
    """
    host, port = split_address(address)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except socket.gaierror as error:
        raise ConfigError(f"{host} is no host that is known here: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(f"{host} has no route from here ({error}): say this host's by --host-address") from error
