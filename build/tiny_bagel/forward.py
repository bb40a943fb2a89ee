"""The training forward: many contexts at once, through the layers that inference runs.

Rows are packed by expert as inference packs them, so every linear layer and norm is the product's
own. Only attention differs: it runs over padded groups of contexts of about equal length, under a
mask that says which segment sees which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bagel_triton.model.autoencoder import pack_latents
from bagel_triton.model.bagel import Bagel, grid_index
from bagel_triton.model.image import patchified
from bagel_triton.model.mot import PackedBatch, rotary_tables
from bagel_triton.model.tokenizer import Tokenizer
from build.tiny_bagel.data import Piece, Sample, vit_pixels
from build.tiny_bagel.world import SIDE, render

LATENT_PATCH = 2
VIT_PATCH = 14
TABLE_SIDE = 32
"""Of the flow's position table: images of up to 512 pixels."""
TRAINED_SIDE = SIDE // (8 * LATENT_PATCH) + 1
"""Positions that are trained: those of the world's images, and one more for all that lies beyond."""
PADDING = 10_000
GROUPS = 3


@dataclass(frozen=True)
class Group:
    """Contexts that attend together: their rows of the packed batch, and who sees whom."""

    rows: Tensor  # [contexts, length], a padding's row is 0
    valid: Tensor  # [contexts, length]
    mask: Tensor  # [contexts, 1, length, length]
    packed: Tensor  # [tokens], the rows of the tokens that are no padding


class GroupedKV:
    """A ``StepKV`` of whole contexts: nothing is kept from before, and gradients flow."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._key = self._value = torch.empty(0)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._key, self._value = key, value

    def attend(self, layer: int, query: Tensor) -> Tensor:
        shared = query.shape[1] // self._key.shape[1]
        parts = []
        for group in self._groups:
            q, k, v = (x[group.rows].transpose(1, 2) for x in (query, self._key, self._value))
            k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
            parts.append(attended.transpose(1, 2)[group.valid])  # [tokens, heads, head_dim]
        order = torch.cat([group.packed for group in self._groups])
        out = torch.empty_like(query)
        return out.index_copy(0, order, torch.cat(parts))


@dataclass(frozen=True)
class Batch:
    """A packed batch with its targets; rows are ``[latents | text | vit]``."""

    token_ids: Tensor  # [text rows]
    next_ids: Tensor  # [text rows], -1 where nothing is to be learned
    patches: Tensor  # [images, patches, 3 * patch * patch]
    latents: Tensor  # [latent rows, channels], noise added
    times: Tensor  # [latent rows]
    cells: Tensor  # [latent rows], the place in the position table
    velocities: Tensor  # [query rows, channels]
    queries: Tensor  # [query rows], their rows
    positions: Tensor  # [rows]
    groups: tuple[Group, ...]


def trained_cells(rows: int, columns: int) -> Tensor:
    """Where the table has the trained positions of a ``rows`` x ``columns`` grid, [rows * columns]."""
    down, across = (torch.arange(count).clamp(max=TRAINED_SIDE - 1) for count in (rows, columns))
    return (TABLE_SIDE * down[:, None] + across).flatten()


def _mask(segments: NDArray[np.int64], causal: NDArray[np.bool_], hidden: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Who sees whom in padded contexts: all [contexts, length] -> [contexts, length, length]."""
    length = segments.shape[1]
    mine, other = segments[:, :, None], segments[:, None, :]
    order = np.tril(np.ones((length, length), np.bool_))
    sees: NDArray[np.bool_] = ((other < mine) & ~hidden[:, None, :]) | ((other == mine) & (~causal[:, :, None] | order))
    return sees


class Collator:
    """Makes batches of samples; ``spread`` is the posterior's deviation, [channels]."""

    def __init__(self, tokenizer: Tokenizer, spread: NDArray[np.float32], shift: float, seed: int) -> None:
        self._tokenizer, self._spread, self._shift = tokenizer, torch.from_numpy(spread)[:, None, None], shift
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of ``samples``, in which every query has its own time and noise."""
        ids: list[int] = []
        next_ids: list[int] = []
        patches: list[Tensor] = []
        latents: list[Tensor] = []
        times: list[Tensor] = []
        cells: list[Tensor] = []
        velocities: list[Tensor] = []
        query_rows: list[range] = []
        contexts = []
        for sample in samples:
            tokens: list[tuple[int, int]] = []  # expert and row within it
            segments: list[int] = []
            positions: list[int] = []
            causal: list[bool] = []
            hidden: list[bool] = []
            position = 0
            for number, piece in enumerate(sample):
                start = len(tokens)
                if piece.kind == "text":
                    tokens += [(1, len(ids) + index) for index in range(len(piece.ids))]
                    ids += piece.ids
                    unknown = len(piece.ids) if piece.given is None else piece.given
                    next_ids += [-1] * (unknown - 1) + [*piece.ids[unknown:], -1]
                    positions += range(position, position + len(piece.ids))
                    position += len(piece.ids)
                else:
                    first = len(ids)
                    ids += [self._tokenizer.vision_start, self._tokenizer.vision_end]
                    next_ids += [-1, -1]
                    inner = self._vit(piece, patches) if piece.kind == "vit" else None
                    if inner is None:
                        assert piece.picture is not None
                        at = sum(len(part) for part in latents)
                        x, t, v = self._latent(piece)
                        latents.append(x)
                        times.append(t)
                        cells.append(trained_cells(*(side // LATENT_PATCH for side in piece.picture.latent.shape[1:])))
                        inner = [(0, at + index) for index in range(len(x))]
                        if v is not None:
                            velocities.append(v)
                            query_rows.append(range(at, at + len(x)))
                    tokens += [(1, first), *inner, (1, first + 1)]
                    positions += [position] * (len(inner) + 2)
                    position += piece.kind != "query"
                count = len(tokens) - start
                segments += [number] * count
                causal += [piece.kind == "text"] * count
                hidden += [piece.kind == "query"] * count
            contexts.append((tokens, segments, causal, hidden, positions))
        sizes = (sum(len(part) for part in latents), len(ids))
        bases = (0, sizes[0], sizes[0] + sizes[1])
        total = bases[2] + sum(len(part) for part in patches)
        all_positions = np.zeros(total, np.int64)
        groups = []
        contexts.sort(key=lambda context: len(context[0]))
        for part in np.array_split(np.arange(len(contexts)), min(GROUPS, len(contexts))):
            group, rows, flat = self._group([contexts[index] for index in part], bases)
            groups.append(group)
            all_positions[rows] = flat
        return Batch(
            torch.tensor(ids),
            torch.tensor(next_ids),
            torch.stack(patches) if patches else torch.zeros(0, 1, 3 * VIT_PATCH**2),
            torch.cat(latents) if latents else torch.zeros(0, 4 * len(self._spread)),
            torch.cat(times) if times else torch.zeros(0),
            torch.cat(cells) if cells else torch.zeros(0, dtype=torch.int64),
            torch.cat(velocities) if velocities else torch.zeros(0, 4 * len(self._spread)),
            torch.tensor([row for rows in query_rows for row in rows], dtype=torch.int64),
            torch.from_numpy(all_positions),
            tuple(groups),
        )

    def _vit(self, piece: Piece, patches: list[Tensor]) -> list[tuple[int, int]]:
        assert piece.picture is not None
        pixels = torch.from_numpy(vit_pixels(render(piece.picture.scene)).copy()).float() / 127.5 - 1.0
        first = sum(len(part) for part in patches)
        patches.append(patchified(pixels, VIT_PATCH))
        return [(2, first + index) for index in range(len(patches[-1]))]

    def _latent(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens [tokens, channels], their times [tokens] and, for a query, the velocities."""
        assert piece.picture is not None
        latent = torch.from_numpy(piece.picture.latent)
        if piece.kind == "vae":
            latent = latent + self._spread * torch.randn(latent.shape, generator=self.generator)
            clean = pack_latents(latent, LATENT_PATCH)
            return clean, torch.zeros(len(clean)), None
        clean = pack_latents(latent, LATENT_PATCH)
        noise = torch.randn(clean.shape, generator=self.generator)
        even = torch.rand(1, generator=self.generator)
        time = self._shift * even / (1 + (self._shift - 1) * even)
        return torch.lerp(clean, noise, time), time.expand(len(clean)), noise - clean

    def _group(
        self,
        contexts: Sequence[tuple[list[tuple[int, int]], list[int], list[bool], list[bool], list[int]]],
        bases: tuple[int, ...],
    ) -> tuple[Group, NDArray[np.int64], NDArray[np.int64]]:
        shape = len(contexts), max(len(context[0]) for context in contexts)
        rows, segments = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64)
        causal, hidden, valid = (np.zeros(shape, np.bool_) for _ in range(3))
        positions = np.zeros(shape, np.int64)
        base = np.array(bases)
        for index, (tokens, *columns) in enumerate(contexts):
            pairs = np.array(tokens)
            count = len(pairs)
            rows[index, :count] = base[pairs[:, 0]] + pairs[:, 1]
            for target, values in zip((segments, causal, hidden, positions), columns, strict=True):
                target[index, :count] = values
            valid[index, :count] = True
        mask = torch.from_numpy(_mask(segments, causal, hidden)).unsqueeze(1)
        packed = rows[valid]
        group = Group(torch.from_numpy(rows), torch.from_numpy(valid), mask, torch.from_numpy(packed))
        return group, packed, positions[valid]


def embed_images(model: Bagel, patches: Tensor) -> Tensor:
    """The rows of images of one size: [images, patches, values] -> [images * patches, hidden]."""
    tower = model.vit_model.vision_model
    side = int(patches.shape[1] ** 0.5)
    x = tower.embeddings(patches, grid_index(side, side, model.config.vit.patches_per_side))
    for layer in tower.encoder.layers:  # type: ignore[union-attr]
        normed = layer.layer_norm1(x)
        attention = layer.self_attn
        q, k, v = (
            projection(normed).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    features = model.connector(tower.post_layernorm(x)) + model.vit_pos_embed(side, side)
    return features.flatten(0, 1)  # type: ignore[no-any-return]


def forward(model: Bagel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Velocities of the queries' rows [query rows, channels] and scores of the learned text rows [n, vocabulary]."""
    latents = len(batch.latents)
    parts = []
    if latents:
        positions = model.latent_pos_embed.pos_embed[batch.cells]
        parts.append(model.embed_latents(batch.latents, model.time_embedder(batch.times), positions))
    parts.append(model.embed_text(batch.token_ids))
    if len(batch.patches):
        parts.append(embed_images(model, batch.patches))
    cos, sin = rotary_tables(batch.positions, model.config.language, model.dtype)
    packed = PackedBatch(latents, cos, sin)
    hidden = model.language_model.model(torch.cat(parts), packed, GroupedKV(batch.groups))
    learned = latents + torch.nonzero(batch.next_ids >= 0).flatten()
    return model.velocity(hidden[batch.queries]), model.logits(hidden[learned])


def losses(model: Bagel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean squared error of the velocities, and cross entropy of the next tokens."""
    velocity, logits = forward(model, batch)
    targets = batch.next_ids[batch.next_ids >= 0]
    flow = F.mse_loss(velocity.float(), batch.velocities) if len(velocity) else velocity.sum()
    text = F.cross_entropy(logits.float(), targets) if len(targets) else logits.sum()
    return flow, text
