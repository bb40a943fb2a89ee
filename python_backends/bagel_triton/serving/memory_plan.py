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
from torch import nn

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.deploy.topology import DECODER, DIT, THINKER
from bagel_triton.engine.dit.workspace import BRANCHES, context_tokens, latent_tokens, workspace_tokens
from bagel_triton.engine.thinker.engine import decoded_blocks, kv_geometry
from bagel_triton.kv.store import token_bytes
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.cpu import strip_decoder as strips
from bagel_triton.model.device import Placement
from bagel_triton.parallel.sizes import Sizes, kv_heads_of
from bagel_triton.protocol.events import Stage
from bagel_triton.protocol.request import TEXT
from bagel_triton.serving.activations import DECODER_CODE, decode_bytes, encode_bytes, forward_bytes, generated_bytes
from bagel_triton.weights.adapters import USUAL_RANK, adapter_bytes, largest_bytes
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.files import TensorFiles
from bagel_triton.weights.folder import AUTOENCODER_FILE

CONTEXT_BYTES = 768 << 20  # of a process on a GPU: its context, cuBLAS's workspaces, kernels, CUDA graphs
NCCL_BYTES = 512 << 20  # of one that is a rank beside that: the buffers of its communicators
USUAL_PROMPT = 64  # tokens, of the texts that the size of a pool is given in
POOL_PART = 0.9  # of a GPU's free memory that a plan may take with a pool larger than the least


class NotEnoughMemory(ValueError):
    """A configuration needs more memory than there is; the message says what to lower."""


@dataclass(frozen=True)
class StageMemory:
    """One stage's bytes; ``kv`` is the thinker's pool, or the DiT's copies of contexts."""

    stage: Stage
    weights: int = 0
    kv: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of the stage, as if it shared no weights."""
        return self.weights + self.kv + self.activations


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
    one_process = config.topology.one_process
    model, dtype = checkpoint.config, placement.torch_dtype
    quantization = config.thinker.quantization, config.thinker.quantization if one_process else config.dit.quantization
    forms = [checkpoint.form(form) for form in quantization]
    draws = config.load != "understanding"
    with torch.device("meta"):
        autoencoder = Autoencoder(TensorFiles([checkpoint.directory / AUTOENCODER_FILE]).shapes())
    autoencoder_weights = module_bytes(checkpoint.autoencoder())
    on_gpu = placement.torch_device.type == "cuda"
    gigabytes = config.thinker.cpu_offload_gb, (config.thinker if one_process else config.dit).cpu_offload_gb
    moved = [checkpoint.offloaded_bytes(dtype, *stage) for stage in zip(quantization, gigabytes, strict=True)]
    resident = [
        checkpoint.bagel_bytes(dtype, form) - (host if on_gpu else 0)
        for form, (host, _) in zip(quantization, moved, strict=True)
    ]
    thinker_weights, dit_weights = (size + slots for size, (_, slots) in zip(resident, moved, strict=True))
    at_work = moved[:1] if one_process or not draws else moved if config.stage_id is None else [moved[config.stage_id]]
    offloaded = sum(host for host, _ in at_work) if on_gpu else 0
    shares_weights = shares_weights and not offloaded  # each process copies from its own
    thinker_ranks, dit_ranks = rank_weights(config, thinker_weights, dit_weights, model.language.num_layers)
    ranks = [Sizes.of(config, stage) for stage in (THINKER, DIT)]
    if on_gpu:  # which is the first rank's alone
        thinker_ranks = dit_ranks = 0
        thinker_weights, dit_weights = (
            first_rank_weights(checkpoint.bagel(dtype, form), size) if size.cut else weights
            for size, form, weights in zip(ranks, quantization, (thinker_weights, dit_weights), strict=True)
        )
    adapters = sum(adapter_bytes(folder, dtype) for folder in config.lora_modules.values())
    adapters += later_adapters(config) * largest_bytes(model.language, config.max_lora_rank or USUAL_RANK, dtype)
    token = kv_token_bytes(model.language, placement.dtype_name)
    pool = -(-config.thinker.kv_tokens // config.thinker.block_tokens) * config.thinker.block_tokens * token
    segment = config.mooncake_store.segment_of(pool) if config.connector == "mooncake_store" else 0
    # torch rounds pinned memory up to a power of two.
    lent = 1 << (pool - 1).bit_length() if config.connector == "mooncake" else segment
    # The other ranks' heads of it; on a GPU they are elsewhere. In one process the thinker's ranks may be the DiT's.
    meets = ranks[1] if one_process and ranks[0].tensor == ranks[1].tensor > 1 else ranks[0]
    prefilling = meets.tensor * meets.ulysses
    rank_heads = [kv_heads_of(model.language, rank, prefilling) for rank in range(1, prefilling)]
    rank_pools = 0 if on_gpu else pool * sum(own.stop - own.start for own in rank_heads) // model.language.num_kv_heads
    images = config.dit.max_num_seqs
    latents = latent_tokens(model, height, width)
    side = model.latent.max_side  # a GPU's workspace is made once, for the largest
    workspace = workspace_tokens(model, images, *((side, side) if on_gpu else (height, width)))
    tiled = config.vae_decode.use_tiling is not False
    # Images above 512x512 are decoded one at a time.
    decoded = 1 if not on_gpu or height * width > strips.WORTH_IT else config.decoder.max_batch_size
    decoders = config.vae_decode.patch_parallel_size
    decoding = decode_bytes(autoencoder.decoder, height, width, tiled, on_gpu, decoders)
    # In one process each rank has an autoencoder of its own, as it shares no weights.
    decoder_ranks = (max(decoders, config.dit.ranks) - 1) * autoencoder_weights if one_process and decoders > 1 else 0
    halves = [module_bytes(part) // 2 if on_gpu else 0 for part in (autoencoder.encoder, autoencoder.decoder)]
    image = min(context_tokens(model, height, width)[1], config.thinker.kv_tokens)
    packed = min(config.thinker.max_num_batched_tokens, config.thinker.kv_tokens)
    condition_width, condition_height = model.vae_resize.size(width, height)
    stages: tuple[StageMemory, ...] = (
        StageMemory(
            "thinker",
            weights=thinker_weights + autoencoder_weights + thinker_ranks + adapters,
            kv=pool + rank_pools + (0 if on_gpu else segment),
            activations=max(
                forward_bytes(model.language, packed, placement, torch.get_num_threads(), forms[0], image),
                encode_bytes(autoencoder.encoder, condition_height, condition_width) if draws else 0,
            )
            + (halves[0] if draws else 0),
        ),
        StageMemory(
            "dit",
            weights=dit_weights + dit_ranks + adapters,
            kv=workspace
            * token
            * (min(config.dit.ranks, 2) if on_gpu else config.dit.cfg_ranks),  # its part and a claim
            activations=forward_bytes(
                model.language, images * BRANCHES * latents, placement, torch.get_num_threads(), forms[1], latents
            )
            + (0 if on_gpu else generated_bytes(dtype)),
        ),
        StageMemory(
            "vae_decode",
            weights=autoencoder_weights + decoder_ranks,
            activations=decoded * decoding + halves[1] + (0 if on_gpu else DECODER_CODE),
        ),
    )
    in_files = placement.torch_device.type == "cpu" and not one_process
    shared = pool if _pool_is_shared(config, placement) else 0
    if config.stage_id is not None or not draws:
        stages = tuple(stage for stage in stages if stage.stage in config.models)
    weights = sum(stage.weights for stage in stages)
    if one_process or shares_weights:
        stage_id = config.stage_id if draws else 0
        stages_here = (0, 1) if stage_id is None else (stage_id,)
        apart = [number for number in stages_here if on_gpu and ranks[number].cut]
        loaded = tuple(quantization[number] for number in stages_here if number not in apart)
        if len({form and form.storage for form in map(checkpoint.form, loaded)}) == 1:
            loaded = loaded[:1]
        sizes = dict(zip(quantization, resident, strict=True))
        weights = sum(sizes[form] for form in loaded) + autoencoder_weights + sum(slots for _, slots in at_work)
        together = one_process and len(apart) == 2  # of one group
        weights += sum((thinker_weights, dit_weights)[number] for number in apart[: 1 if together else 2])
        weights += (thinker_ranks if stage_id != 1 else 0) + (dit_ranks if stage_id != 0 else 0)
        weights += decoder_ranks
        weights += adapters if one_process else adapters * sum(stage.stage != "vae_decode" for stage in stages)
        if in_files:
            shared += checkpoint.stored_apart(dtype, loaded)
    processes = 1 if one_process or config.stage_id is not None else len(stages)
    groups = [name for name in (THINKER, DIT, DECODER) if Sizes.of(config, name).ranks > 1]
    meeting = min(len(groups), 1) if one_process else len({*groups} & {*config.models})
    contexts = (1 + processes) * CONTEXT_BYTES + meeting * NCCL_BYTES if on_gpu else 0
    return MemoryPlan(
        stages, token, weights, shared, contexts, offloaded, lent if on_gpu and config.stage_id != 1 else 0
    )


def first_rank_weights(model: Bagel, sizes: Sizes) -> int:
    """Bytes of ``model`` that rank 0 has where ``sizes`` cut it: its part of the layers, and what is in none."""
    layers = model.language_model.model.layers
    inside = module_bytes(layers)
    # Of sharded layers the one at work is whole, and the next one meanwhile.
    gathered = 2 * inside // len(layers) if sizes.shard > 1 else 0
    return module_bytes(model) - inside + inside // (sizes.tensor * sizes.shard) + gathered


def later_adapters(config: DeployConfig) -> int:
    """Adapters that there is memory kept for beside those of the start."""
    return max((config.max_loras or 1) - len(config.lora_modules), 0) if config.lora_dir else 0


def rank_weights(config: DeployConfig, thinker: int, dit: int, layers: int) -> tuple[int, int]:
    """Bytes that each stage's ranks have beside the copy of ``thinker`` or ``dit`` bytes that stages share."""
    if config.topology.one_process:  # each rank loads the whole before it keeps a part
        return 0, (config.dit.ranks - (config.dit.shards == 1)) * dit
    if config.dit.shards > 1:  # one copy for each group of ranks, and on each a layer at work and the next
        dit_ranks = config.dit.ranks // config.dit.shards * dit + config.dit.ranks * 2 * dit // layers
        return (thinker if config.thinker.tensor_parallel_size > 1 else 0, dit_ranks)
    # The parts of tensor-parallel ranks are one copy together.
    return (
        thinker if config.thinker.tensor_parallel_size > 1 else 0,
        config.dit.ranks // config.dit.tensor_parallel_size * dit if config.dit.tensor_parallel_size > 1 else 0,
    )


def _pool_is_shared(config: DeployConfig, placement: Placement) -> bool:
    """Whether the pool is in the host's shared memory; else it is the thinker's own, or on the GPU."""
    on_cpu = placement.torch_device.type == "cpu"
    return on_cpu and not config.topology.one_process and config.connector in ("auto", "shm")


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights, on any device."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def kv_token_bytes(config: LanguageConfig, dtype: str) -> int:
    """Bytes of one token's keys and values."""
    return token_bytes(kv_geometry(config, 1, dtype))


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
