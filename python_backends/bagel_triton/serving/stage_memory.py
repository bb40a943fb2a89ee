"""What each stage of a server takes, part by part: weights, keys and values, activations, contexts of CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.deploy.topology import DECODER, DIT, THINKER
from bagel_triton.engine.dit.workspace import BRANCHES, context_tokens, latent_tokens, workspace_tokens
from bagel_triton.engine.thinker.engine import kv_geometry
from bagel_triton.kv.store import token_bytes
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.cpu import strip_decoder as strips
from bagel_triton.model.device import Placement
from bagel_triton.parallel.sizes import Sizes, kv_heads_of
from bagel_triton.protocol.events import Stage
from bagel_triton.serving.activations import (
    DECODER_CODE,
    decode_bytes,
    encode_bytes,
    forward_bytes,
    generated_bytes,
)
from bagel_triton.weights.adapters import USUAL_RANK, adapter_bytes, largest_bytes
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.files import TensorFiles
from bagel_triton.weights.folder import AUTOENCODER_FILE

CONTEXT_BYTES = 768 << 20  # of a process on a GPU: its context, cuBLAS's workspaces, kernels, CUDA graphs
NCCL_BYTES = 512 << 20  # of one that is a rank beside that: the buffers of its communicators


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


class StageParts:
    """What the stages of one server take, part by part, in bytes."""

    def __init__(
        self, checkpoint: Checkpoint, config: DeployConfig, placement: Placement, height: int, width: int
    ) -> None:
        self._checkpoint, self._config, self._placement = checkpoint, config, placement
        self._model, self._height, self._width = checkpoint.config, height, width
        self.one_process = config.topology.one_process
        self.on_gpu = placement.torch_device.type == "cuda"
        self.draws = config.load != "understanding"
        second = config.thinker if self.one_process else config.dit
        self._quantization = config.thinker.quantization, second.quantization
        self._offload_gb = config.thinker.cpu_offload_gb, second.cpu_offload_gb
        self._forms = [checkpoint.form(form) for form in self._quantization]
        self._ranks = [Sizes.of(config, stage) for stage in (THINKER, DIT)]
        self._threads = torch.get_num_threads()
        with torch.device("meta"):
            self._autoencoder = Autoencoder(TensorFiles([checkpoint.directory / AUTOENCODER_FILE]).shapes())
        self._autoencoder_weights = module_bytes(checkpoint.autoencoder())
        self._weigh()
        self._size_pool()

    def _weigh(self) -> None:
        config, checkpoint, dtype = self._config, self._checkpoint, self._placement.torch_dtype
        stages = [*zip(self._quantization, self._offload_gb, strict=True)]
        moved = [checkpoint.offloaded_bytes(dtype, *stage) for stage in stages]
        self._resident = [
            checkpoint.bagel_bytes(dtype, form) - (host if self.on_gpu else 0)
            for form, (host, _) in zip(self._quantization, moved, strict=True)
        ]
        whole = [size + slots for size, (_, slots) in zip(self._resident, moved, strict=True)]
        if self.one_process or not self.draws:
            self._at_work = moved[:1]
        else:
            self._at_work = moved if config.stage_id is None else [moved[config.stage_id]]
        self.offloaded = sum(host for host, _ in self._at_work) if self.on_gpu else 0
        self._transformer = whole
        self._rank_weights = rank_weights(config, whole[0], whole[1], self._model.language.num_layers)
        if self.on_gpu:  # which is the first rank's alone
            self._rank_weights = 0, 0
            self._transformer = [
                first_rank_weights(checkpoint.bagel(dtype, form), size) if size.cut else weights
                for size, form, weights in zip(self._ranks, self._quantization, whole, strict=True)
            ]
        self._adapters = sum(adapter_bytes(folder, dtype) for folder in config.lora_modules.values())
        largest = largest_bytes(self._model.language, config.max_lora_rank or USUAL_RANK, dtype)
        self._adapters += later_adapters(config) * largest
        # In one process each rank has an autoencoder of its own, as it shares no weights.
        decoders = config.vae_decode.patch_parallel_size
        others = max(decoders, config.dit.ranks) - 1 if self.one_process and decoders > 1 else 0
        self._decoder_ranks = others * self._autoencoder_weights

    def _size_pool(self) -> None:
        config, language = self._config, self._model.language
        self.token = kv_token_bytes(language, self._placement.dtype_name)
        block = config.thinker.block_tokens
        self.pool = -(-config.thinker.kv_tokens // block) * block * self.token
        self._segment = config.mooncake_store.segment_of(self.pool) if config.connector == "mooncake_store" else 0
        # torch rounds pinned memory up to a power of two.
        self.lent = 1 << (self.pool - 1).bit_length() if config.connector == "mooncake" else self._segment

    def _rank_pools(self) -> int:
        """The heads of the pool that other ranks prefill; on a GPU they are elsewhere."""
        if self.on_gpu:
            return 0
        thinker, dit = self._ranks
        # In one process the thinker's ranks may be the DiT's.
        meets = dit if self.one_process and thinker.tensor == dit.tensor > 1 else thinker
        prefilling = meets.tensor * meets.ulysses
        heads = [kv_heads_of(self._model.language, rank, prefilling) for rank in range(1, prefilling)]
        count: int = sum(own.stop - own.start for own in heads)
        return self.pool * count // self._model.language.num_kv_heads

    def thinker(self) -> StageMemory:
        """With the autoencoder, whose encoder it has."""
        limits, model, encoder = self._config.thinker, self._model, self._autoencoder.encoder
        image = min(context_tokens(model, self._height, self._width)[1], limits.kv_tokens)
        packed = min(limits.max_num_batched_tokens, limits.kv_tokens)
        activations = forward_bytes(model.language, packed, self._placement, self._threads, self._forms[0], image)
        if self.draws:
            width, height = model.vae_resize.size(self._width, self._height)
            activations = max(activations, encode_bytes(encoder, height, width)) + self._half(encoder)
        return StageMemory(
            "thinker",
            weights=self._transformer[0] + self._autoencoder_weights + self._rank_weights[0] + self._adapters,
            kv=self.pool + self._rank_pools() + (0 if self.on_gpu else self._segment),
            activations=activations,
        )

    def dit(self) -> StageMemory:
        """With copies of the contexts of all images that it denoises together."""
        limits, model = self._config.dit, self._model
        latents = latent_tokens(model, self._height, self._width)
        tokens = limits.max_num_seqs * BRANCHES * latents
        activations = forward_bytes(model.language, tokens, self._placement, self._threads, self._forms[1], latents)
        generated = 0 if self.on_gpu else generated_bytes(model.language, self._placement.torch_dtype, latents)
        side = model.latent.max_side  # a GPU's workspace is made once, for the largest
        sides = (side, side) if self.on_gpu else (self._height, self._width)
        copies = min(limits.ranks, 2) if self.on_gpu else limits.cfg_ranks  # on a GPU its part and a claim
        return StageMemory(
            "dit",
            weights=self._transformer[1] + self._rank_weights[1] + self._adapters,
            kv=workspace_tokens(model, limits.max_num_seqs, *sides) * self.token * copies,
            activations=activations + generated,
        )

    def vae_decode(self) -> StageMemory:
        """With the images that are decoded together."""
        config, decoder = self._config, self._autoencoder.decoder
        tiled, decoders = config.vae_decode.use_tiling is not False, config.vae_decode.patch_parallel_size
        # Images above 512x512 are decoded one at a time.
        alone = not self.on_gpu or self._height * self._width > strips.WORTH_IT
        decoded = 1 if alone else config.decoder.max_batch_size
        decoding = decode_bytes(decoder, self._height, self._width, tiled, self.on_gpu, decoders)
        return StageMemory(
            "vae_decode",
            weights=self._autoencoder_weights + self._decoder_ranks,
            activations=decoded * decoding + (self._half(decoder) if self.on_gpu else DECODER_CODE),
        )

    def _half(self, module: nn.Module) -> int:
        """A copy of ``module`` in bfloat16, which a GPU has."""
        return module_bytes(module) // 2 if self.on_gpu else 0

    @property
    def _stages_here(self) -> tuple[int, ...]:
        stage_id = self._config.stage_id if self.draws else 0
        return (0, 1) if stage_id is None else (stage_id,)

    @property
    def _apart(self) -> list[int]:
        """Stages here whose weights are cut for ranks on GPUs, so that no other stage can have them."""
        return [number for number in self._stages_here if self.on_gpu and self._ranks[number].cut]

    @property
    def whole(self) -> tuple[str | None, ...]:
        """The forms of the whole transformers that are loaded here, each once."""
        loaded = tuple(self._quantization[number] for number in self._stages_here if number not in self._apart)
        alike = len({form and form.storage for form in map(self._checkpoint.form, loaded)}) == 1
        return loaded[:1] if alike else loaded

    def weights_of_all(self, stages: tuple[StageMemory, ...]) -> int:
        """Weights of ``stages`` that share what they can."""
        sizes: dict[str | None, int] = dict(zip(self._quantization, self._resident, strict=True))
        weights = sum(sizes[form] for form in self.whole) + self._autoencoder_weights
        weights += sum(slots for _, slots in self._at_work)
        together = self.one_process and len(self._apart) == 2  # of one group
        weights += sum(self._transformer[number] for number in self._apart[: 1 if together else 2])
        weights += sum(self._rank_weights[number] for number in self._stages_here) + self._decoder_ranks
        with_adapters = 1 if self.one_process else len([stage for stage in stages if stage.stage != "vae_decode"])
        return weights + with_adapters * self._adapters

    def contexts(self, stages: tuple[StageMemory, ...]) -> int:
        """What CUDA has in the processes of ``stages`` and in Triton's, and NCCL in ranks."""
        if not self.on_gpu:
            return 0
        config = self._config
        processes = 1 if self.one_process or config.stage_id is not None else len(stages)
        groups = [name for name in (THINKER, DIT, DECODER) if Sizes.of(config, name).ranks > 1]
        meeting = min(len(groups), 1) if self.one_process else len({*groups} & {*config.models})
        return (1 + processes) * CONTEXT_BYTES + meeting * NCCL_BYTES


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


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights, on any device."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def kv_token_bytes(config: LanguageConfig, dtype: str) -> int:
    """Bytes of one token's keys and values."""
    return token_bytes(kv_geometry(config, 1, dtype))
