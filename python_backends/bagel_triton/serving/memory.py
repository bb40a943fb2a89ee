"""``bagel-triton memory``: the memory that each stage takes, and whether this machine has it."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bagel_triton.deploy.config import ALL_LAYERS_GB, ConfigError, DeployConfig, Quantization
from bagel_triton.ipc.host_memory import host_memory
from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.parallel import sizes as rank_sizes
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import TEXT2IMG, GenerationRequest
from bagel_triton.protocol.validation import resolve_flow
from bagel_triton.serving import CommandError, flags

# Heavy modules are imported once the arguments are known to be good: --help must not wait for torch.
if TYPE_CHECKING:
    import torch

    from bagel_triton.model.device import Placement
    from bagel_triton.serving.memory_plan import Available, MemoryPlan, NotEnoughMemory
    from bagel_triton.weights.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    flags.add_checkpoint(parser)
    flags.add_deploy_config(parser)
    parser.add_argument("--max-requests", type=int, metavar="N", help="images denoised together (dit.max_num_seqs)")
    side = TEXT2IMG.side
    parser.add_argument("--height", type=int, help=f"of every image, in pixels (default: {side})")
    parser.add_argument("--width", type=int, help=f"of every image, in pixels (default: {side})")
    parser.add_argument("--device", help="auto, cpu, cuda, also where there is none, or cuda:N (default: the YAML's)")
    parser.add_argument("--dtype", help="auto, float32 or bfloat16 (default: the YAML's)")
    flags.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        CommandError: the checkpoint or an argument is wrong, or the device does not answer.
    """
    from bagel_triton.weights.checkpoint import inspect

    folder = flags.checkpoint(args.checkpoint, args.revision)
    try:
        config, default_pool = _configuration(args, folder)
        rank_sizes.check(config, inspect(folder).language)
        for half in by_device(config):
            _show(half, folder, args, default_pool)
    except (ValueError, InvalidRequest) as error:
        raise CommandError(str(error)) from error
    return 0


def _show(config: DeployConfig, folder: Path, args: argparse.Namespace, default_pool: bool) -> None:
    """Print the table of the stages on one device."""
    from bagel_triton.serving import memory_plan, stage_memory
    from bagel_triton.weights.adapters import USUAL_RANK
    from bagel_triton.weights.checkpoint import Checkpoint

    placement, here = _placement(config)
    checkpoint = Checkpoint(folder, config.adapter, config.load, config.max_generated_image_size)
    height, width = _size(checkpoint, args.height, args.width)
    free = available(placement) if here else None
    private = None if free is None else free.private_weights
    config, need, problem = _planned(checkpoint, config, placement, (height, width), free, default_pool)
    print(f"pipeline {config.pipeline} on {placement.device} in {placement.dtype_name}")
    together = f"images of {width}x{height} pixels denoised together: {config.dit.max_num_seqs}"
    print(f"KV cache pool of {config.thinker.kv_tokens} tokens; {together}")
    print(f"quantization: {quantization_summary(checkpoint, config)}")
    print(f"\n{table(need)}\n")
    copies = "The dit's KV are its copies of the contexts of editing such images. "
    print(f"{copies if any(stage.stage == 'dit' for stage in need.stages) else ''}Activations are estimates.")
    print("Together, weights that stages share count once." if need.shares_weights else "No stages share weights.")
    if private is not None and not config.topology.one_process:
        print(f"They cannot on {placement.device}: {private}.")
    later = stage_memory.later_adapters(config)
    if config.lora_modules or later:
        rank = config.max_lora_rank or USUAL_RANK
        room = f", and room for {later} more of rank {rank} (max_loras, max_lora_rank)" if later else ""
        print(f"Adapters: {len(config.lora_modules)} of the start{room}; their bytes count as weights.")
    if need.contexts:
        print(f"Together includes {memory_plan.readable(need.contexts)} for CUDA in the processes.")
    if need.offloaded:
        print(f"Offloaded to the host's memory: {memory_plan.readable(need.offloaded)}.")
    if need.lent:
        print(f"Lent by {config.connector}, from the host's memory: {memory_plan.readable(need.lent)}.")
    if free is not None:
        print("This machine has it." if problem is None else f"This machine does not have it: {problem}")


def require(config: DeployConfig, default_pool: bool = False) -> DeployConfig:
    """``config`` with a KV pool that fills its part of the GPU, where it says so; refuses what would not fit.

    With ``default_pool`` a GPU's pool is as large as ``max_num_seqs`` texts need, where it has the memory.

    Raises:
        CommandError: what is needed, what there is, and what to lower.
    """
    if config.dit_device is None:
        return _required(config, default_pool)
    first, second = (_required(half, default_pool) for half in by_device(config))
    return msgspec.structs.replace(config, thinker=first.thinker, dit=second.dit, vae_decode=second.vae_decode)


def by_device(config: DeployConfig) -> list[DeployConfig]:
    """``config``; of stages on two devices, what each device has of it."""
    if config.dit_device is None:
        return [config]
    devices = (config.device, config.dit_device)
    return [
        msgspec.structs.replace(config, stage_id=stage_id, device=device, dit_device=None)
        for stage_id, device in enumerate(devices)
    ]


def _required(config: DeployConfig, default_pool: bool) -> DeployConfig:
    from bagel_triton.model.device import resolve
    from bagel_triton.weights.checkpoint import Checkpoint

    try:
        checkpoint = Checkpoint(config.checkpoint, config.adapter, config.load, config.max_generated_image_size)
        placement = resolve(config.device, config.dtype)
        free = available(placement)
        # A GPU that runs out fails requests of others, too: the largest images that are admitted have to fit.
        side = None if free.device is None else checkpoint.config.latent.max_side
        size = _size(checkpoint, side, side)
        sized, _, problem = _planned(checkpoint, config, placement, size, free, default_pool)
        if problem is not None:
            raise problem
    except ValueError as error:
        raise CommandError(str(error)) from error
    return sized


AUTO: tuple[Quantization | None, ...] = (None, "int8", "nf4")  # what ``auto`` tries, the best first


def _planned(
    checkpoint: Checkpoint,
    config: DeployConfig,
    placement: Placement,
    size: tuple[int, int],
    free: Available | None,
    default_pool: bool = False,
) -> tuple[DeployConfig, MemoryPlan, NotEnoughMemory | None]:
    """``config`` with what is left to the server, what it takes, and why it does not fit where it does not.

    Left to it are the form of weights, the KV pool and, on a GPU, whether images are decoded whole or in strips, and
    the size of a ``default_pool``, which gets what the others leave. With nothing known to be ``free``, all fits.

    Raises:
        ValueError: a checkpoint's weights are in another form; ``gpu_memory_utilization`` leaves no room.
    """
    from bagel_triton.serving import memory_plan as memory

    shares_weights = free is None or free.private_weights is None
    stored = checkpoint.form(None) is not None
    tries = AUTO if not stored and "auto" in (config.thinker.quantization, config.dit.quantization) else (None,)
    on_gpu, tiling = placement.torch_device.type == "cuda", config.vae_decode.use_tiling
    gigabytes: list[float | None] = [None]
    attempts = [*product(tries, gigabytes, (False, True) if on_gpu and tiling is None else (tiling,))]
    if on_gpu and len(tries) > 1 and not (config.thinker.cpu_offload_gb or config.dit.cpu_offload_gb):
        # The last resort, in strips: as many layers on the host as it takes.
        layers = checkpoint.config.language.num_layers
        layer, _ = checkpoint.offloaded_bytes(placement.torch_dtype, tries[-1], 2**-30)
        attempts += [(tries[-1], count * layer / 2**30, tiling is not False) for count in range(1, layers + 1)]
    for form, offload_gb, tiled in attempts:
        tried = _quantized(config, form)
        if offload_gb is not None:
            tried = _offloaded(tried, offload_gb)
        tried = msgspec.structs.replace(tried, vae_decode=msgspec.structs.replace(tried.vae_decode, use_tiling=tiled))
        problem: NotEnoughMemory | None = None
        try:
            if free is not None:
                most = memory.plan(checkpoint, memory.roomy(tried), placement, *size, shares_weights)
                tried = memory.sized(most, tried, free)
            need = memory.plan(checkpoint, tried, placement, *size, shares_weights)
            if free is not None:
                memory.check(need, tried, placement, free)
        except memory.NotEnoughMemory as error:
            problem = error
            need = memory.plan(checkpoint, tried, placement, *size, shares_weights)
        if problem is None:
            break
    if default_pool and on_gpu and problem is None:
        most = memory.plan(checkpoint, memory.roomy(tried), placement, *size, shares_weights)
        larger = memory.filled(most, tried, free)
        plan = memory.plan(checkpoint, larger, placement, *size, shares_weights)
        with contextlib.suppress(memory.NotEnoughMemory):  # of the host, for what Mooncake lends
            if free is not None:
                memory.check(plan, larger, placement, free)
            tried, need = larger, plan
    return tried, need, problem


def _quantized(config: DeployConfig, form: Quantization | None) -> DeployConfig:
    """``config`` with ``form`` where it says auto."""
    stages = {
        name: msgspec.structs.replace(stage, quantization=form)
        for name, stage in (("thinker", config.thinker), ("dit", config.dit))
        if stage.quantization == "auto"
    }
    return msgspec.structs.replace(config, **stages)


def _offloaded(config: DeployConfig, gigabytes: float) -> DeployConfig:
    """``config`` with so many GiB of each stage's weights on the host."""
    thinker = msgspec.structs.replace(config.thinker, cpu_offload_gb=gigabytes)
    return msgspec.structs.replace(
        config, thinker=thinker, dit=msgspec.structs.replace(config.dit, cpu_offload_gb=gigabytes)
    )


def quantization_summary(checkpoint: Checkpoint, config: DeployConfig) -> str:
    """The form of each stage's weights, in words."""
    forms = [checkpoint.form(stage.quantization) for stage in (config.thinker, config.dit)]
    thinker, dit = ("none" if form is None else form.name for form in forms)
    forms_said = thinker if thinker == dit or config.topology.one_process else f"{thinker} (thinker), {dit} (dit)"
    parts = {"thinker": config.thinker.cpu_offload_gb, "dit": config.dit.cpu_offload_gb}
    if config.topology.one_process or config.load == "understanding":
        del parts["dit"]
    layers = [f"{stage}: {size:.4g} GiB" for stage, size in parts.items() if size]
    said = "all layers" if all(size >= ALL_LAYERS_GB for size in parts.values()) else ", ".join(layers)
    return f"{forms_said}, offloaded to the host: {said}" if layers else forms_said


def pool_summary(config: DeployConfig) -> str:
    """The size of the KV pool, in words."""
    from bagel_triton.serving import memory_plan

    return memory_plan.pool_summary(config)


def table(need: MemoryPlan) -> str:
    """``need`` as a table: a row for each stage, and one for all together."""
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


def _configuration(args: argparse.Namespace, folder: Path) -> tuple[DeployConfig, bool]:
    """The deploy YAML's configuration, or the default one, changed by the arguments; whether its pool is a default."""
    from bagel_triton.deploy import yaml as deploy_yaml

    path = flags.deploy_file(args.deploy_config)
    deployment = deploy_yaml.resolve(path, str(folder), flags.flags_of(args))
    config = deployment.config
    changes: dict[str, Any] = {}
    if args.max_requests is not None:
        changes["dit"] = msgspec.structs.replace(config.dit, max_num_seqs=args.max_requests)
    if config.load == "generation":  # stage 1's part
        changes["stage_id"] = 1
    return msgspec.structs.replace(config, **changes), deployment.default_pool


def _placement(config: DeployConfig) -> tuple[Placement, bool]:
    """The device and dtype of the stages, and whether this machine has that device."""
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
    usual = min(TEXT2IMG.side, checkpoint.config.drawn_side)
    flow = resolve_flow(request, checkpoint.config.latent.max_side, TEXT2IMG, (usual, usual))
    return flow.height, flow.width


# --- this machine's free memory ---


def available(placement: Placement) -> Available:
    """The memory that is free for stages at ``placement``."""
    from bagel_triton.serving.memory_plan import Available

    shared = os.statvfs(SHM_DIRECTORY)
    host, free = host_memory(), shared.f_bavail * shared.f_frsize
    if placement.torch_device.type == "cpu":
        return Available(host, free)
    device, private_weights, total = _on_device(placement.torch_device)
    return Available(host, free, device, private_weights, total)


def _on_device(device: torch.device) -> tuple[int, str | None, int]:
    """Free bytes of a CUDA device, why its weights cannot be shared, if they cannot, and all of its bytes.

    A process of its own queries the device, as the query itself takes memory there until the process ends.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_ask_device, device).result()
        except BrokenProcessPool as error:  # a driver that crashes, or too little memory to start with
            raise ValueError(f"device={str(device)!r} does not answer: the process that asked it died") from error


def _ask_device(device: torch.device) -> tuple[int, str | None, int]:
    import torch

    from bagel_triton.ipc.cuda_memory import why_not

    try:
        free, total = torch.cuda.mem_get_info(device)
        return free, why_not(device), total
    except RuntimeError as error:  # a GPU that is full, or gone
        raise ValueError(f"device={str(device)!r} does not answer: {str(error).splitlines()[0]}") from error
