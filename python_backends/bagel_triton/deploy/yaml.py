"""The deploy YAML that a user writes: a topology, and the limits of its stages.

The fields have the names of vLLM-Omni's deploy files. A field without a meaning here is accepted at a
value that changes nothing, and else refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from bagel_triton.deploy.config import BagelConfig, ConfigError, DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.deploy.connector import ConnectorSpec, connector_fields
from bagel_triton.deploy.hosts import check_address
from bagel_triton.deploy.topology import TOPOLOGIES, Topology
from bagel_triton.protocol.errors import InvalidRequest

THINKER_STAGE, DIT_STAGE = 0, 1  # ids of the two-stage topologies; the only stage of the other is 0
_BATCH_FIELDS = ("max_num_seqs", "max_num_batched_tokens", "max_waiting")  # of each stage
_THINKER_FIELDS = (
    "max_model_len",
    "kv_tokens",
    "block_tokens",
    "lease_ttl_s",
    "enable_prefix_caching",
    "encoder_cache_mb",
)


class StageSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The limits of one stage; None leaves the default."""

    stage_id: int
    address: str | None = None
    devices: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_waiting: int | None = None
    max_model_len: int | None = None
    kv_tokens: int | None = None
    block_tokens: int | None = None
    lease_ttl_s: float | None = None
    enable_prefix_caching: bool | None = None
    encoder_cache_mb: int | None = None
    vae_use_tiling: bool | None = None
    enforce_eager: bool = True
    tensor_parallel_size: int = 1
    input_connectors: dict[str, str] = {}
    output_connectors: dict[str, str] = {}


class DeployYaml(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    pipeline: str = "bagel"
    dtype: str = "auto"
    device: str = "auto"
    request_timeout_s: float | None = None
    stages: list[StageSection] = []
    connectors: dict[str, ConnectorSpec] = {}


def load(path: Path, checkpoint: str) -> DeployConfig:
    """The configuration that the deploy YAML ``path`` gives ``checkpoint``.

    Raises:
        ConfigError: not readable, an unknown field, or a value that is not allowed.
    """
    try:
        user = _read(path)
    except (OSError, UnicodeDecodeError, msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"deploy YAML {path}: {' '.join(str(error).split())}") from error
    if user.pipeline not in TOPOLOGIES:
        raise ConfigError(f"pipeline={user.pipeline!r} is not allowed; allowed: {', '.join(TOPOLOGIES)}")
    topology = TOPOLOGIES[user.pipeline]
    for index, section in enumerate(user.stages):
        _check_stage(f"stages[{index}]", section, topology)
    return DeployConfig(
        checkpoint=checkpoint,
        pipeline=user.pipeline,
        device=_device(user),
        dtype=_allowed("dtype", user.dtype, ("auto", "float32", "bfloat16")),  # type: ignore[arg-type]
        **_connector(user),
        thinker=_thinker(user, topology),
        dit=_dit(user, topology),
        vae_decode=_vae_decode(user, topology),
        bagel=BagelConfig()
        if user.request_timeout_s is None
        else BagelConfig(request_timeout_s=user.request_timeout_s),
        addresses={section.stage_id: section.address for section in user.stages if section.address is not None},
    )


def _read(path: Path) -> DeployYaml:
    written = drop_neutral(_parse(path.read_text()))
    assert isinstance(written, dict), "it was parsed as one"
    if isinstance(written.get("stages"), list):
        written["stages"] = [drop_neutral(section) for section in written["stages"]]
    errors = list(unknown_fields("", written, DeployYaml))
    stages, connectors = written.get("stages"), written.get("connectors")
    for index, section in enumerate(stages if isinstance(stages, list) else ()):
        errors += unknown_fields(f"stages[{index}]", section, StageSection)
    for name, spec in connectors.items() if isinstance(connectors, dict) else ():
        errors += unknown_fields(f"connectors.{name}", spec, ConnectorSpec)
    if errors:
        raise ConfigError("; ".join(errors))
    return msgspec.convert(written, DeployYaml)


def _parse(text: str) -> dict[Any, Any]:
    """The mapping that ``text`` is."""
    try:
        written = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_located(error, text.splitlines())) from error
    except yaml.YAMLError as error:
        raise ConfigError(str(error)) from error
    if written is None:
        raise ConfigError("it is empty; the shortest is `pipeline: bagel`, and without a file that is the default")
    if not isinstance(written, dict):
        raise ConfigError(f"it is a {type(written).__name__}, not a mapping of fields such as `pipeline: bagel`")
    return written


def _located(error: yaml.MarkedYAMLError, lines: Sequence[str]) -> str:
    if error.problem_mark is None:
        return str(error)
    number = error.problem_mark.line
    line = lines[number] if number < len(lines) else ""
    where = f"line {number + 1}, column {error.problem_mark.column + 1}, {line.strip()!r}"
    if line[: len(line) - len(line.lstrip())].count("\t"):
        return f"{where}: YAML indents by spaces, and this line begins with a tab"
    return f"{where}: {error.problem}"


def _check_stage(name: str, section: StageSection, topology: Topology) -> None:
    if section.stage_id >= len(topology.stages) or section.stage_id < 0:
        allowed = f"0 to {len(topology.stages) - 1} in pipeline {topology.name}"
        raise ConfigError(f"{name}.stage_id={section.stage_id} is not allowed; allowed: {allowed}")
    if section.tensor_parallel_size != 1:
        raise ConfigError(f"{name}.tensor_parallel_size={section.tensor_parallel_size}: only 1 is supported")
    if not section.enforce_eager:
        raise ConfigError(f"{name}.enforce_eager=false: graphs are not captured here; only true is supported")
    if section.address is not None:
        if topology.one_process:
            raise ConfigError(f"{name}.address={section.address!r}: pipeline {topology.name} is one process")
        check_address(f"{name}.address", section.address)
    if topology.one_process:
        return
    if section.stage_id == THINKER_STAGE:
        if section.vae_use_tiling is not None:
            raise ConfigError(f"{name}.vae_use_tiling belongs to the DiT; that is stage {DIT_STAGE}")
        return
    for field in _THINKER_FIELDS:
        if getattr(section, field) not in (None, False):  # what is off is off there
            raise ConfigError(f"{name}.{field} belongs to the thinker; that is stage {THINKER_STAGE}")


def _device(user: DeployYaml) -> str:
    devices = {section.devices for section in user.stages if section.devices is not None}
    if not devices:
        return user.device
    if len(devices) > 1 or any("," in device for device in devices):
        raise ConfigError(f"stages[].devices={sorted(devices)}: all stages run on one device here")
    device = devices.pop()
    return f"cuda:{device}" if device.isdigit() else device


def _connector(user: DeployYaml) -> dict[str, Any]:
    """The connector that the stages name; the only one there is where they name none."""
    used: list[str] = []
    for section in user.stages:
        for reference in (*section.input_connectors.values(), *section.output_connectors.values()):
            used.append(_allowed(f"connector of stage {section.stage_id}", reference, tuple(user.connectors)))
    names = list(dict.fromkeys(used or user.connectors))
    if len(names) > 1:
        raise ConfigError(f"connectors={names}: one connector carries keys and values; name one")
    # Options of a connector that no stage names change nothing.
    return connector_fields(f"connectors.{names[0]}", user.connectors[names[0]]) if names else {}


def _merged(user: DeployYaml, stage: int, fields: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section in user.stages:
        if section.stage_id == stage:
            found.update({name: getattr(section, name) for name in fields if getattr(section, name) is not None})
    return found


def _thinker(user: DeployYaml, topology: Topology) -> ThinkerConfig:
    fields = _merged(user, 0, _THINKER_FIELDS)
    length = fields.pop("max_model_len", None)
    if length is not None:
        fields["kv_tokens"] = max(length, fields.get("kv_tokens", 0))
    batch = _merged(user, 0, _BATCH_FIELDS)
    if topology.one_process:  # its one stage's max_num_seqs counts images
        batch.pop("max_num_seqs", None)
    return ThinkerConfig(**fields, **batch)


def _dit(user: DeployYaml, topology: Topology) -> DitConfig:
    batch = _merged(user, 0 if topology.one_process else DIT_STAGE, _BATCH_FIELDS)
    if topology.one_process:  # and its max_num_batched_tokens is that of prefill
        batch.pop("max_num_batched_tokens", None)
    return DitConfig(**batch)


def _vae_decode(user: DeployYaml, topology: Topology) -> VaeDecodeConfig:
    fields = _merged(user, 0 if topology.one_process else DIT_STAGE, ("vae_use_tiling",))
    return VaeDecodeConfig(**{name.removeprefix("vae_"): value for name, value in fields.items()})


def _allowed(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not allowed; allowed: {', '.join(allowed)}")
    return value


_TOPOLOGY = "the topology that `pipeline` names decides it"
_FLAT = "write its fields directly under the stage"
_PER_REQUEST = "requests carry these values, and docs/api.md has their defaults"
# Fields of vLLM-Omni's files, and why each is refused.
_REASONS = {
    "async_chunk": "a stage gets its input whole",
    "default_sampling_params": _PER_REQUEST,
    "engine_args": _FLAT,
    "engine_input_source": _TOPOLOGY,
    "gpu_memory_utilization": "memory is what kv_tokens and max_num_seqs make it; `bagel-triton memory` shows it",
    "limit_mm_per_prompt": "a request may hold as many images as fit kv_tokens",
    "max_batch_size": "a stage batches all it has, within max_num_seqs and max_num_batched_tokens",
    "max_inflight": "set max_num_seqs and max_waiting of a stage",
    "model_arch": _TOPOLOGY,
    "model_stage": _TOPOLOGY,
    "omni_kv_config": _TOPOLOGY,
    "parallel_config": "all stages run on one device",
    "platforms": "`device` says where the stages run",
    "runtime": "set devices, max_num_seqs and max_waiting directly under the stage",
    "shm_threshold_bytes": "keys and values always stay in shared memory, whatever their size",
    "stage_args": "list the stages under `stages`",
    "stage_type": _TOPOLOGY,
    "window_size": "a stage gets its input whole",
}
# Fields of those files that change nothing here, and the values at which they do.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "async_chunk": (False,),
    "enable_chunked_prefill": (True, False),
    "trust_remote_code": (True, False),
}
_NEUTRAL_PARALLEL = (1, False, None)  # every size of a parallel_config


def drop_neutral(section: object) -> object:
    """``section`` without fields of vLLM-Omni's files that have a value at which they change nothing here."""
    if not isinstance(section, dict):
        return section
    return {name: value for name, value in section.items() if not _is_neutral(name, value)}


def _is_neutral(name: object, value: object) -> bool:
    if name == "parallel_config":
        return isinstance(value, dict) and all(
            size is not True and size in _NEUTRAL_PARALLEL for size in value.values()
        )
    return value in _NEUTRAL.get(str(name), ())


def unknown_fields(where: str, section: object, known: type[msgspec.Struct]) -> Iterator[str]:
    """An error for each field of ``section``, at ``where``, that ``known`` does not have, with the reason or a hint."""
    if not isinstance(section, dict):
        return
    allowed = [field.name for field in msgspec.structs.fields(known)]
    for name in section:
        if name in allowed:
            continue
        path = f"{where}.{name}" if where else str(name)
        if name in _REASONS:
            yield f"{path} has no meaning here: {_REASONS[name]}; remove it"
        else:
            yield InvalidRequest.unknown(path, str(name), allowed).message
