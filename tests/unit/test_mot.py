"""A sequence's hidden states are the same to the last bit whatever it is packed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_triton.model.attention import Span
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.checkpoint import Checkpoint
from bagel_triton.model.mot import Pack, rotary_tables
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
def _hidden(bagel: Bagel, sequences: Sequence[Block]) -> list[Tensor]:
    """Hidden states of each sequence's generation tokens after one packed forward."""
    gen_rows = sum(len(sequence.gen) for sequence in sequences)
    spans, rows, start = [], [], 0
    for number, sequence in enumerate(sequences):
        tokens, markers = len(sequence.gen), gen_rows + 2 * number
        spans += [Span(start, start + tokens, number, False), Span(markers, markers + 2, number, False)]
        rows.append(torch.cat((torch.arange(start, start + tokens), torch.arange(markers, markers + 2))))
        start += tokens
    embeddings = torch.cat([sequence.gen for sequence in sequences] + [sequence.und for sequence in sequences])
    positions = [sequence.position for sequence in sequences]
    counts = [len(sequence.gen) for sequence in sequences] + [2] * len(sequences)
    at = torch.tensor(positions * 2).repeat_interleave(torch.tensor(counts))
    kv = NaiveKV(rows, [NaiveContext() for _ in sequences])
    pack = Pack(gen_rows, *rotary_tables(at, bagel.config.language, torch.float32), spans, kv)
    hidden = bagel.language_model.model(embeddings, pack)
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
        assert torch.equal(together[number], alone), number
        assert torch.equal(backwards[number], alone), number
