"""The CPU executor: hidden states do not depend on batch, tiles or threads, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu import executor, thread_pool
from bagel_triton.model.cpu.executor import CpuExecutor, tiles_of
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool
from bagel_triton.model.cuda.executor import CudaExecutor
from bagel_triton.model.mot import PackedBatch, Transformer
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.batches import NewTokens, make_batch, sequence
from tests.support.exact import assert_same


@pytest.fixture(scope="module", params=["checkpoint_dir", "other_checkpoint"])
def bagel(request: pytest.FixtureRequest) -> Bagel:
    directory: Path = request.getfixturevalue(request.param)
    return Checkpoint(directory).load_bagel(torch.device("cpu"), torch.float32)


def _images(bagel: Bagel, sizes: Sequence[int]) -> list[NewTokens]:
    return [sequence(bagel, tokens, 2, seed) for seed, tokens in enumerate(sizes)]


@torch.inference_mode()
def _hidden(
    bagel: Bagel, images: Sequence[NewTokens], pool: ThreadPool = SINGLE_THREAD, all_rows: bool = True
) -> list[Tensor]:
    """Hidden states of each image's latents after one forward."""
    embeddings, batch, kv = make_batch(bagel, images, wanted_gen_only=not all_rows)
    hidden = CpuExecutor(bagel.language_model.model, pool)(embeddings, batch, kv)
    return list(hidden[: batch.gen_rows].split([len(image.gen) for image in images]))


@pytest.mark.parametrize(
    "sizes",
    [(16, 16), (9, 25, 1), (25, 48, 15, 7), (100, 49, 9), (255, 3)],
    ids=lambda sizes: "+".join(map(str, sizes)),
)
def test_a_sequence_does_not_depend_on_its_batch(bagel: Bagel, sizes: tuple[int, ...]) -> None:
    images = _images(bagel, sizes)
    together = _hidden(bagel, images)
    backwards = _hidden(bagel, images[::-1])[::-1]
    for number, image in enumerate(images):
        (alone,) = _hidden(bagel, [image])
        assert_same(together[number], alone, number)
        assert_same(backwards[number], alone, number)


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("least", [1, 64, 10**6])
@pytest.mark.parametrize("intraop", [True, False], ids=["intraop", "one-thread"])
def test_threads_change_nothing(
    bagel: Bagel, monkeypatch: pytest.MonkeyPatch, threads: int, least: int, intraop: bool
) -> None:
    images = _images(bagel, (255, 170, 3))
    alone = _hidden(bagel, images)
    monkeypatch.setattr(executor, "MIN_TILE_ROWS", least)
    monkeypatch.setattr(executor, "MIN_HEAD_SCORES", least)
    monkeypatch.setattr(thread_pool, "MIN_INTRAOP_WEIGHTS", 0 if intraop else 10**9)
    pool = ThreadPool(threads)
    shared = _hidden(bagel, images, pool)
    pool.close()
    for one, other in zip(shared, alone, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", [CpuExecutor, CudaExecutor])
@torch.inference_mode()
def test_what_ranks_sum_is_added_to_every_row_once(bagel: Bagel, kind: type[CpuExecutor] | type[CudaExecutor]) -> None:
    """A rank with half of each product, in place of two whose halves are summed."""
    layers = bagel.language_model.model
    whole = Transformer(layers.config)
    whole.load_state_dict(layers.state_dict())
    half = Transformer(layers.config)
    half.load_state_dict(layers.state_dict())
    for layer in half.layers:
        for expert in (layer.gen, layer.und):
            expert.o_proj.weight.mul_(0.5)
            expert.mlp.down_proj.weight.mul_(0.5)
    found = []
    for transformer, reduce in ((whole, None), (half, lambda x: x.mul_(2.0))):
        embeddings, batch, kv = make_batch(bagel, _images(bagel, (25, 70)), wanted_gen_only=True)
        pool = () if kind is CudaExecutor else (SINGLE_THREAD,)
        run = kind(transformer, *pool, reduce)  # type: ignore[call-arg, arg-type]
        found.append(run(embeddings.clone(), batch, kv)[: batch.gen_rows])
    assert float((found[0] - found[1]).abs().max()) < 1e-5 * float(found[0].abs().max())


def test_rows_that_are_not_wanted_change_nothing(bagel: Bagel) -> None:
    images = _images(bagel, (25, 48, 9))
    for one, other in zip(_hidden(bagel, images, all_rows=False), _hidden(bagel, images), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_size_of_a_tile_changes_nothing(bagel: Bagel, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    images = _images(bagel, (16, 25, 9))
    usual = _hidden(bagel, images)
    monkeypatch.setattr(executor, "tile_rows", lambda *limits: rows)
    for cut, whole in zip(_hidden(bagel, images), usual, strict=True):
        assert_same(cut, whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("gen_rows", [0, 1, 7, 20])
def test_every_row_is_in_one_tile_of_its_expert(monkeypatch: pytest.MonkeyPatch, gen_rows: int, threads: int) -> None:
    monkeypatch.setattr(executor, "tile_rows", lambda *limits: 7)
    tables = torch.empty(20, 1, 4)
    gen: dict[int, bool] = {}
    for tile in tiles_of(PackedBatch(gen_rows, tables, tables), threads, torch.float32):
        assert tile.rows.stop - tile.rows.start <= 7
        for row in range(tile.rows.start, tile.rows.stop):
            assert row not in gen
            gen[row] = tile.gen
    assert gen == {row: row < gen_rows for row in range(20)}


@pytest.mark.parametrize("threads", [2, 8, 16, 64])
@pytest.mark.parametrize("rows", [64, 256, 512, 612, 1000, 3072, 20000])
@pytest.mark.parametrize("onednn", [True, False])
def test_threads_share_rows_about_evenly(threads: int, rows: int, onednn: bool) -> None:
    longest = executor.tile_rows(rows, threads, onednn)
    assert longest <= executor.MAX_TILE_ROWS
    even = max(rows / threads, executor.MIN_TILE_ROWS)  # fewer rows than these are not worth a thread
    rounds = -(-rows // (longest * threads))
    assert rounds * longest <= 2 * even + executor.MIN_TILE_ROWS / 2
