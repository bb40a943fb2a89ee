"""Arguments shared by commands: the checkpoint, the deploy file, and the flags of ``vllm serve`` that override it.

All is checked before anything starts. A flag of ``vllm serve`` is the field of the same name, for every stage that
has it, and is checked by the same declaration. Flags without a field are taken where they change nothing, and
refused with what to do instead.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from msgspec import Meta

from bagel_triton.deploy import vocabulary
from bagel_triton.deploy.config import POLICIES
from bagel_triton.deploy.files import PRESETS, preset
from bagel_triton.deploy.located import Node, Origin, Problems, merged, of_value
from bagel_triton.deploy.vocabulary import Field, Fields, Neutral, Setting
from bagel_triton.deploy.yaml import NO_FLAGS, Flags
from bagel_triton.protocol.errors import NEAR
from bagel_triton.serving import CommandError
from bagel_triton.serving.machine import source_file

# The settings that --help lists, with the name of a value.
LISTED = {
    "max_num_seqs": "N",
    "max_num_batched_tokens": "N",
    "max_model_len": "N",
    "kv_tokens": "N",
    "max_waiting": "N",
    "gpu_memory_utilization": "F",
    "enable_prefix_caching": "",
    "vae_use_tiling": "",
    "tensor_parallel_size": "N",
    "cfg_parallel_size": "N",
    "ulysses_degree": "N",
    "use_hsdp": "",
    "hsdp_shard_size": "N",
    "hsdp_replicate_size": "N",
    "vae_patch_parallel_size": "N",
    "quantization": "FORM",
    "cpu_offload_gb": "GIB",
    "enable_layerwise_offload": "",
    "lora_path": "DIR",
    "lora_scale": "F",
    "lora_modules": "NAME=DIR",
    "lora_dir": "DIR",
    "max_loras": "N",
    "max_lora_rank": "N",
    "max_generated_image_size": "PIXELS",
    "worker_backend": "BACKEND",
    "ray_address": "HOST:PORT",
}
_UNLISTED = (
    "block_tokens",
    "encoder_cache_mb",
    "enforce_eager",
    "lease_ttl_s",
    "block_size",
    "num_gpu_blocks_override",
    "num_replicas",
)
_SHORT = {"tensor_parallel_size": ["-tp"], "pipeline_parallel_size": ["-pp"], "data_parallel_size": ["-dp"]}
_LONG = {"ulysses_degree": ["--usp"], "ring_degree": ["--ring"]}
_Natural = Annotated[float, Meta(ge=0)]
# Flags that are no fields of a file.
OTHERS: Fields = {
    "omni": Neutral("", (True, False)),
    "async_chunk": vocabulary.TOP["async_chunk"],
    "batch_timeout": Neutral("seconds >= 0", type=_Natural),
    "config": "vLLM's own file of flags is not read; write a deploy file, --deploy-config",
    "diffusion_load_format": vocabulary.ENGINE["load_format"],
    "diffusion_streaming_output": Neutral("requests ask for previews: partial_images", (False,)),
    "enable_ar_profiler": Neutral("traces and /metrics have each stage's times", (False,)),
    "enable_cache_dit_summary": Neutral("there is no such cache; requests ask for `cache: taylorseer`", (False,)),
    "enable_log_requests": Neutral("", (True, False)),
    "enable_orch_monitor": Neutral("/health and /metrics report every stage", (False,)),
    "disable_log_requests": Neutral("", (True, False)),
    "init_sleep_seconds": Neutral("seconds >= 0; nothing waits for them", type=_Natural),
    "init_timeout": Neutral("seconds >= 0; serve waits for the stages, and reports", type=_Natural),
    "log_stats": Neutral("", (True, False)),
    "num_weight_load_threads": Neutral("an integer >= 1", type=vocabulary.Count),
    "omni_dp_size_local": Neutral(vocabulary.REPLICAS, (1,)),
    "omni_heartbeat_timeout": Neutral("seconds >= 0; a dead stage is noticed within ten", type=_Natural),
    "omni_lb_policy": Neutral(vocabulary.REPLICAS, POLICIES),
    "omni_replica_address": "serve has it, as --host-address",
    "ray_address": vocabulary.TOP["ray_address"],
    "request_batch_max_wait_ms": Neutral("a request never waits for others to join its batch", (0,)),
    "shm_threshold_bytes": vocabulary.TOP["shm_threshold_bytes"],
    "stage_init_timeout": Neutral("seconds >= 0; serve waits for the stages, and reports", type=_Natural),
    "strategy_config": "write a deploy file, --deploy-config",
    "task": Neutral("modalities are a request's", ("generate", "auto")),
    "tokenizer": "the checkpoint's own tokenizer is used",
    "tokenizer_mode": Neutral("the checkpoint's own tokenizer is used", ("auto",)),
    "worker_backend": vocabulary.TOP["worker_backend"],
}
_OTHER_NAMES = {"omni_replica_address": ["-ora"]}
_JSON = {
    "stage_overrides": 'fields by stage, such as \'{"1": {"max_num_seqs": 4}}\'',
    "default_sampling_params": "request fields that a request leaves out, as JSON; by stage, or for all",
}
TOY = "build/tiny_bagel/checkpoint"  # small, trained, shipped with the package


def add_checkpoint(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Declare the positional argument CHECKPOINT and ``--revision``, for :func:`checkpoint`.

    Where it is ``optional``, the toy is the default.
    """
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?" if optional else None,
        help="folder of the checkpoint, or its name at the Hugging Face hub (ByteDance-Seed/BAGEL-7B-MoT): taken from "
        "the cache, or downloaded to it" + ("; without it, a toy that comes with this package" if optional else ""),
    )
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Declare ``--revision``, for :func:`checkpoint`."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub's checkpoint (default: main)")


def checkpoint(given: str | None, revision: str | None = None) -> Path:
    """The folder that ``given`` names, with every file of a checkpoint, downloaded where it has to be; or the toy's.

    Raises:
        CommandError: says what is wrong and how to get the checkpoint.
    """
    from bagel_triton.model.config import CheckpointError
    from bagel_triton.weights.folder import check_folder
    from bagel_triton.weights.hub import find_checkpoint

    try:
        folder = source_file(TOY) if given is None else find_checkpoint(given, revision)
        check_folder(folder)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    except OSError as error:  # such as a folder that this user may not read
        raise CommandError(f"checkpoint {given}: {error.filename}: {error.strerror}") from error
    return folder


def add_deploy_config(parser: argparse.ArgumentParser) -> None:
    """Declare ``--deploy-config``, for :func:`deploy_file`."""
    parser.add_argument(
        "--deploy-config",
        "--stage-configs-path",
        metavar="YAML",
        action=Once,
        help=f"topology and limits of the stages: a file, or one of {', '.join(PRESETS)} (default: bagel)",
    )


class Once(argparse.Action):
    """A flag of several names, which take one value together."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if (before := getattr(namespace, self.dest, None)) not in (None, values):
            names = " and ".join(self.option_strings)
            parser.error(f"{option}={values} is a second value beside {before}: {names} are one option; keep one")
        setattr(namespace, self.dest, values)


def deploy_file(given: str | None) -> Path | None:
    """The file that ``--deploy-config`` names, a preset's or one's own; None where it is not given.

    Raises:
        CommandError: there is no such file; names the presets.
    """
    if given is None:
        return None
    path = Path(given)
    if (found := path if path.is_file() else preset(given)) is None and not path.exists():
        near = difflib.get_close_matches(path.stem[:100], PRESETS, n=1, cutoff=NEAR)
        suggestion = f"did you mean {near[0]}? " if near else ""
        raise CommandError(f"{given} is no file and no preset; {suggestion}presets: {', '.join(PRESETS)}")
    return found or path


def host_port(flag: str, given: str) -> str:
    """HOST:PORT as ``given``, with or without ``http://`` or ``grpc://`` before it.

    Raises:
        CommandError: it has no host or no port; names ``flag``.
    """
    address = given.partition("://")[2].rstrip("/") if "://" in given else given
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed) or not port.isdigit() or not 0 < int(port) < 65536:
        hint = f", such as {address}:8001" if address and ":" not in address else ""
        raise CommandError(f"{flag}={given} is not allowed; allowed: HOST:PORT of Triton's gRPC{hint}")
    return address


def add_arguments(parser: argparse.ArgumentParser, exclude: Sequence[str] = ()) -> None:
    """Declare the flags, for :func:`flags_of`; ``exclude`` are fields that the command has flags of its own for."""
    group = parser.add_argument_group("stages, as in the deploy file, which they override")
    load = vocabulary.TOP["load"]
    assert isinstance(load, Setting)
    group.add_argument("--load", metavar="PARTS", help=f"{load.doc} (default: all)")
    fields: dict[str, Field] = {name: {**OTHERS, **vocabulary.STAGE}[name] for name in (*LISTED, *_UNLISTED)}
    fields |= vocabulary.ENGINE
    for name, field in {**fields, **OTHERS}.items():
        if name in exclude:
            continue
        names = [*_SHORT.get(name, ()), *_OTHER_NAMES.get(name, ()), *_LONG.get(name, ()), f"--{_dashed(name)}"]
        listed = name in LISTED and isinstance(field, Setting)
        help_ = field.doc if listed and isinstance(field, Setting) else argparse.SUPPRESS
        metavar = LISTED.get(name) or "VALUE"
        to = group if listed else parser
        if isinstance(field, str) or not _is_switch(field):
            nargs = ("+" if name == "lora_modules" else None) if isinstance(field, Setting) else "?"
            to.add_argument(*names, dest=_KEPT, nargs=nargs, metavar=metavar, action=_Flag, field_name=name, help=help_)
            continue
        to.add_argument(*names, dest=_KEPT, nargs=0, action=_Flag, field_name=name, help=help_)
        off = f"--no-{_dashed(name)}"
        to.add_argument(off, dest=_KEPT, nargs=0, action=_Flag, field_name=name, help=argparse.SUPPRESS)
    for name, meaning in _JSON.items():
        group.add_argument(
            f"--{_dashed(name)}", dest=_KEPT, metavar="JSON", action=_Flag, field_name=name, help=meaning
        )


def flags_of(args: argparse.Namespace) -> Flags:
    """The overrides by the flags in ``args``, with the command's own ``--device``, ``--dtype`` and ``--stage-id``."""
    top = NO_FLAGS.top
    for name in ("device", "dtype", "load", "while_asleep"):
        if (value := getattr(args, name, None)) is not None:
            top = merged(top, _top(f"--{_dashed(name)}", name, value))
    every: dict[str, Node] = {}
    for flag, name, value in getattr(args, _KEPT, None) or ():
        if name in _JSON:
            by_stage = _by_stage(flag, value if name == "stage_overrides" else _wrapped(name, value))
            if by_stage is None:
                every[name] = of_value(value, Origin(flag), flag)
            else:
                top = merged(top, by_stage)
        elif isinstance(OTHERS.get(name), Setting):
            top = merged(top, _top(flag, name, value))
        elif name not in OTHERS:
            every[name] = of_value(value, Origin(flag), flag)
    return Flags(top, every, getattr(args, "stage_id", None))


_KEPT = "stage_flags"


class _Flag(argparse.Action):
    """Reads a flag's value as a file would, and refuses it in the words for the field."""

    def __init__(self, *args: Any, field_name: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.field_name = field_name

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        assert option is not None, "it is no positional argument"
        flag, name = self.option_strings[-1], self.field_name
        value: Any
        if name in _JSON:
            value = _json(parser, flag, values)
        elif self.nargs == 0:
            value = not option.startswith("--no-")
        else:
            value = True if values is None else _scalars(values)
        field = OTHERS.get(name, vocabulary.STAGE.get(name, ""))
        problems = Problems()
        if name not in _JSON:
            node = Node({name: of_value(value, Origin(flag), flag)}, Origin(flag), flag)
            vocabulary.check(node, {name: field}, problems, [])
        if problems:
            parser.error(problems.text())
        setattr(namespace, _KEPT, [*(getattr(namespace, _KEPT, None) or ()), (flag, name, value)])


def _scalars(values: str | list[str]) -> Any:
    return _scalar(values) if isinstance(values, str) else [_scalar(text) for text in values]


def _scalar(text: str) -> Any:
    """The value that ``text`` is in a YAML file; a text where it is none."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    return text if value is None else value


def _json(parser: argparse.ArgumentParser, flag: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        parser.error(f"{flag}={text} is not JSON: {error}")
    if not isinstance(value, dict):
        parser.error(f"{flag}={text} is not allowed; allowed: a JSON object")
    return value


def _wrapped(name: str, by_stage: dict[str, Any]) -> dict[str, Any]:
    return {stage: {name: values} if _is_number(stage) else values for stage, values in by_stage.items()}


def _by_stage(flag: str, values: dict[str, Any]) -> Node | None:
    """``values`` by stage id as a file has them; None if they are not by stage."""
    if flag != "--stage-overrides" and not all(_is_number(stage) for stage in values):
        return None
    stages = []
    for stage, fields in values.items():
        origin, path = Origin(flag), f"{flag}.{stage}"
        entries = of_value(fields, origin, path)
        stage_id = Node(int(stage) if _is_number(stage) else stage, origin, path)
        value = {"stage_id": stage_id, **entries.value} if isinstance(entries.value, dict) else entries.value
        stages.append(Node(value, origin, path))
    return Node({"stages": Node(stages, Origin(flag), flag)}, Origin(flag))


def _top(flag: str, name: str, value: Any) -> Node:
    return Node({name: of_value(value, Origin(flag), flag)}, Origin(flag))


def _is_switch(field: Setting | Neutral) -> bool:
    """Whether it is true or false."""
    if isinstance(field, Setting):
        return field.type is bool
    return field.type is None and {type(value) for value in field.values} - {type(None)} == {bool}


def _is_number(stage: str) -> bool:
    return stage.isascii() and stage.isdigit()


def _dashed(name: str) -> str:
    return name.replace("_", "-")
