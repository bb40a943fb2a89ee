"""The transformer on a CPU: the plain modules' weights, run tile by tile by a thread pool.

Everything but the attention is computed for each row on its own. So a thread takes a tile of
rows from one layer's attention to the next layer's: output projection, feed-forward, norm,
queries, keys and values. What lies between two matrix products stays in the core's cache, and
the scratch buffers are as large as a tile. All layers share them: to allocate memory anew in
each layer takes longer than the norms do, in page faults. A tile of oneDNN's is one product, or
a few at a batch's end, whose result is new memory; the heap keeps that (``heap_limits`` in
``engine/build.py``).

Hidden states are those of :meth:`Transformer.forward` to the rounding of float32, and those of a
row do not depend on the tile it is in, on other rows or on the number of threads.

A transformer of some of the heads gives sums to its ranks: twice a layer the tiles' products are reduced together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from bagel_triton.model.attention import QuerySpan, SequenceKV
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.cpu.attention import attend_many
from bagel_triton.model.cpu.row_stable import (
    ONEDNN_ROWS,
    add_linear,
    add_projection,
    compiles_all,
    few_rows_kernels,
    linear,
    project,
    rms_norm,
    rotate,
    silu_product,
    takes_onednn,
)
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool
from bagel_triton.model.lora import GATE_UP, QKV, AdaptedRows, LayerUpdates, LowRank, within
from bagel_triton.model.mot import MLP, Expert, Layer, PackedBatch, Reduce, RMSNorm, Transformer

MAX_TILE_ROWS = 576  # the inner rows of a feed-forward are a few MB then
MIN_TILE_ROWS = 64  # fewer are not worth a thread
MIN_HEAD_ROWS = 32  # query rows below which a head is not worth a thread, however many keys there are
MIN_HEAD_SCORES = 128 * 128  # scores of a head below which it is not worth a thread


@dataclass(frozen=True)
class RowTile:
    """Rows of one expert that a thread takes through all operations.

    The rows of texts being decoded are in tiles of their own: there are usually ``few``.
    ``adapted`` are those with a LoRA adapter, counted from the tile's first.
    """

    gen: bool
    rows: slice
    few: bool = False
    adapted: tuple[AdaptedRows, ...] = ()

    def expert(self, layer: Layer) -> Expert:
        """The rows' expert in ``layer``."""
        return layer.gen if self.gen else layer.und

    def updates(self, index: int) -> LayerUpdates:
        """The updates of the rows' adapters in the layer number ``index``."""
        return LayerUpdates(index, self.gen, self.adapted, _add_update)


def _add_update(x: Tensor, update: LowRank, out: Tensor) -> None:
    add_linear(linear(x, update.down), update.up, out)


def tiles_of(batch: PackedBatch, threads: int, dtype: torch.dtype) -> list[RowTile]:
    """Tiles that hold every row of a batch once, in the order in which they are to be started.

    Rows of the understanding expert whose hidden states are wanted, while others' are not, are
    the last tokens of texts; these take the kernels for few rows, where ``dtype`` has them.
    """

    onednn = takes_onednn(dtype)

    def cut(gen: bool, start: int, stop: int, few: bool = False) -> Iterator[RowTile]:
        if start == stop:
            return
        size = tile_rows(stop - start, threads, onednn)
        rounds = (stop - start) // (size * threads) if onednn else 0
        last = start + rounds * size * threads  # the threads share what is left evenly, too
        edges = [*range(start, last, size)]
        if last < stop:
            edges += range(last, stop, tile_rows(stop - last, threads, onednn))
        for rows in map(slice, edges, [*edges[1:], stop]):
            yield RowTile(gen, rows, few, within(batch.adapted, rows))

    first = batch.gen_rows
    wanted = batch.wanted or slice(first, first)
    start, stop = max(wanted.start, first), max(wanted.stop, first)
    return [
        *cut(False, first, start),
        *cut(False, start, stop, few=start < stop and few_rows_kernels(dtype) is not None),
        *cut(False, stop, batch.tokens),
        *cut(True, 0, first),
    ]


def tile_rows(rows: int, threads: int, onednn: bool) -> int:
    """Rows of a tile: few enough for the cache and, if there are enough, as many tiles for each thread.

    With ``onednn`` a tile is one of the library's pieces or, where there are fewer rows, of a few.
    """
    if onednn:
        most, middle, least = ONEDNN_ROWS
        size = -(-rows // min(threads, max(rows // MIN_TILE_ROWS, 1)))
        piece = middle if size > 2 * middle else least
        return min(-(-size // piece) * piece, most)
    if threads == 1:
        return MAX_TILE_ROWS
    # The thread that took the other expert's few rows first gets the last tile, which is shorter by their cost.
    rows += MIN_TILE_ROWS
    rounds = -(-rows // (MAX_TILE_ROWS * threads))
    return -(-rows // min(rounds * threads, max(rows // MIN_TILE_ROWS, 1)))


class CpuExecutor:
    """Runs ``transformer`` with the threads of ``pool``; ``reduce`` sums a tensor over ranks, in place."""

    def __init__(self, transformer: Transformer, pool: ThreadPool, reduce: Reduce | None = None) -> None:
        self._transformer, self._pool, self._reduce = transformer, pool, reduce
        few_rows_kernels(transformer.norm.weight.dtype)  # compiled now, not while a request waits

    def __call__(self, embeddings: Tensor, batch: PackedBatch, kv: SequenceKV) -> Tensor:
        """Hidden states before the final norm, as of :meth:`Transformer.forward`; ``embeddings`` stay unchanged."""
        pool, config = self._pool, self._transformer.config
        enough_rows = batch.tokens >= pool.size * MIN_TILE_ROWS
        if enough_rows or not pool.prefers_intraop_threads(config.hidden_size * config.intermediate_size):
            return _Run(self._transformer, batch, kv, pool, embeddings, self._reduce).result()
        run = _Run(self._transformer, batch, kv, SINGLE_THREAD, embeddings, self._reduce)
        return pool.run_with_intraop_threads(run.result)


class ScratchBuffers:
    """Memory that the layers of one forward use one after the other."""

    def __init__(self, config: LanguageConfig, x: Tensor, tiles: list[RowTile], threads: int) -> None:
        """``tiles`` are those whose feed-forward needs some."""
        heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.qkv = tuple(x.new_empty(len(x), count, config.head_dim) for count in heads)  # of all rows
        self.attended = torch.empty_like(self.qkv[0])
        rows = max((tile.rows.stop - tile.rows.start for tile in tiles), default=0)
        threads = threads if tiles else 0
        # One pair of a feed-forward's inner rows for each thread, which takes a pair and puts it back.
        self.inner = deque(tuple(x.new_empty(rows, config.intermediate_size) for _ in range(2)) for _ in range(threads))


class _Run:
    """One forward: all layers over one batch."""

    def __init__(
        self,
        transformer: Transformer,
        batch: PackedBatch,
        kv: SequenceKV,
        pool: ThreadPool,
        embeddings: Tensor,
        reduce: Reduce | None,
    ) -> None:
        self._layers: list[Layer] = list(transformer.layers)  # type: ignore[arg-type]
        self._offload = transformer.offload
        self._batch, self._kv, self._pool, self._embeddings = batch, kv, pool, embeddings
        self._x = torch.empty_like(embeddings)  # the residual, which every layer updates in place
        self._tiles = tiles_of(batch, pool.size, embeddings.dtype)
        self._kernels: Any = few_rows_kernels(embeddings.dtype)
        self._compiles_all = compiles_all(embeddings.dtype)
        others = [tile for tile in self._tiles if not self._is_compiled(tile)]
        self._scratch = ScratchBuffers(transformer.config, self._x, others, pool.size)
        self._reduce = reduce
        self._sum = self._x if reduce is None else torch.empty_like(self._x)  # takes a tile's products

    def result(self) -> Tensor:
        """Hidden states of the rows that are wanted; the others are undefined."""
        self._fetch(0)
        self._pool.parallel_for(self._begin, self._tiles)
        last = len(self._layers) - 1
        for index in range(len(self._layers)):
            self._attend(index, [span for span in self._kv.spans if index < last or self._batch.wants(span)])
            tiles = [tile for tile in self._tiles if index < last or self._batch.wants(tile.rows)]
            self._fetch(index + 1)
            if self._reduce is None or not tiles:
                self._pool.parallel_for(partial(self._pass_on, index), tiles)
                continue
            for add in (self._add_attended, self._add_mlp):
                self._over_ranks(partial(add, index), tiles, self._reduce)
            if index < last:
                self._pool.parallel_for(partial(self._project, index + 1), tiles)
        return self._x

    def _over_ranks(self, add: Callable[[RowTile], None], tiles: list[RowTile], reduce: Reduce) -> None:
        """Add to the residual what ``add`` finds on all ranks."""
        rows = slice(min(tile.rows.start for tile in tiles), max(tile.rows.stop for tile in tiles))
        own = self._sum[rows]
        own.zero_()
        self._pool.parallel_for(add, tiles)
        reduce(own)
        self._x[rows] += own

    def _fetch(self, index: int) -> None:
        """Have a layer's weights here where they are offloaded, and the layer's before it."""
        if self._offload is not None and index < len(self._layers):
            self._offload.fetch(index)

    def _begin(self, tile: RowTile) -> None:
        self._x[tile.rows] = self._embeddings[tile.rows]
        self._project(0, tile)

    def _pass_on(self, index: int, tile: RowTile) -> None:
        """Take a tile out of a layer, and into the next one while it is in the cache."""
        self._add_attended(index, tile)
        self._add_mlp(index, tile)
        if index + 1 < len(self._layers):
            self._project(index + 1, tile)

    def _project(self, index: int, tile: RowTile) -> None:
        """Queries, keys and values of a tile, as of :meth:`Expert.project`, into the scratch buffers and ``kv``."""
        expert, rows = tile.expert(self._layers[index]), tile.rows
        normed = self._norm(tile, expert.input_layernorm)
        places = [part[rows] for part in self._scratch.qkv]
        if self._is_compiled(tile):
            self._project_compiled(expert, normed, tile, places, tile.updates(index))
        else:
            self._project_by_torch(expert, normed, rows, places, tile.updates(index))
        _, key, value = self._scratch.qkv
        self._kv.write_rows(index, key, value, rows)

    def _is_compiled(self, tile: RowTile) -> bool:
        """Whether a tile's norms, rotations and activations are compiled kernels, and its products new memory."""
        return tile.few or self._compiles_all

    def _project_by_torch(
        self, expert: Expert, normed: Tensor, rows: slice, places: list[Tensor], updates: LayerUpdates
    ) -> None:
        # Row slices of the packed weight. One product of all three would need their results copied apart.
        ends = [*accumulate((place[0].numel() for place in places), initial=0)]
        query_rows, key_rows, value_rows = (slice(*edges) for edges in pairwise(ends))
        project(normed, expert.qkv_proj, value_rows, places[2].flatten(1))
        updates("v_proj", normed, places[2].flatten(1))
        parts, norms = (query_rows, key_rows), (expert.q_norm, expert.k_norm)
        for name, place, part, norm in zip(QKV, places, parts, norms, strict=False):
            product = project(normed, expert.qkv_proj, part)
            updates(name, normed, product)
            heads = product.view_as(place)
            rotate(rms_norm(heads, norm, heads), self._batch.cos[rows], self._batch.sin[rows], place)

    def _project_compiled(
        self, expert: Expert, normed: Tensor, tile: RowTile, places: list[Tensor], updates: LayerUpdates
    ) -> None:
        """The same by the kernels, which read from the product of all three."""
        products = project(normed, expert.qkv_proj, few=tile.few)
        ends = [*accumulate((place[0].numel() for place in places), initial=0)]
        for name, edges in zip(QKV, pairwise(ends), strict=True):
            updates(name, normed, products[:, slice(*edges)])
        tables = self._batch.cos[tile.rows], self._batch.sin[tile.rows]
        for place, start, norm in zip(places, ends, (expert.q_norm, expert.k_norm), strict=False):
            self._kernels.norm_and_rotate(products, start, norm.weight, norm.eps, *tables, place)
        places[2].copy_(products[:, ends[2] :].view_as(places[2]))

    def _norm(self, tile: RowTile, norm: RMSNorm) -> Tensor:
        """The norm of a tile's residual."""
        x = self._x[tile.rows]
        return self._kernels.rms_norm(x, norm.weight, norm.eps) if self._is_compiled(tile) else rms_norm(x, norm)

    def _add_attended(self, index: int, tile: RowTile) -> None:
        """Add the projection of what a tile's heads found, the first half of :meth:`Expert.finish`."""
        expert, out, updates = tile.expert(self._layers[index]), self._sum[tile.rows], tile.updates(index)
        attended = self._scratch.attended[tile.rows].flatten(1)
        add_projection(attended, expert.o_proj, out, tile.few)
        updates("o_proj", attended, out)

    def _add_mlp(self, index: int, tile: RowTile) -> None:
        """Add the feed-forward of a tile, the second half."""
        expert, out, updates = tile.expert(self._layers[index]), self._sum[tile.rows], tile.updates(index)
        normed = self._norm(tile, expert.post_attention_layernorm)
        if self._is_compiled(tile):
            products = project(normed, expert.mlp.gate_up_proj, few=tile.few)
            for name, part in zip(GATE_UP, products.chunk(2, dim=1), strict=True):
                updates(name, normed, part)
            active = self._kernels.silu_product(products)
            del products
            add_projection(active, expert.mlp.down_proj, out, tile.few)
            updates("down_proj", active, out)
            return
        inner = self._scratch.inner.pop()
        _add_mlp(expert.mlp, normed, out, inner, updates)
        self._scratch.inner.append(inner)

    def _attend(self, index: int, spans: list[QuerySpan]) -> None:
        """Attention of ``spans``, a head a thread where that is worth it, into the scratch buffer."""
        query, out = self._scratch.qkv[0], self._scratch.attended
        for group in self._kv.rounds(spans):
            read = {sequence: self._kv.read(index, sequence) for sequence in {span.sequence for span in group}}

            def attend_part(
                part: tuple[QuerySpan, slice, slice], read: dict[int, tuple[Tensor, Tensor]] = read
            ) -> None:
                span, heads, kv_heads = part
                key, value = (each[:, kv_heads] for each in read[span.sequence])
                kernels = few_rows_kernels(query.dtype) if span.stop - span.start == 1 else None
                if kernels is not None:
                    kernels.attend_row(query[span.rows], key, value, out[span.rows])
                    return
                attend_many(query[span.rows, heads], key, value, span.causal, out[span.rows, heads])

            parts = [part for span in group for part in self._heads(span, *read[span.sequence][0].shape[:2])]
            self._pool.parallel_for(attend_part, parts)

    def _heads(self, span: QuerySpan, length: int, kv_heads: int) -> Iterator[tuple[QuerySpan, slice, slice]]:
        """A span with the query heads and key heads that one thread takes: all, those of a key head, or one each."""
        heads, rows = self._scratch.attended.shape[1], span.stop - span.start
        if self._pool.size == 1 or rows < MIN_HEAD_ROWS or rows * length < MIN_HEAD_SCORES:
            yield span, slice(0, heads), slice(0, kv_heads)
            return
        # Heads with the same keys share the copies that are made of these.
        share = heads // kv_heads
        if kv_heads % self._pool.size:
            share = 1
        for head in range(0, heads, share):
            kv_head = head * kv_heads // heads
            yield span, slice(head, head + share), slice(kv_head, kv_head + 1)


def _add_mlp(mlp: MLP, x: Tensor, residual: Tensor, inner: tuple[Tensor, ...], updates: LayerUpdates) -> None:
    """Add the feed-forward of x [rows, hidden] to ``residual``; ``inner`` is twice [rows or more, intermediate]."""
    gate, up = (whole[: len(x)] for whole in inner)
    size = gate.shape[1]
    for start, out in ((0, gate), (size, up)):
        project(x, mlp.gate_up_proj, slice(start, start + size), out)
    updates("gate_proj", x, gate)
    updates("up_proj", x, up)
    active = silu_product(gate, up)
    add_projection(active, mlp.down_proj, residual)
    updates("down_proj", active, residual)
