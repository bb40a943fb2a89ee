"""Prefill and decode: one packed forward over chunks of many contexts."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeGuard

import torch
from torch import Tensor

from bagel_triton.engine.thinker.branch_state import Chunk, ImageChunk, TextChunk
from bagel_triton.engine.token_count import VISION_TOKENS
from bagel_triton.kv.block_pool import KVCachePool
from bagel_triton.kv.store import PagedStep
from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.autoencoder import Autoencoder, encode, pack_latents, sample
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.batch import PackedBatch
from bagel_triton.model.cpu.executor import forward_on
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.image import normalised
from bagel_triton.model.mot import rotary_tables
from bagel_triton.protocol.messages import VaeSegment, VitSegment
from bagel_triton.telemetry.metrics import Metrics


class EncodingCache:
    """The encoders' outputs by key, at most ``capacity`` bytes, evicted least recently used.

    An editing session sends the same image with a new seed. Its posterior draw, and so its KV,
    is new, but the encoders' output is not.
    """

    def __init__(self, capacity: int, metrics: Metrics) -> None:
        self._capacity, self._bytes, self._metrics = capacity, 0, metrics
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes, encode: Callable[[], Tensor]) -> Tensor:
        """The tensor under ``key``, made by ``encode`` if it is not cached; read-only."""
        self._metrics.count("thinker_encoding_queries")
        if key in self._kept:
            self._metrics.count("thinker_encoding_hits")
            self._kept.move_to_end(key)
            return self._kept[key]
        made = encode()
        if made.nbytes <= self._capacity:
            self._kept[key] = made
            self._bytes += made.nbytes
            while self._bytes > self._capacity:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return made


@dataclass
class _Rows:
    """Rows of a batch that use one expert, gathered chunk by chunk."""

    embeddings: list[Tensor] = field(default_factory=list)  # [rows, hidden] each
    slots: list[Tensor] = field(default_factory=list)  # [rows] each
    positions: list[int] = field(default_factory=list)

    def add(self, embeddings: Tensor, slots: Tensor, positions: Sequence[int]) -> tuple[int, int]:
        """Append rows; their (start, stop)."""
        start = len(self.positions)
        self.embeddings.append(embeddings)
        self.slots.append(slots)
        self.positions.extend(positions)
        return start, len(self.positions)


class Prefiller:
    """Appends chunks to their contexts.

    ``vision_markers`` are the ids of ``<|vision_start|>`` and ``<|vision_end|>``; ``pool`` shares
    the forwards, and is the caller's.
    """

    def __init__(
        self,
        model: Bagel,
        autoencoder: Autoencoder,
        kv_pool: KVCachePool,
        encodings: EncodingCache,
        vision_markers: tuple[int, int],
        pool: ThreadPool,
    ) -> None:
        self._model, self._autoencoder, self._kv_pool, self._encodings = model, autoencoder, kv_pool, encodings
        self._pool, self._forward = pool, forward_on(model.device, model.language_model.model, pool)
        with torch.inference_mode():
            self._markers = model.embed_text(torch.tensor(vision_markers, device=model.device))  # [2, hidden]
            self._clean = model.time_embedder(torch.zeros(1, device=model.device))  # t = 0: no noise left

    @torch.inference_mode()
    def append(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run ``chunks`` in one forward, which writes their KV to the cache.

        Returns:
            Logits of the scored chunks' last tokens, [scored, vocabulary].

        Raises:
            KVCacheFull: nothing was computed, but some contexts were extended.
        """
        gen, und = _Rows(), _Rows()
        texts = self._embedded([chunk.token_ids for chunk in chunks if isinstance(chunk, TextChunk)])
        gen_rows = sum(chunk.tokens - VISION_TOKENS for chunk in chunks if _is_vae(chunk))
        spans: list[QuerySpan] = []
        scored: list[int] = []
        for sequence, chunk in enumerate(chunks):
            context, position = chunk.context, chunk.context.next_position
            slots = context.extend(chunk.tokens)
            if isinstance(chunk, TextChunk):
                context.next_position += chunk.tokens
                embeddings = next(texts)
                positions: Sequence[int] = range(position, context.next_position)
            else:
                context.next_position += 1  # one position for the whole image
                embeddings, body = self._markers, [position] * chunk.tokens
                if _is_vae(chunk):
                    start, stop = gen.add(self._vae_tokens(chunk), slots[1:-1], body[VISION_TOKENS:])
                    spans.append(QuerySpan(start, stop, sequence, causal=False))
                    slots, positions = slots[[0, -1]], body[:VISION_TOKENS]
                else:
                    start_marker, end_marker = self._markers.split(1)
                    embeddings, positions = torch.cat((start_marker, self._vit_tokens(chunk), end_marker)), body
            start, stop = und.add(embeddings, slots, positions)
            spans.append(QuerySpan(gen_rows + start, gen_rows + stop, sequence, causal=isinstance(chunk, TextChunk)))
            if isinstance(chunk, TextChunk) and chunk.scored:
                scored.append(gen_rows + stop - 1)
        positions_at = torch.tensor(gen.positions + und.positions, device=self._model.device)
        cos, sin = rotary_tables(positions_at, self._model.config.language, self._model.dtype)
        reads = [self._kv_pool.read_slots(chunk.context) for chunk in chunks]
        kv = PagedStep(spans, self._kv_pool.store, torch.cat(gen.slots + und.slots), reads, self._model.device)
        packed = torch.cat(gen.embeddings + und.embeddings)  # [gen rows | und rows, hidden]
        wanted = slice(min(scored, default=0), max(scored, default=-1) + 1)
        hidden = self._forward(packed, PackedBatch(gen_rows, cos, sin, wanted), kv)
        if not scored:
            return packed.new_empty(0, self._model.config.language.vocab_size)
        if self._pool.prefers_intraop_threads(self._model.language_model.lm_head.weight.numel()):
            return self._pool.run_with_intraop_threads(lambda: self._model.logits(hidden[scored]))
        return self._model.logits(hidden[scored])

    def _embedded(self, texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """[tokens, hidden] of each text, in one lookup: one a text would be as many trips to a GPU."""
        token_ids = torch.tensor([*chain.from_iterable(texts)], dtype=torch.long, device=self._model.device)
        return iter(self._model.embed_text(token_ids).split([len(text) for text in texts]))

    def _vit_tokens(self, chunk: ImageChunk) -> Tensor:
        """[patches, hidden] of an image for understanding."""
        segment = chunk.segment
        return self._encode("vit", segment, lambda: self._model.embed_image(_pixels(segment)))

    def _vae_tokens(self, chunk: ImageChunk) -> Tensor:
        """[latent tokens, hidden] of a clean conditioning image."""
        segment, latent = chunk.segment, self._model.config.latent
        assert chunk.noise is not None, "an image for generation comes with its posterior draw"
        moments = self._encode("vae", segment, lambda: encode(self._autoencoder, _pixels(segment)))
        z = sample(moments, chunk.noise)
        rows, columns = segment.height // latent.stride, segment.width // latent.stride
        tokens = pack_latents(z[0], latent.patch_size).to(self._model.device)
        return self._model.embed_latents(tokens, self._clean, self._model.latent_pos_embed(rows, columns))

    def _encode(self, encoder: str, segment: VitSegment | VaeSegment, make: Callable[[], Tensor]) -> Tensor:
        return self._encodings.get(_key(encoder, segment), lambda: self._pool.run_with_intraop_threads(make))


def _pixels(segment: VitSegment | VaeSegment) -> Tensor:
    return normalised(segment.pixels, segment.height, segment.width)


def _key(encoder: str, segment: VitSegment | VaeSegment) -> bytes:
    size = f"{encoder} {segment.height}x{segment.width} ".encode()
    return hashlib.blake2b(size + segment.pixels, digest_size=16).digest()


def _is_vae(chunk: Chunk) -> TypeGuard[ImageChunk]:
    return isinstance(chunk, ImageChunk) and isinstance(chunk.segment, VaeSegment)


def posterior_noise(segments: Sequence[VaeSegment], channels: int, downsample: int, seed: int) -> list[Tensor]:
    """One standard normal draw per conditioning image, in order, from one generator.

    Each is [1, channels, height / downsample, width / downsample] float32.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return [
        torch.randn(1, channels, segment.height // downsample, segment.width // downsample, generator=generator)
        for segment in segments
    ]
