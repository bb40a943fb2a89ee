"""Prefill and decode: one packed forward over chunks of many contexts."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import TypeGuard

import torch
from torch import Tensor

from bagel_triton.engine.thinker.branch_state import Chunk, ImageChunk, TextChunk
from bagel_triton.kv.block_pool import KVCachePool, KVSequence
from bagel_triton.kv.store import PagedKeys, PagedStep, PoolStep, slots_of
from bagel_triton.model.attention import QuerySpan, attention_kernel
from bagel_triton.model.autoencoder import Autoencoder, encode, pack_latents, sample
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import VISION_TOKENS
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.cuda.attention import KeySpan, call_of, grouped, numbers_of
from bagel_triton.model.cuda.graphs import DecodeGraphs, DecodeInputs, StaticInputs
from bagel_triton.model.cuda.upload import Upload
from bagel_triton.model.device import Forward, forward_on, on_gpu, whole_images_on
from bagel_triton.model.image import normalised
from bagel_triton.model.lora import LoraAdapter, adapted_rows
from bagel_triton.model.mot import PackedBatch, rotary_tables
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

    embeddings: list[Tensor | None] = field(default_factory=list)  # [rows, hidden] each; None is the next text
    slots: list[Tensor] = field(default_factory=list)  # [rows] each
    positions: list[int] = field(default_factory=list)

    def add(self, embeddings: Tensor | None, slots: Tensor, positions: Sequence[int]) -> tuple[int, int]:
        """Append rows; their (start, stop)."""
        start = len(self.positions)
        self.embeddings.append(embeddings)
        self.slots.append(slots)
        self.positions.extend(positions)
        return start, len(self.positions)


class Prefiller:
    """Appends chunks to their contexts.

    ``vision_tokens`` are the ids of ``<|vision_start|>`` and ``<|vision_end|>``; ``pool`` shares
    the forwards, and is the caller's. With ``graphs``, a GPU decodes by CUDA graphs. ``forward`` takes the place of
    the device's own.
    """

    def __init__(
        self,
        model: Bagel,
        autoencoder: Autoencoder | None,
        kv_pool: KVCachePool,
        encodings: EncodingCache,
        vision_tokens: tuple[int, int],
        pool: ThreadPool,
        graphs: bool = True,
        forward: Forward | None = None,
    ) -> None:
        self._model, self._autoencoder, self._kv_pool, self._encodings = model, autoencoder, kv_pool, encodings
        self._upload = Upload(model.device)
        captures = on_gpu(model.device) and attention_kernel(model.device, model.dtype).is_flash
        block_tokens = kv_pool.geometry.block_tokens
        # Neither copies of offloaded layers nor other ranks are in a graph.
        captures = captures and model.language_model.model.offload is None and forward is None
        self._by_sequence = forward is not None or not on_gpu(model.device)
        self._graphs = DecodeGraphs(model.device, block_tokens, self._decode_step) if captures and graphs else None
        self._pool, self._forward = pool, forward or forward_on(model.device, model.language_model.model, pool)
        with torch.inference_mode():
            self._encoder = None if autoencoder is None else whole_images_on(model.device, autoencoder.encoder)
            self._vision_embeddings = model.embed_text(torch.tensor(vision_tokens, device=model.device))  # [2, hidden]
            # t = 0: no noise left. Without an autoencoder no image is encoded.
            self._clean = None if autoencoder is None else model.time_embedder(torch.zeros(1, device=model.device))

    @torch.inference_mode()
    def append(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """Run ``chunks`` in one forward, which writes their KV to the cache.

        Returns:
            Logits of the scored chunks' last tokens, [scored, vocabulary], and the number of the largest of each;
            both until the next call.

        Raises:
            KVCacheFull: nothing was computed, but some contexts were extended.
        """
        texts_alone = [chunk for chunk in chunks if isinstance(chunk, TextChunk) and chunk.scored and chunk.tokens == 1]
        if self._graphs is not None and len(texts_alone) == len(chunks) and (found := self._decoded(texts_alone)):
            return found
        logits = self._forwarded(chunks)
        return logits, logits.argmax(dim=-1)

    def _decoded(self, chunks: Sequence[TextChunk]) -> tuple[Tensor, Tensor] | None:
        """A token more for each of many texts, by a CUDA graph; None where there is none for them."""
        assert self._graphs is not None, "the caller has looked"
        contexts = [chunk.context for chunk in chunks]
        first, *others = {chunk.adapter for chunk in chunks}
        # A graph for every order in which texts of several adapters come would be captured more often than it runs.
        if others or not self._graphs.takes(len(contexts)):
            return None
        slots = torch.cat([context.extend(1) for context in contexts]).tolist()
        positions = [context.next_position for context in contexts]
        for context in contexts:
            context.next_position += 1
        blocks = [context.blocks for context in contexts]
        starts = [at * self._kv_pool.geometry.block_tokens for at in accumulate(map(len, blocks), initial=0)][:-1]
        token_ids = [chunk.token_ids[0] for chunk in chunks]
        lengths = [context.tokens for context in contexts]
        return self._graphs.run(DecodeInputs(token_ids, positions, slots, lengths, starts, [*chain(*blocks)]), first)

    def _decode_step(self, inputs: StaticInputs, adapter: LoraAdapter | None) -> tuple[Tensor, Tensor]:
        """The step that a graph captures: a row for each text, all with ``adapter``."""
        texts, model, pool = len(inputs.token_ids), self._model, self._kv_pool
        group = tuple(KeySpan(row, row + 1, 0, 0, causal=True) for row in range(texts))
        call = call_of(group, inputs.numbers, inputs.max_length)
        kv = PoolStep(pool.store, inputs.slots, inputs.blocks, [call], pool.geometry.block_tokens)
        cos, sin = rotary_tables(inputs.positions, model.config.language, model.dtype)
        hidden = self._forward(
            model.embed_text(inputs.token_ids),
            PackedBatch(0, cos, sin, adapted=adapted_rows([(0, texts, adapter)])),
            kv,
        )
        logits = model.logits(hidden)
        return logits, logits.argmax(dim=-1)

    def _forwarded(self, chunks: Sequence[Chunk]) -> Tensor:
        gen, und = _Rows(), _Rows()
        order = sorted(range(len(chunks)), key=lambda index: _place(chunks[index]))
        chunks = [chunks[index] for index in order]
        texts = [chunk.token_ids for chunk in chunks if isinstance(chunk, TextChunk)]
        gen_rows = sum(chunk.tokens - VISION_TOKENS for chunk in chunks if _is_vae(chunk))
        spans: list[QuerySpan] = []
        adapters: list[LoraAdapter | None] = []  # of each span
        scored: dict[int, int] = {}  # rows by the chunk's number among those given
        for sequence, chunk in enumerate(chunks):
            context, position = chunk.context, chunk.context.next_position
            slots = context.extend(chunk.tokens)
            if isinstance(chunk, TextChunk):
                context.next_position += chunk.tokens
                embeddings = None
                positions: Sequence[int] = range(position, context.next_position)
            else:
                context.next_position += 1  # one position for the whole image
                embeddings, body = self._vision_embeddings, [position] * chunk.tokens
                if _is_vae(chunk):
                    start, stop = gen.add(self._vae_tokens(chunk), slots[1:-1], body[VISION_TOKENS:])
                    spans.append(QuerySpan(start, stop, sequence, causal=False))
                    adapters.append(chunk.adapter)
                    slots, positions = slots[[0, -1]], body[:VISION_TOKENS]
                else:
                    start_marker, end_marker = self._vision_embeddings.split(1)
                    embeddings, positions = torch.cat((start_marker, self._vit_tokens(chunk), end_marker)), body
            start, stop = und.add(embeddings, slots, positions)
            spans.append(QuerySpan(gen_rows + start, gen_rows + stop, sequence, causal=isinstance(chunk, TextChunk)))
            adapters.append(chunk.adapter)
            if isinstance(chunk, TextChunk) and chunk.scored:
                scored[order[sequence]] = gen_rows + stop - 1
        token_ids, positions_at, kv = self._placed(
            [*chain.from_iterable(texts)],
            gen.positions + und.positions,
            torch.cat(gen.slots + und.slots),
            spans,
            [chunk.context for chunk in chunks],
        )
        cos, sin = rotary_tables(positions_at, self._model.config.language, self._model.dtype)
        packed = self._packed(gen.embeddings + und.embeddings, token_ids, [len(text) for text in texts])
        rows = [scored[index] for index in sorted(scored)]
        wanted = slice(min(rows, default=0), max(rows, default=-1) + 1)
        adapted = adapted_rows([(span.start, span.stop, has) for span, has in zip(spans, adapters, strict=True)])
        hidden = self._forward(packed, PackedBatch(gen_rows, cos, sin, wanted, adapted), kv)
        if not rows:
            return packed.new_empty(0, self._model.config.language.vocab_size)
        last = hidden[wanted if rows == [*range(wanted.start, wanted.stop)] else rows]
        if self._pool.prefers_intraop_threads(self._model.language_model.lm_head.weight.numel()):
            return self._pool.run_with_intraop_threads(lambda: self._model.logits(last))
        return self._model.logits(last)

    def _placed(
        self,
        token_ids: list[int],
        positions: list[int],
        slots: Tensor,
        spans: Sequence[QuerySpan],
        contexts: Sequence[KVSequence],
    ) -> tuple[Tensor, Tensor, PagedStep | PoolStep]:
        """A step's token ids and positions, int64 on the device, and its keys and values."""
        pool, device = self._kv_pool, self._model.device
        size = pool.geometry.block_tokens
        if self._by_sequence:
            reads = [slots_of(context.blocks, context.tokens, size) for context in contexts]
            (ids, at), _ = self._upload((token_ids, positions), ())
            return ids, at, PagedStep(spans, pool.store, slots, reads, device)
        keys = PagedKeys.of(spans, [(context.blocks, context.tokens) for context in contexts], size)
        groups = grouped(keys.spans)
        longs, ints = self._upload((token_ids, positions, slots, keys.blocks), [numbers_of(group) for group in groups])
        blocks = longs[3] if keys.blocks else None
        calls = [call_of(group, numbers) for group, numbers in zip(groups, ints, strict=True)]
        return longs[0], longs[1], PoolStep(pool.store, longs[2], blocks, calls, size)

    def _packed(self, parts: Sequence[Tensor | None], token_ids: Tensor, sizes: Sequence[int]) -> Tensor:
        """[rows, hidden] of all parts, a tensor of the step's own; texts are looked up at once."""
        looked_up = self._model.embed_text(token_ids)
        if all(part is None for part in parts):
            return looked_up
        texts = iter(looked_up.split([*sizes]))
        return torch.cat([next(texts) if part is None else part for part in parts])

    def _vit_tokens(self, chunk: ImageChunk) -> Tensor:
        """[patches, hidden] of an image for understanding."""
        segment = chunk.segment
        return self._encode("vit", segment, lambda: self._model.embed_image(_pixels(segment)))

    def _vae_tokens(self, chunk: ImageChunk) -> Tensor:
        """[latent tokens, hidden] of a clean conditioning image."""
        segment, latent = chunk.segment, self._model.config.latent
        assert chunk.noise is not None, "an image for generation comes with its posterior draw"
        autoencoder, clean = self._autoencoder, self._clean
        assert autoencoder is not None, "without one no image is drawn"
        assert clean is not None, "likewise"
        moments = self._encode("vae", segment, lambda: encode(autoencoder, _pixels(segment), self._encoder))
        z = sample(moments, chunk.noise)
        rows, columns = segment.height // latent.stride, segment.width // latent.stride
        tokens = pack_latents(z[0], latent.patch_size).to(self._model.device)
        return self._model.embed_latents(tokens, clean, self._model.latent_pos_embed(rows, columns))

    def _encode(self, encoder: str, segment: VitSegment | VaeSegment, make: Callable[[], Tensor]) -> Tensor:
        return self._encodings.get(_key(encoder, segment), lambda: self._pool.run_with_intraop_threads(make))


def _place(chunk: Chunk) -> tuple[bool, bool, str]:
    """The place of a chunk in a batch.

    Text comes behind images, so that a GPU takes all that is causal in one call, and all that is scored before the
    rest of it. Rows of one adapter are adjacent.
    """
    name = "" if chunk.adapter is None else chunk.adapter.name
    return isinstance(chunk, TextChunk), isinstance(chunk, TextChunk) and not chunk.scored, name


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
