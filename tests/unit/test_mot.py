"""The plain transformer: its formulas, and the same hidden states from the CPU executor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_triton.model.attention import attend
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.cpu.executor import CpuExecutor
from bagel_triton.model.cpu.row_stable import rms_norm
from bagel_triton.model.cpu.row_stable import rotate as rotate_into
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD
from bagel_triton.model.mot import RMSNorm, rotary_tables, rotate
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.batches import make_batch, sequence
from tests.support.naive import NaiveContext


@pytest.fixture(scope="module", params=["checkpoint_dir", "other_checkpoint"])
def bagel(request: pytest.FixtureRequest) -> Bagel:
    directory: Path = request.getfixturevalue(request.param)
    return Checkpoint(directory).load_bagel(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("gen", "und"), [((120, 31), (2, 2)), ((0,), (19,)), ((9,), (0,)), ((1, 1), (3, 40))])
@torch.inference_mode()
def test_the_executor_computes_what_the_plain_forward_does(
    bagel: Bagel, gen: tuple[int, ...], und: tuple[int, ...]
) -> None:
    sequences = [sequence(bagel, g, u, seed) for seed, (g, u) in enumerate(zip(gen, und, strict=True))]
    transformer = bagel.language_model.model
    executor = CpuExecutor(transformer, SINGLE_THREAD)
    contexts = [(NaiveContext(), NaiveContext()) for _ in sequences]
    for _ in range(2):  # the second forward has a past
        found: list[Tensor] = []
        for way, run in enumerate((transformer, executor)):
            embeddings, batch, kv = make_batch(bagel, sequences, [pair[way] for pair in contexts])
            found.append(run(embeddings, batch, kv))
            for number, pair in enumerate(contexts):
                pair[way].layers = {layer: kv.read(layer, number) for layer in range(len(transformer.layers))}
        plain, ours = found
        assert (ours - plain).abs().max() < 2e-6 * plain.abs().max()


@pytest.mark.parametrize("plain", [True, False])
def test_the_embeddings_given_stay_as_they_are(bagel: Bagel, plain: bool) -> None:
    embeddings, batch, kv = make_batch(bagel, [sequence(bagel, 5, 4, 0)])
    before, transformer = embeddings.clone(), bagel.language_model.model
    with torch.inference_mode():
        (transformer if plain else CpuExecutor(transformer, SINGLE_THREAD))(embeddings, batch, kv)
    assert torch.equal(embeddings, before)


class _StaticKV:
    """Keys and values of one sequence in buffers that never move, as a CUDA graph needs them."""

    def __init__(self, config: LanguageConfig, past: int, new: int) -> None:
        self._store = torch.zeros(config.num_layers, 2, past + new, config.num_kv_heads, config.head_dim)
        self._slots = torch.arange(past, past + new)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        for target, rows in zip(self._store[layer], (key, value), strict=True):
            target.index_copy_(0, self._slots, rows)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        return attend(query, *self._store[layer], causal=False)


def test_a_forward_is_one_graph(checkpoint_dir: Path) -> None:
    """Nothing in it depends on a tensor's contents, so it can be compiled and captured whole."""
    bagel = Checkpoint(checkpoint_dir).load_bagel(torch.device("cpu"), torch.float32)
    embeddings, batch, _ = make_batch(bagel, [sequence(bagel, 7, 4, 0)])
    transformer, config = bagel.language_model.model, bagel.config.language
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    with torch.inference_mode():
        expected, found = (run(embeddings, batch, _StaticKV(config, 5, 11)) for run in (transformer, compiled))
    assert torch.equal(found, expected)


def test_the_norm_is_the_formula() -> None:
    norm = RMSNorm(96, 1e-6).requires_grad_(False)
    x = torch.randn(5, 3, 96, generator=torch.Generator().manual_seed(0))
    norm.weight.copy_(torch.randn(96, generator=torch.Generator().manual_seed(1)))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    half = RMSNorm(96, 1e-6).requires_grad_(False).bfloat16()
    half.weight.copy_(norm.weight)
    for run in (lambda norm, x: norm(x), lambda norm, x: rms_norm(x, norm)):
        torch.testing.assert_close(run(norm, x).double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(run(norm, torch.zeros(2, 96)), torch.zeros(2, 96))
        assert run(half, x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(run(half, x.bfloat16()).double(), exact, rtol=0.03, atol=0.03)


def test_a_rotation_turns_each_pair_by_its_angle(bagel: Bagel) -> None:
    config = bagel.config.language
    x = torch.randn(4, 2, config.head_dim, generator=torch.Generator().manual_seed(0))
    positions, out = torch.tensor([0, 1, 5, 40]), torch.empty(4, 2, config.head_dim)
    tables = rotary_tables(positions, config, torch.float32)
    rotate_into(x, *tables, out)
    half = config.head_dim // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions[:, None, None] * config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    for found in (rotate(x, *tables), out):
        torch.testing.assert_close(found.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-4, atol=1e-4)
