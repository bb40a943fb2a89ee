"""A sequence's hidden states are the same to the last bit whatever it is packed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_triton.model import attention
from bagel_triton.model import batch as pack
from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.batch import GEN, UND, PackedBatch
from bagel_triton.model.cpu import thread_pool
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD, ThreadPool
from bagel_triton.model.mot import RMSNorm, rotary_tables, rotate
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.exact import assert_same
from tests.support.naive import NaiveContext, NaiveKV


@dataclass(frozen=True)
class Block:
    """``gen`` and ``und`` tokens' embeddings, [tokens, hidden], all at one position."""

    gen: Tensor
    und: Tensor
    position: int


@pytest.fixture(scope="module", params=["checkpoint_dir", "other_checkpoint"])
def bagel(request: pytest.FixtureRequest) -> Bagel:
    directory: Path = request.getfixturevalue(request.param)
    return Checkpoint(directory).load_bagel(torch.device("cpu"), torch.float32)


def _sequence(bagel: Bagel, tokens: int, seed: int) -> Block:
    generator = torch.Generator().manual_seed(seed)
    hidden = bagel.config.language.hidden_size
    return Block(
        torch.randn(tokens, hidden, generator=generator), torch.randn(2, hidden, generator=generator), 10 * seed
    )


@torch.inference_mode()
def _hidden(
    bagel: Bagel, sequences: Sequence[Block], threads: ThreadPool = SINGLE_THREAD, all_rows: bool = True
) -> list[Tensor]:
    """Hidden states of each sequence's generation tokens after one packed forward."""
    gen_rows = sum(len(sequence.gen) for sequence in sequences)
    spans, rows, start = [], [], 0
    for number, sequence in enumerate(sequences):
        tokens, markers = len(sequence.gen), gen_rows + 2 * number
        spans += [QuerySpan(start, start + tokens, number, False), QuerySpan(markers, markers + 2, number, False)]
        rows.append(torch.cat((torch.arange(start, start + tokens), torch.arange(markers, markers + 2))))
        start += tokens
    embeddings = torch.cat([sequence.gen for sequence in sequences] + [sequence.und for sequence in sequences])
    positions = [sequence.position for sequence in sequences]
    counts = [len(sequence.gen) for sequence in sequences] + [2] * len(sequences)
    at = torch.tensor(positions * 2).repeat_interleave(torch.tensor(counts))
    kv = NaiveKV(rows, [NaiveContext() for _ in sequences])
    wanted = None if all_rows else slice(0, gen_rows)
    packed = PackedBatch(gen_rows, *rotary_tables(at, bagel.config.language, torch.float32), spans, kv, threads, wanted)
    hidden = bagel.language_model.model(embeddings, packed)
    return list(hidden[:gen_rows].split(counts[: len(sequences)]))


@pytest.mark.parametrize(
    "sizes",
    [(16, 16), (9, 25, 1), (25, 48, 15, 7), (121, 100, 81, 49, 25, 9), (255, 170, 3)],
    ids=lambda sizes: "+".join(map(str, sizes)),
)
def test_a_sequence_does_not_depend_on_its_pack(bagel: Bagel, sizes: tuple[int, ...]) -> None:
    sequences = [_sequence(bagel, tokens, seed) for seed, tokens in enumerate(sizes)]
    together = _hidden(bagel, sequences)
    backwards = _hidden(bagel, sequences[::-1])[::-1]
    for number, sequence in enumerate(sequences):
        (alone,) = _hidden(bagel, [sequence])
        assert_same(together[number], alone, number)
        assert_same(backwards[number], alone, number)


@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("worth", [1, 64, 10**6])
@pytest.mark.parametrize("wide", [True, False], ids=["intraop", "one-thread"])
def test_a_thread_pool_changes_nothing(
    bagel: Bagel, monkeypatch: pytest.MonkeyPatch, size: int, worth: int, wide: bool
) -> None:
    sequences = [_sequence(bagel, tokens, seed) for seed, tokens in enumerate((255, 170, 3))]
    alone = _hidden(bagel, sequences)
    monkeypatch.setattr(pack, "WORTH_SHARING", worth)
    monkeypatch.setattr(attention, "WORTH_SHARING", worth)
    monkeypatch.setattr(thread_pool, "MIN_INTRAOP_WEIGHTS", 0 if wide else 10**9)
    many = ThreadPool(size)
    shared = _hidden(bagel, sequences, many)
    many.close()
    for one, other in zip(shared, alone, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("size", [2, 8, 16, 64])
@pytest.mark.parametrize("rows", [64, 256, 512, 612, 1000, 3072, 20000])
def test_threads_share_rows_about_evenly(size: int, rows: int) -> None:
    longest = pack.block_rows(rows, size)
    assert longest <= pack.BLOCK_ROWS
    even = max(rows / size, pack.WORTH_SHARING)  # fewer rows than these are not worth a thread
    rounds = -(-rows // (longest * size))
    assert rounds * longest <= 2 * even + pack.WORTH_SHARING / 2


def test_rows_that_nobody_wants_change_nothing(bagel: Bagel) -> None:
    sequences = [_sequence(bagel, tokens, seed) for seed, tokens in enumerate((25, 48, 9))]
    for one, other in zip(_hidden(bagel, sequences, all_rows=False), _hidden(bagel, sequences), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("block_rows", [1, 7, 64])
def test_the_size_of_a_block_changes_nothing(bagel: Bagel, monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    sequences = [_sequence(bagel, tokens, seed) for seed, tokens in enumerate((25, 48, 9))]
    usual = _hidden(bagel, sequences)
    monkeypatch.setattr(pack, "BLOCK_ROWS", block_rows)
    for cut, whole in zip(_hidden(bagel, sequences), usual, strict=True):
        assert_same(cut, whole)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("gen_rows", [0, 1, 7, 20])
def test_every_row_is_in_one_block_of_its_expert(monkeypatch: pytest.MonkeyPatch, gen_rows: int, size: int) -> None:
    monkeypatch.setattr(pack, "BLOCK_ROWS", 7)
    monkeypatch.setattr(pack, "WORTH_SHARING", 2)
    tables = torch.empty(20, 1, 4)
    experts = [""] * 20
    seen = [0] * 20
    shared = ThreadPool(size)
    shared.close()
    for expert, rows in PackedBatch(gen_rows, tables, tables, [], NaiveKV([], []), shared).blocks:
        assert rows.stop - rows.start <= 7
        for row in range(rows.start, rows.stop):
            seen[row] += 1
            experts[row] = expert
    assert seen == [1] * 20
    assert experts == [GEN] * gen_rows + [UND] * (20 - gen_rows)


def test_the_embeddings_given_stay_as_they_are(bagel: Bagel) -> None:
    config = bagel.config.language
    embeddings = torch.ones(9, config.hidden_size)
    tables = rotary_tables(torch.arange(9), config, torch.float32)
    kv = NaiveKV([torch.arange(9)], [NaiveContext()])
    with torch.inference_mode():
        bagel.language_model.model(embeddings, PackedBatch(0, *tables, [QuerySpan(0, 9, 0, causal=True)], kv))
    assert torch.equal(embeddings, torch.ones(9, config.hidden_size))


def test_the_norm_is_the_formula() -> None:
    norm = RMSNorm(96, 1e-6).requires_grad_(False)
    x = torch.randn(5, 3, 96, generator=torch.Generator().manual_seed(0))
    norm.weight.copy_(torch.randn(96, generator=torch.Generator().manual_seed(1)))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm(torch.zeros(2, 96)), torch.zeros(2, 96))
    half = RMSNorm(96, 1e-6).requires_grad_(False).bfloat16()
    half.weight.copy_(norm.weight)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).double(), exact, rtol=0.03, atol=0.03)


def test_a_rotation_turns_each_pair_by_its_angle(bagel: Bagel) -> None:
    config = bagel.config.language
    x = torch.randn(4, 2, config.head_dim, generator=torch.Generator().manual_seed(0))
    positions, out = torch.tensor([0, 1, 5, 40]), torch.empty(4, 2, config.head_dim)
    rotate(x, *rotary_tables(positions, config, torch.float32), out)
    half = config.head_dim // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions[:, None, None] * config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(out.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-4, atol=1e-4)
