"""The deploy file that a user writes, read into the configuration of a server.

A file may be based on another (``base_config``), have sections for a platform, and be overridden by flags; all of
these are laid over each other first, so a field means the same wherever it was written. docs/deploy.md describes
the fields, and ``vocabulary.py`` declares them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from bagel_triton.deploy import located, vocabulary
from bagel_triton.deploy.config import (
    ALL_LAYERS_GB,
    MIN_BLOCKS,
    BagelConfig,
    ConfigError,
    DeployConfig,
    DitConfig,
    ThinkerConfig,
    VaeDecodeConfig,
    pool_tokens,
)
from bagel_triton.deploy.connector import connector_fields
from bagel_triton.deploy.files import EDGE, converted, refuse_repeated_stages, with_bases
from bagel_triton.deploy.hosts import check_address
from bagel_triton.deploy.located import Node, Origin, Problems
from bagel_triton.deploy.topology import BAGEL, TOPOLOGIES, Topology
from bagel_triton.protocol.errors import format_value
from bagel_triton.protocol.request import REQUEST_FIELDS

Platform = Literal["cpu", "cuda"]
THINKER_STAGE, DIT_STAGE = 0, 1  # ids of the two-stage topologies; the only stage of the other is 0
DEFAULTS = "default_sampling_params"
_DEFAULTS_ELSEWHERE = " changes nothing at stage 1: give it to stage 0, which plans every request"
# The only connection between stages, as each end names it.
_EDGES = {(0, "output_connectors"): "to_stage_1", (1, "input_connectors"): "from_stage_0"}
# Fields of a stage that the other stage's server reads too.
_OF_ALL_SERVERS = ("stage_id", "address", DEFAULTS, "input_connectors", "output_connectors", "dtype", "lora_path")
_NOTHING = Node({}, Origin("the default"))
_THINKER_FIELDS = (
    "max_num_batched_tokens",
    "max_waiting",
    "kv_tokens",
    "block_tokens",
    "lease_ttl_s",
    "enable_prefix_caching",
    "encoder_cache_mb",
    "enforce_eager",
    "gpu_memory_utilization",
    "quantization",
    "cpu_offload_gb",
    "enable_layerwise_offload",
    "tensor_parallel_size",
)
_DIT_FIELDS = (
    "max_num_seqs",
    "max_waiting",
    "gpu_memory_utilization",
    "enforce_eager",
    "quantization",
    "cpu_offload_gb",
    "enable_layerwise_offload",
    *vocabulary.RANKS,
    *vocabulary.HSDP,
)


@dataclass(frozen=True)
class Flags:
    """The overrides by flags: ``top`` is a mapping as in a file, ``every_stage`` has fields for each stage with them.

    With a ``stage_id`` only that stage's fields are overridden.
    """

    top: Node = field(default_factory=lambda: Node({}, Origin("the command line")))
    every_stage: Mapping[str, Node] = field(default_factory=dict)
    stage_id: int | None = None


NO_FLAGS = Flags()


@dataclass(frozen=True)
class Deployment:
    """A configuration, the origin of each value that is not the default, and notes on values without an effect.

    ``origins`` are by the value's path in :class:`DeployConfig`, such as ``thinker.kv_tokens``. ``default_pool`` is
    whether the size of the KV pool is left to the server; ``kv_tokens`` is the least then.
    """

    config: DeployConfig
    origins: Mapping[str, Origin] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    default_pool: bool = True


def cuda_platform() -> Platform:
    """The platform of this machine."""
    import torch  # seconds, which a file that names no platform need not wait for

    return "cuda" if torch.cuda.is_available() else "cpu"


def load(path: Path, checkpoint: str) -> DeployConfig:
    """The configuration that the deploy file ``path`` gives ``checkpoint``.

    Raises:
        ConfigError: as :func:`resolve`.
    """
    return resolve(path, checkpoint).config


def resolve(
    path: Path | None, checkpoint: str, flags: Flags = NO_FLAGS, platform: Callable[[], Platform] = cuda_platform
) -> Deployment:
    """The configuration of ``checkpoint`` that the file ``path`` gives, or the default one, overridden by ``flags``.

    Args:
        path: of the file; None for the defaults.
        flags: overrides from the command line.
        platform: says which section of ``platforms`` applies where the device is left to the server.

    Raises:
        ConfigError: the file cannot be read, or has errors: a line for each, with its file, line and field.
    """
    problems = Problems()
    notes: list[str] = []
    written = _NOTHING if path is None else with_bases(path, problems, notes, ())
    return _Builder(checkpoint, written, flags, platform, problems, notes).deployment()


class _Builder:
    """Checks a parsed file and builds the configuration."""

    def __init__(
        self,
        checkpoint: str,
        written: Node,
        flags: Flags,
        platform: Callable[[], Platform],
        problems: Problems,
        notes: list[str],
    ) -> None:
        self._checkpoint, self._ask_platform = checkpoint, platform
        self._problems, self._notes = problems, notes
        self._origins: dict[str, Origin] = {}
        self._asked: Platform | None = None
        sections = self._sections(written)
        self._device_node = located.merged(written, flags.top).mapping.get("device")
        if sections:
            chosen = sections.get(self._platform())
            if chosen is not None:
                written = located.merged(written, located.in_section(chosen, f"platforms.{self._platform()}"))
        self._root, self._flags = located.merged(written, flags.top), flags

    def deployment(self) -> Deployment:
        top = vocabulary.check(self._root, vocabulary.TOP, self._problems, self._notes)
        for edge in self._root.mapping["edges"].items if "edges" in self._root.mapping else ():
            vocabulary.check(edge, EDGE, self._problems, self._notes)
        self._pipeline_known = "pipeline" in top or "pipeline" not in self._root.mapping
        topology = TOPOLOGIES[top["pipeline"].value] if "pipeline" in top else BAGEL
        stages = self._stages(top, topology)
        self._note_elsewhere()
        fields = self._top_fields(top)
        fields |= self._device(top, stages)
        for name in ("lora_path", "lora_scale", "lora_dir", "max_loras", "max_lora_rank", "max_generated_image_size"):
            fields |= self._of_all_stages(name, top, stages)
        fields |= self._lora_modules(top, stages)
        fields |= self._connector(top, stages, topology)
        first = stages.get(THINKER_STAGE, {})
        second = first if topology.one_process else stages.get(DIT_STAGE, {})
        parts = {
            "thinker": self._thinker(first, topology),
            "dit": self._values(
                "dit", second, _DIT_FIELDS + (() if topology.one_process else ("max_num_batched_tokens",))
            ),
            "vae_decode": self._values("vae_decode", second, ("vae_use_tiling", "vae_patch_parallel_size"), "vae_"),
        }
        if not parts["dit"].get("use_hsdp") and parts["dit"].get("hsdp_shard_size") == 1:
            del parts["dit"]["hsdp_shard_size"]  # as if it were not there
        if "enable_prefix_caching" in top and "enable_prefix_caching" not in parts["thinker"]:
            parts["thinker"]["enable_prefix_caching"] = self._value(
                "thinker.enable_prefix_caching", top["enable_prefix_caching"]
            )
        for part, name in product(("thinker", "dit"), ("quantization", "cpu_offload_gb", "enable_layerwise_offload")):
            if name in top and name not in parts[part]:
                parts[part][name] = self._value(f"{part}.{name}", top[name])
        for part in ("thinker", "dit"):
            if parts[part].pop("enable_layerwise_offload", False):
                parts[part]["cpu_offload_gb"] = ALL_LAYERS_GB
        fields |= self._defaults(first, second)
        fields["addresses"] = self._addresses(stages, topology)
        self._problems.raise_if_any()
        config = DeployConfig(
            checkpoint=self._checkpoint,
            thinker=ThinkerConfig(**parts["thinker"]),
            dit=DitConfig(**parts["dit"]),
            vae_decode=VaeDecodeConfig(**parts["vae_decode"]),
            **fields,
        )
        self._note_ray(config, top)
        default_pool = "kv_tokens" not in first and config.thinker.gpu_memory_utilization is None
        return Deployment(config, self._origins, tuple(dict.fromkeys(self._notes)), default_pool)

    # --- platforms ---

    def _platform(self) -> Platform:
        """``cpu`` or ``cuda``: from the configured device, otherwise from the machine."""
        if self._asked is None:
            device = str(self._device_node.value) if self._device_node is not None else "auto"
            named: dict[str, Platform] = {"cpu": "cpu", "cuda": "cuda"}
            self._asked = named.get(device.partition(":")[0]) or self._ask_platform()
        return self._asked

    def _sections(self, written: Node) -> dict[str, Node]:
        """The sections of ``platforms``; those of cpu and cuda are checked, whichever applies."""
        platforms = written.mapping.get("platforms")
        found: dict[str, Node] = {}
        for name, section in platforms.mapping.items() if platforms is not None else ():
            if name in vocabulary.OTHER_PLATFORMS or section.value is None:
                continue
            if name not in ("cpu", "cuda"):
                self._problems.add(
                    section,
                    f" is not a known platform; allowed: cpu, cuda, and skipped: {_or(vocabulary.OTHER_PLATFORMS)}",
                )
                continue
            section = converted(section, self._problems, self._notes)
            for inner in ("platforms", "base_config"):
                if inner in section.mapping:
                    self._problems.add(section.mapping[inner], " belongs to the top of the file")
            refuse_repeated_stages(section, self._problems)
            checked = vocabulary.check(section, vocabulary.TOP, self._problems, [])
            for stage in checked["stages"].items if "stages" in checked else ():
                vocabulary.check(stage, vocabulary.STAGE, self._problems, [])
            if isinstance(section.value, dict):
                found[name] = section
        return found

    # --- stages ---

    def _stages(self, top: dict[str, Node], topology: Topology) -> dict[int, dict[str, Node]]:
        """The settings of each stage by its id, checked."""
        stages: dict[int, dict[str, Node]] = {}
        for stage in self._flagged(top["stages"].items if "stages" in top else [], topology):
            found = vocabulary.check(stage, vocabulary.STAGE, self._problems, self._notes)
            if "parallel_config" in found:
                self._merge_sizes(found, found["parallel_config"])
            if "omni_kv_config" in found:
                vocabulary.check(found["omni_kv_config"], vocabulary.OMNI_KV, self._problems, self._notes)
            if "stage_id" not in found:
                if isinstance(stage.value, dict) and stage.mapping.get("stage_id", _NOTHING).value in (None, {}):
                    self._problems.add(stage, " has no stage_id; 0 is the thinker, 1 the DiT")
                continue
            stage_id = found.pop("stage_id")
            if not self._pipeline_known:
                continue
            if stage_id.value >= len(topology.stages):
                last = len(topology.stages) - 1
                allowed = f"0 to {last}" if last else "0"
                self._problems.add(
                    stage_id, f"={stage_id.value} is not allowed in pipeline {topology.name}; allowed: {allowed}"
                )
                continue
            self._check_engine(stage_id.value, found, topology)
            self._check_devices(found)
            stages[stage_id.value] = found
        return stages

    def _merge_sizes(self, found: dict[str, Node], sizes: Node) -> None:
        """Add the sizes of ``parallel_config`` to the stage's own; one that is in both places must be the same."""
        for name, node in vocabulary.check(sizes, vocabulary.PARALLEL, self._problems, self._notes).items():
            own = found.setdefault(name, node)
            if own.value != node.value and not own.origin.source.startswith("--"):
                self._problems.add(node, f"={node.value!r} is not that of the stage itself, {own.value!r}")

    def _check_devices(self, found: dict[str, Node]) -> None:
        """Refuse a list of devices that is not one for each rank, or has one twice."""
        listed = str(found["devices"].value).split(",") if "devices" in found else []
        if len(listed) < 2:
            return
        sizes = {name: found[name].value for name in (*vocabulary.RANKS, *vocabulary.HSDP) if name in found}
        ranks = DitConfig(**{**sizes, "hsdp_shard_size": sizes.get("hsdp_shard_size") or -1}).ranks
        if vocabulary.DECODER_RANKS in found:  # the decoder's ranks are on the same devices
            ranks = max(ranks, int(found[vocabulary.DECODER_RANKS].value))
        devices = found["devices"]
        if len(listed) != ranks:
            self._problems.add(
                devices,
                f"={devices.value!r} is not allowed: {len(listed)} devices for a stage of {ranks}; "
                f"allowed: as many as {', '.join((*vocabulary.RANKS, *vocabulary.HSDP[1:]))} make, or "
                f"{vocabulary.DECODER_RANKS}",
            )
        elif len(set(listed)) < len(listed):
            self._problems.add(devices, f"={devices.value!r} is not allowed; allowed: each device once")

    def _flagged(self, stages: list[Node], topology: Topology) -> list[Node]:
        """``stages`` with the flags that are for every stage; those that --stage-overrides sets come before them."""
        only = self._flags.stage_id
        if not self._flags.every_stage or (only is not None and only not in range(len(topology.stages))):
            return stages  # a stage that is not there is refused by on_this_host
        numbered = [stage for stage in stages if isinstance(stage.mapping.get("stage_id", _NOTHING).value, int)]
        by_id = {stage.mapping["stage_id"].value: stage for stage in numbered}
        if len(by_id) != len(stages):
            return stages  # an error, which is found anyway
        chosen = range(len(topology.stages)) if only is None else (only,)
        for name, node in self._flags.every_stage.items():
            if only is not None:
                self._refuse_elsewhere(name, node, only, topology)
            elif name in vocabulary.OF_STAGE_1 and _several(node) and not topology.one_process:
                self._notes.append(f"{node.path}={format_value(node.value)} is for stage 1: {vocabulary.THINKER_RANKS}")
        for stage_id in range(len(topology.stages)):
            engine = "thinker" if stage_id == THINKER_STAGE else "dit"
            stage = by_id.get(stage_id, Node({"stage_id": Node(stage_id, _NOTHING.origin)}, _NOTHING.origin))
            fields = dict(stage.mapping)
            for name, node in self._flags.every_stage.items():
                # Stage 0 plans every request, so its server has the defaults of images too.
                if stage_id not in chosen and name != DEFAULTS:
                    continue
                setting = vocabulary.STAGE[name]
                applies = topology.one_process or not isinstance(setting, vocabulary.Setting)
                overridden = name in fields and fields[name].origin.source == "--stage-overrides"
                if not overridden and (applies or engine in setting.engines):  # type: ignore[union-attr]
                    fields[name] = node
            by_id[stage_id] = replace(stage, value=fields)
        return list(by_id.values())

    def _refuse_elsewhere(self, name: str, node: Node, only: int, topology: Topology) -> None:
        """Refuse a flag for ``only`` one stage, which another stage has."""
        setting, engine = vocabulary.STAGE[name], "thinker" if only == THINKER_STAGE else "dit"
        if topology.one_process or not isinstance(setting, vocabulary.Setting):
            return
        if name == DEFAULTS and only == DIT_STAGE:
            self._problems.add(node, _DEFAULTS_ELSEWHERE)
        elif name in vocabulary.OF_STAGE_1 and only == THINKER_STAGE:
            if _several(node):
                self._problems.add(node, _not_of_thinker(node))
        elif engine not in setting.engines and node.value is not False:  # what is off is off there
            there = 0 if engine == "dit" else 1
            self._problems.add(node, f"={format_value(node.value)} belongs to stage {there}: give it to that server")

    def _note_elsewhere(self) -> None:
        """Note what flags by stage set for a stage that another server has."""
        only = self._flags.stage_id
        stages = self._flags.top.mapping.get("stages", _NOTHING).items if only is not None else []
        for stage in stages:
            stage_id = stage.mapping.get("stage_id", _NOTHING).value
            for name, node in stage.mapping.items():
                if name == DEFAULTS and only == DIT_STAGE:
                    self._problems.add(node, _DEFAULTS_ELSEWHERE)
                elif stage_id != only and name not in _OF_ALL_SERVERS:
                    self._notes.append(f"{node.path} changes nothing here: this is the server of stage {only}")

    def _check_engine(self, stage_id: int, found: dict[str, Node], topology: Topology) -> None:
        """Refuse settings of the other stage's engine."""
        if topology.one_process:
            return
        engine = "thinker" if stage_id == THINKER_STAGE else "dit"
        for name, node in list(found.items()):
            setting = vocabulary.STAGE[name]
            assert isinstance(setting, vocabulary.Setting), "no other field is found"
            if engine in setting.engines:
                continue
            if name in vocabulary.OF_STAGE_1:
                if _several(node):
                    self._problems.add(node, _not_of_thinker(node))
                del found[name]
                continue
            if node.value is not False:  # what is off is off there
                there = "thinker; that is stage 0" if engine == "dit" else "DiT; that is stage 1"
                self._problems.add(node, f" belongs to the {there}")
            del found[name]

    def _addresses(self, stages: dict[int, dict[str, Node]], topology: Topology) -> dict[int, tuple[str, ...]]:
        addresses: dict[int, tuple[str, ...]] = {}
        taken: dict[str, str] = {}
        for stage_id, found in stages.items():
            if (node := found.get("address")) is None:
                continue
            if topology.one_process:
                self._problems.add(node, f"={node.value!r} has no meaning: pipeline {topology.name} is one process")
                continue
            listed = node.items if isinstance(node.value, list) else [node]
            for one in listed:
                try:
                    check_address(one.path, one.value)
                except ConfigError as error:
                    self._problems.add(one.origin, str(error))
            if stage_id == THINKER_STAGE and len(listed) > 1:
                self._problems.add(node, f"={node.plain()!r} is not allowed; allowed: one HOST:PORT for stage 0")
            for one in listed:
                if one.value in taken:
                    self._problems.add(one, f"={one.value!r} is there already, as {taken[one.value]}")
                taken.setdefault(one.value, one.path)
            self._value(f"addresses.{stage_id}", node)
            addresses[stage_id] = tuple(one.value for one in listed)
        return addresses

    # --- values ---

    def _value(self, target: str, node: Node) -> Any:
        self._origins[target] = node.origin
        return node.plain()

    def _values(self, part: str, found: dict[str, Node], names: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
        """The values of ``names`` for the section ``part`` of the configuration."""
        values: dict[str, Any] = {}
        for name in names:
            if name not in found:
                continue
            if name == "gpu_memory_utilization" and self._platform() == "cpu":
                node = found[name]
                self._notes.append(
                    f"{node.origin.prefix}{node.path} changes nothing on a CPU, where kv_tokens sizes the KV pool"
                )
                continue
            values[name.removeprefix(prefix)] = self._value(f"{part}.{name.removeprefix(prefix)}", found[name])
        return values

    def _thinker(self, found: dict[str, Node], topology: Topology) -> dict[str, Any]:
        # With one process, its max_num_seqs counts images.
        names = _THINKER_FIELDS if topology.one_process else ("max_num_seqs", *_THINKER_FIELDS)
        values = self._values("thinker", found, names)
        length, tokens = found.get("max_model_len"), values.get("kv_tokens", ThinkerConfig().kv_tokens)
        needed = 0
        if length is not None:
            needed = pool_tokens(length.value, values.get("block_tokens", ThinkerConfig().block_tokens))
        if length is not None and needed > tokens:
            self._value("thinker.kv_tokens", length)  # its errors name the length
            values["kv_tokens"] = needed
        elif length is not None:
            self._notes.append(
                f"{length.origin.prefix}{length.path}={length.value} changes nothing: one request may use the whole KV "
                f"cache pool, and kv_tokens={tokens} is as large"
            )
        self._check_pool(found.get("kv_tokens", length), values, topology)
        return values

    def _check_pool(self, node: Node | None, values: dict[str, Any], topology: Topology) -> None:
        """Refuse a pool in which not even the connector's self-test has room, which would end a start at its end."""
        if node is None or topology.one_process:
            return
        usual = ThinkerConfig()
        block = values.get("block_tokens", usual.block_tokens)
        if -(-values.get("kv_tokens", usual.kv_tokens) // block) < MIN_BLOCKS:
            least = (MIN_BLOCKS - 1) * block + 1
            self._problems.add(
                node,
                f"={node.value} is not allowed with block_tokens={block}; allowed: from {least}, {MIN_BLOCKS} blocks",
            )

    def _top_fields(self, top: dict[str, Node]) -> dict[str, Any]:
        fields: dict[str, Any] = {name: self._value(name, top[name]) for name in ("pipeline", "load") if name in top}
        names = [name for name in ("request_timeout_s", "while_asleep") if name in top]
        if "worker_backend" in top:
            ray = self._value("worker_backend", top["worker_backend"]) == "ray"
            fields["worker_backend"] = "ray" if ray else "process"
        if "ray_address" in top:
            fields["ray_address"] = self._value("ray_address", top["ray_address"])
        fields["bagel"] = BagelConfig(**{name: self._value(f"bagel.{name}", top[name]) for name in names})
        return fields

    def _note_ray(self, config: DeployConfig, top: dict[str, Node]) -> None:
        """Note what is said of Ray where it has nothing to start."""
        if config.worker_backend == "ray":
            names, why = ["worker_backend", "ray_address"], "every stage has one rank, its own process"
            if max(config.thinker.ranks, config.dit.ranks, config.vae_decode.patch_parallel_size) > 1:
                return
        else:
            names, why = ["ray_address"], "worker_backend is process"
        for node in (top[name] for name in names if name in top):
            self._notes.append(f"{node.origin.prefix}{node.path}={node.value!r} changes nothing: {why}")

    def _of_all_stages(self, name: str, top: dict[str, Node], stages: dict[int, dict[str, Node]]) -> dict[str, Any]:
        """The field ``name`` where the top or a stage has it, which must be the same for all."""
        nodes = [found[name] for found in (top, *stages.values()) if name in found]
        for node in nodes[1:]:
            if node.value != nodes[0].value:
                self._problems.add(node, f"={node.value!r} is not that of all stages, {nodes[0].value!r}")
        return {name: self._value(name, nodes[0])} if nodes else {}

    def _lora_modules(self, top: dict[str, Node], stages: dict[int, dict[str, Node]]) -> dict[str, Any]:
        """The folders of adapters that requests may name, by name, however they are written."""
        origin = next((found["lora_modules"] for found in (top, *stages.values()) if "lora_modules" in found), None)
        value = self._of_all_stages("lora_modules", top, stages).get("lora_modules")
        if origin is None or value is None:
            return {}
        pairs: list[tuple[str, str]] = []
        if isinstance(value, dict):
            pairs = list(value.items())
        else:
            for entry in [value] if isinstance(value, str) else value:
                if isinstance(entry, str):  # NAME=FOLDER
                    name, _, folder = entry.partition("=")
                    pairs.append((name, folder))
                else:  # as vLLM's JSON has it
                    pairs.append((entry.get("name", ""), entry.get("path", "")))
        for number, (name, folder) in enumerate(pairs):
            if not folder or not name or not name.isprintable() or name != name.strip():
                allowed = "NAME=FOLDER, with a name that is no blank"
                self._problems.add(origin, f"={format_value(origin.plain())} is not allowed; allowed: {allowed}")
                break
            if name in dict(pairs[:number]):
                self._problems.add(origin, f" names the adapter {name!r} twice; allowed: once")
                break
        return {"lora_modules": {name: str(Path(folder).expanduser()) for name, folder in pairs}}

    def _device(self, top: dict[str, Node], stages: dict[int, dict[str, Node]]) -> dict[str, Any]:
        """The device and dtype that stages name; the dtype must be the same for all."""
        fields = self._of_all_stages("dtype", top, stages)
        device = top.get("device")
        named = {stage_id: found["devices"] for stage_id, found in stages.items() if "devices" in found}
        if not named or (device is not None and device.origin.source.startswith("--")):
            return fields if device is None else {**fields, "device": self._value("device", device)}
        first = next(iter(named.values()))
        numbers = all(str(node.value).replace(",", "").isdigit() for node in named.values())
        if numbers and self._platform() == "cpu":
            if device is None or device.value != "cpu":
                where = " and ".join(f"{node.path}={format_value(node.value)}" for node in named.values())
                self._notes.append(
                    f"{first.origin.prefix}{where}: there is no CUDA device here, so the stages run on the CPU"
                )
            return fields if device is None else {**fields, "device": self._value("device", device)}
        listed = {
            stage_id: tuple(f"cuda:{one}" if one.isdigit() else one for one in str(node.value).split(","))
            for stage_id, node in named.items()
        }
        fields["rank_devices"] = {stage_id: every for stage_id, every in listed.items() if len(every) > 1}
        self._origins["device"] = first.origin
        names = {stage_id: every[0] for stage_id, every in listed.items()}
        if len(set(names.values())) == 1:
            return {**fields, "device": names[min(names)]}
        origins = {stage_id: node.origin for stage_id, node in named.items()}
        self._origins["device"], self._origins["dit_device"] = origins[THINKER_STAGE], origins[DIT_STAGE]
        return {**fields, "device": names[THINKER_STAGE], "dit_device": names[DIT_STAGE]}

    def _connector(
        self, top: dict[str, Node], stages: dict[int, dict[str, Node]], topology: Topology
    ) -> dict[str, Any]:
        """The connector that the stages name; the only one there is where they name none."""
        defined = top["connectors"].mapping if "connectors" in top else {}
        used: dict[str, Node] = {}
        for stage_id, found in stages.items():
            for side in ("input_connectors", "output_connectors"):
                for edge, reference in found[side].mapping.items() if side in found else ():
                    if not topology.one_process and (meant := _EDGES.get((stage_id, side))) != edge:
                        there = f"={format_value(reference.value)} means nothing: KV goes from stage 0 to stage 1 alone"
                        self._problems.add(reference, f"{there}; allowed: {meant or 'none'}")
                    elif reference.value in defined:
                        used.setdefault(reference.value, reference)
                    else:
                        known = (
                            f"names in connectors: {_or(tuple(defined))}"
                            if defined
                            else "none, as the file has no connectors"
                        )
                        self._problems.add(
                            reference, f"={format_value(reference.value)} is not allowed; allowed: {known}"
                        )
        for name, node in defined.items():
            if name not in used:  # its options change nothing
                vocabulary.check(node, vocabulary.CONNECTOR, self._problems, [])
        if len(used) > 1:
            both = " and ".join(used)
            self._problems.add(
                list(used.values())[-1],
                f" is a second connector ({both}): one carries KV from stage 0 to stage 1; name one",
            )
            return {}
        names = list(used) or (list(defined) if len(defined) == 1 and not topology.one_process else [])
        if not names:
            return {}
        fields, nodes = connector_fields(defined[names[0]], self._problems, self._notes)
        self._origins |= {target: node.origin for target, node in nodes.items()}
        # vLLM-Omni's name is for any two stages on one host; shm is for those of one server, on a CPU.
        named = nodes.get("connector")
        if named is not None and named.value == "SharedMemoryConnector":
            if self._flags.stage_id is not None:
                note = "is for stages of one server; with --stage-id the connector is chosen"
                self._notes.append(f"{named.origin.prefix}{named.path}={named.value} {note}")
            if self._flags.stage_id is not None or self._platform() == "cuda":
                fields["connector"] = "auto"
        return fields

    def _defaults(self, first: dict[str, Node], second: dict[str, Node]) -> dict[str, Any]:
        """Values of request fields: the thinker's are for text, the DiT's for images."""
        thinker, dit = (
            {} if DEFAULTS not in found else self._checked_defaults(found[DEFAULTS]) for found in (first, second)
        )
        text: dict[str, tuple[Any, Origin]] = {}
        image: dict[str, tuple[Any, Origin]] = {}
        for name, given in thinker.items():
            affects = REQUEST_FIELDS[name].affects
            if affects != "image":
                text[name] = given
            if affects in ("decoding", "thinking"):  # of the thinking before an image
                image[name] = given
        image |= {name: given for name, given in dit.items() if REQUEST_FIELDS[name].affects in ("image", "all")}
        if first is not second:
            self._report_unused(first, thinker.keys() - text.keys(), "an image: it belongs under stage 1")
            self._report_unused(second, dit.keys() - image.keys(), "the thinker: it belongs under stage 0")
        fields: dict[str, Any] = {}
        for kind, values in (("text_defaults", text), ("image_defaults", image)):
            fields[kind] = {name: value for name, (value, _) in values.items()}
            self._origins |= {f"{kind}.{name}": origin for name, (_, origin) in values.items()}
        return fields

    def _report_unused(self, stage: dict[str, Node], names: Collection[str], kind: str) -> None:
        """Report the defaults ``names`` of a stage, which only the other has a use for; vLLM-Omni's files have some."""
        node = stage.get(DEFAULTS)
        if node is None or node is self._flags.every_stage.get(DEFAULTS):  # which is for both
            return
        for given, entry in _fields_of(node):
            if vocabulary.request_field(given) not in names:
                continue
            if entry.origin.source.startswith("--"):
                self._problems.add(entry, f"={format_value(entry.plain())} is for {kind}")
            else:
                self._notes.append(f"{entry.origin.prefix}{entry.path} changes nothing here: it is for {kind}")

    def _checked_defaults(self, node: Node) -> dict[str, tuple[Any, Origin]]:
        return vocabulary.check_defaults(node, self._problems)


def _fields_of(defaults: Node) -> Iterator[tuple[str, Node]]:
    """The fields of a ``default_sampling_params``, those of its ``extra_args`` too."""
    for name, entry in defaults.mapping.items():
        if name == "extra_args":
            yield from _fields_of(entry)
        else:
            yield name, entry


def _several(node: Node) -> bool:
    """Whether a size, or the switch of one, means more than one rank."""
    return node.value is True or (node.value is not False and node.value > 1)


def _not_of_thinker(node: Node) -> str:
    allowed = "false" if node.value is True else "1"
    return f"={format_value(node.value)} is not supported: {vocabulary.THINKER_RANKS}; allowed: {allowed}"


def _or(names: tuple[str, ...]) -> str:
    return ", ".join(names)
