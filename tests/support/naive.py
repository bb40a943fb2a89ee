"""The model run in the plainest way: one sequence at a time, with KV in growing tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel_triton.model.attention import QuerySpan, SequenceKV
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.flow import denoise, initial_noise
from bagel_triton.model.mot import PackedBatch, rotary_tables
from bagel_triton.protocol.messages import Branch, FlowSettings

KeysValues = tuple[Tensor, Tensor]


@dataclass
class NaiveContext:
    """Keys and values by layer, [tokens, kv_heads, head_dim] each, and the position that comes next."""

    layers: dict[int, KeysValues] = field(default_factory=dict)
    next_position: int = 0


class NaiveKV(SequenceKV):
    """One forward's view of the KV; ``rows`` are each sequence's rows of the batch, in its order."""

    def __init__(self, spans: Sequence[QuerySpan], rows: Sequence[Tensor], contexts: Sequence[NaiveContext]) -> None:
        self.spans, self._rows, self._contexts = spans, rows, contexts
        self.new: dict[int, KeysValues] = {}

    def write_rows(self, layer: int, key: Tensor, value: Tensor, rows: slice) -> None:
        kept = self.new.setdefault(layer, (torch.empty_like(key), torch.empty_like(value)))
        for target, new in zip(kept, (key, value), strict=True):
            target[rows] = new[rows]  # the next layer's come to the same place

    def rounds(self, spans: Sequence[QuerySpan]) -> list[Sequence[QuerySpan]]:
        return [spans]

    def read(self, layer: int, sequence: int) -> KeysValues:
        rows, past = self._rows[sequence], self._contexts[sequence].layers.get(layer)
        key, value = (part[rows] for part in self.new[layer])
        return (key, value) if past is None else (torch.cat((past[0], key)), torch.cat((past[1], value)))


class NaiveBagel:
    """``bagel`` with one context per branch; ``markers`` are the ids around an image."""

    def __init__(self, bagel: Bagel, markers: tuple[int, int]) -> None:
        self._bagel, self._markers = bagel, markers

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int]) -> NaiveContext:
        """The context of one text segment; empty without tokens."""
        if not token_ids:
            return NaiveContext()
        tokens = torch.arange(len(token_ids))
        kv = NaiveKV([QuerySpan(0, len(tokens), 0, True)], [tokens], [NaiveContext()])
        self._forward(self._bagel.embed_text(torch.tensor(token_ids)), 0, tokens, kv)
        return NaiveContext(kv.new, len(token_ids))

    @torch.inference_mode()
    def latents(self, settings: FlowSettings, contexts: dict[Branch, NaiveContext]) -> Tensor:
        """The finished flow, [tokens, channels]: every step and every branch a forward of its own."""
        stride = self._bagel.config.latent.stride
        rows, columns = settings.height // stride, settings.width // stride
        tokens = rows * columns
        positions = self._bagel.latent_pos_embed(rows, columns)
        markers = self._bagel.embed_text(torch.tensor(self._markers))

        def velocity(x: Tensor, t: Tensor, branch: Branch) -> Tensor:
            time = self._bagel.time_embedder(t.reshape(1))
            embeddings = torch.cat((self._bagel.embed_latents(x, time, positions), markers))
            context, all_rows = contexts[branch], torch.arange(tokens + 2)
            at = torch.full((tokens + 2,), context.next_position)
            kv = NaiveKV([QuerySpan(0, tokens + 2, 0, causal=False)], [all_rows], [context])
            return self._bagel.velocity(self._forward(embeddings, tokens, at, kv)[:tokens])

        noise = initial_noise(settings.seed, tokens, self._bagel.config.latent.token_channels)
        return denoise(noise, velocity, settings)

    def _forward(self, embeddings: Tensor, gen_rows: int, positions: Tensor, kv: NaiveKV) -> Tensor:
        tables = rotary_tables(positions, self._bagel.config.language, self._bagel.dtype)
        return self._bagel.language_model.model(embeddings, PackedBatch(gen_rows, *tables), kv)  # type: ignore[no-any-return]
