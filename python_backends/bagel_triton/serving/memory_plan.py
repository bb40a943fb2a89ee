"""The memory a configuration takes, from the geometry of its checkpoint; no weights are loaded.

Weights, keys and values are exact. Activations are estimates: what one forward holds at its
peak, with every image that may be denoised together. On a GPU each process has a CUDA context
with its libraries, and as a rank NCCL's buffers, by estimates that no GPU has confirmed. Not
counted are a CPU's libraries, the workspaces of convolutions and what TaylorSeer keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.thinker.engine import decoded_blocks
from bagel_triton.model.device import Placement
from bagel_triton.protocol.request import TEXT
from bagel_triton.serving.stage_memory import StageMemory, StageParts
from bagel_triton.weights.checkpoint import Checkpoint

USUAL_PROMPT = 64  # tokens, of the texts that the size of a pool is given in
POOL_PART = 0.9  # of a GPU's free memory that a plan may take with a pool larger than the least


class NotEnoughMemory(ValueError):
    """A configuration needs more memory than there is; the message says what to lower."""


@dataclass(frozen=True)
class MemoryPlan:
    """The stages of one server in bytes.

    ``weights`` are those of all stages, each counted as often as it is in memory.
    ``shared`` is what lies in the host's shared memory: the connector ``shm``'s pool, and those of a CPU's weights
    that cannot be mapped from the checkpoint's files. ``contexts`` are those of the processes on a GPU, Triton's among
    them. ``offloaded`` are weights in the host's memory, for a GPU, and ``lent`` what Mooncake lends from there of a
    GPU's pool.
    """

    stages: tuple[StageMemory, ...]
    kv_token: int
    weights: int
    shared: int
    contexts: int = 0
    offloaded: int = 0
    lent: int = 0

    @property
    def kv(self) -> int:
        return sum(stage.kv for stage in self.stages)

    @property
    def activations(self) -> int:
        return sum(stage.activations for stage in self.stages)

    @property
    def shares_weights(self) -> bool:
        """Whether stages use the same copy of some weights."""
        return self.weights < sum(stage.weights for stage in self.stages)

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.kv + self.activations + self.contexts


def plan(
    checkpoint: Checkpoint,
    config: DeployConfig,
    placement: Placement,
    height: int,
    width: int,
    shares_weights: bool = True,
) -> MemoryPlan:
    """Memory of the stages that serve ``config`` at ``placement``; of ranks on GPUs that of the first ones' GPU.

    Args:
        height: of every image, in pixels; the contexts are those of editing such images.
        width: likewise.
        shares_weights: whether the stages' processes can have one copy of the weights there.
    """
    parts = StageParts(checkpoint, config, placement, height, width)
    stages: tuple[StageMemory, ...] = (parts.thinker(), parts.dit(), parts.vae_decode())
    if config.stage_id is not None or not parts.draws:
        stages = tuple(stage for stage in stages if stage.stage in config.models)
    weights = sum(stage.weights for stage in stages)
    shared = parts.pool if _pool_is_shared(config, placement) else 0
    # Of offloaded weights each process copies from its own.
    if parts.one_process or (shares_weights and not parts.offloaded):
        weights = parts.weights_of_all(stages)
        if not parts.on_gpu and not parts.one_process:
            shared += checkpoint.stored_apart(placement.torch_dtype, parts.whole)
    lent = parts.lent if parts.on_gpu and config.stage_id != 1 else 0
    return MemoryPlan(stages, parts.token, weights, shared, parts.contexts(stages), parts.offloaded, lent)


def _pool_is_shared(config: DeployConfig, placement: Placement) -> bool:
    """Whether the pool is in the host's shared memory; else it is the thinker's own, or on the GPU."""
    on_cpu = placement.torch_device.type == "cpu"
    return on_cpu and not config.topology.one_process and config.connector in ("auto", "shm")


@dataclass(frozen=True)
class Available:
    """Bytes that are free: of the machine's memory, of shared memory, and of a CUDA device where one is used.

    ``private_weights`` is why each process needs a copy of the weights there; None where they can share one.
    ``device_total`` is all of that device's memory.
    """

    host: int
    shared: int
    device: int | None = None
    private_weights: str | None = None
    device_total: int | None = None


def check(need: MemoryPlan, config: DeployConfig, placement: Placement, available: Available) -> None:
    """Refuse a plan that does not fit.

    Raises:
        NotEnoughMemory: what is needed, what there is, and what to lower.
    """
    if need.shared > available.shared:
        raise NotEnoughMemory(
            f"the KV cache pool ({readable(need.stages[0].kv)}) and converted weights need {readable(need.shared)} of "
            f"shared memory and {readable(available.shared)} are free: enlarge /dev/shm (a container's --shm-size), "
            f"or lower thinker.kv_tokens={config.thinker.kv_tokens}, or use the checkpoint's own dtype"
        )
    if need.offloaded > available.host:
        raise NotEnoughMemory(
            f"the weights that are offloaded need {readable(need.offloaded)} of the host's memory and "
            f"{readable(available.host)} are free: lower cpu_offload_gb, or quantise the weights"
        )
    if need.offloaded + need.lent > available.host:
        raise NotEnoughMemory(
            f"the keys and values that {config.connector} lends from the host's memory need {readable(need.lent)} and "
            f"{readable(available.host - need.offloaded)} are free: lower thinker.kv_tokens={config.thinker.kv_tokens}"
        )
    if available.device is None:
        needed, free, where = need.total, available.host, "memory"
    else:
        needed, free, where = need.total, available.device, f"memory on {placement.device}"
    if needed <= free:
        return
    remedies = [] if placement.torch_dtype == torch.bfloat16 else ["use dtype bfloat16"]
    if need.weights > free:
        duplicated = need.weights > need.stages[0].weights  # the thinker has one of each
        remedies.append("serve bagel_single_stage" if duplicated else "use a larger machine")
    else:
        remedies.append(f"lower dit.max_num_seqs={config.dit.max_num_seqs}")
        remedies.append(f"lower thinker.kv_tokens={config.thinker.kv_tokens}")
    if config.thinker.quantization is None:
        remedies.append("quantise the weights (quantization: auto)")
    raise NotEnoughMemory(
        f"the stages need {readable(needed)} of {where} and {readable(free)} are free (weights "
        f"{readable(need.weights)}, keys and values {readable(need.kv)}, activations {readable(need.activations)}): "
        f"{', or '.join(remedies)}"
    )


def sized(need: MemoryPlan, config: DeployConfig, available: Available) -> DeployConfig:
    """``config`` with a KV pool that fills what the stages' ``gpu_memory_utilization`` leaves of the GPU.

    Where both stages have one, their parts together hold what both need; else the thinker's part holds what the
    thinker needs. ``config`` itself on a CPU, and where the thinker has none. ``kv_tokens`` is the least.

    Raises:
        NotEnoughMemory: less than ``kv_tokens`` would fit.
    """
    fraction, dit = config.thinker.gpu_memory_utilization, config.dit.gpu_memory_utilization
    if available.device_total is None or fraction is None:
        return config
    counted = need.stages
    if config.topology.one_process:
        weights, part = need.weights, fraction
    elif dit is not None and config.stage_id is None:
        weights, part = need.weights, min(fraction + dit, 1.0)
    else:
        counted = tuple(stage for stage in need.stages if stage.stage == "thinker")
        weights, part = sum(stage.weights for stage in counted), fraction
    taken = weights + sum(stage.activations + (stage.kv if stage.stage != "thinker" else 0) for stage in counted)
    budget, block = int(part * available.device_total), config.thinker.block_tokens
    tokens = max(budget - taken, 0) // need.kv_token // block * block
    if tokens < config.thinker.kv_tokens:
        raise NotEnoughMemory(
            f"gpu_memory_utilization={part:g} of {readable(available.device_total)} leaves {tokens} tokens for the KV "
            f"cache pool beside {readable(taken)} of weights and activations; kv_tokens={config.thinker.kv_tokens}: "
            "raise gpu_memory_utilization, or lower kv_tokens, max_model_len or max_num_batched_tokens"
        )
    return msgspec.structs.replace(config, thinker=msgspec.structs.replace(config.thinker, kv_tokens=tokens))


def text_blocks(config: DeployConfig) -> int:
    """Blocks of the pool that a text of the default length holds at most: a short prompt's, and the decoded ones."""
    block = config.thinker.block_tokens
    new = int(config.text_defaults.get("max_tokens", TEXT.max_tokens))
    return -(-USUAL_PROMPT // block) + decoded_blocks(USUAL_PROMPT, new, block)


def pool_summary(config: DeployConfig) -> str:
    """The size of the KV pool, and how many texts of the default length it has room for at once."""
    thinker = config.thinker
    texts = -(-thinker.kv_tokens // thinker.block_tokens) // text_blocks(config)
    new = config.text_defaults.get("max_tokens", TEXT.max_tokens)
    length = f"{USUAL_PROMPT} tokens of prompt and max_tokens={new}"
    return f"{thinker.kv_tokens} tokens: {texts} texts at once, of {length}; max_num_seqs is {thinker.max_num_seqs}"


def filled(need: MemoryPlan, config: DeployConfig, available: Available | None) -> DeployConfig:
    """``config`` with a KV pool for ``max_num_seqs`` texts of the default length on a GPU, or for as many as fit.

    Args:
        need: what :func:`roomy` of ``config`` takes.
        available: None where everything fits.
    """
    block = config.thinker.block_tokens
    tokens = config.thinker.max_num_seqs * text_blocks(config) * block
    # Stage 1 has no pool, and only bounds what stage 0 may lend.
    if available is not None and available.device is not None and config.stage_id != 1:
        left = int(POOL_PART * available.device) - need.total
        tokens = min(tokens, roomy(config).thinker.kv_tokens + left // need.kv_token // block * block)
    tokens = max(tokens, config.thinker.kv_tokens)
    return msgspec.structs.replace(config, thinker=msgspec.structs.replace(config.thinker, kv_tokens=tokens))


def roomy(config: DeployConfig) -> DeployConfig:
    """``config`` with a pool that bounds no forward, for the plan that :func:`sized` and :func:`filled` take."""
    tokens = max(config.thinker.kv_tokens, config.thinker.max_num_batched_tokens)
    return msgspec.structs.replace(config, thinker=msgspec.structs.replace(config.thinker, kv_tokens=tokens))


def readable(size: int) -> str:
    """``size`` bytes in a binary unit."""
    power = min((size.bit_length() - 1) // 10, 4) if size else 0
    return f"{size / 1024**power:.2f} {'KMGT'[power - 1]}iB" if power else f"{size} B"
