"""The compiled kernels: the formulas of the model, and the same bits in any batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bagel_triton.model.attention import attend
from bagel_triton.model.cpu import attention, executor, row_stable
from bagel_triton.model.cpu.executor import CpuExecutor
from bagel_triton.model.cpu.row_stable import few_rows_kernels
from bagel_triton.model.cpu.thread_pool import SINGLE_THREAD
from bagel_triton.model.mot import RMSNorm, rotate
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.batches import make_batch, sequence

kernels = pytest.importorskip("bagel_triton.model.cpu.kernels", reason="the extra `cpu` is not installed")
COUNTS = [1, 2, 3, 8, 33]


def _norm(size: int) -> RMSNorm:
    norm = RMSNorm(size, 1e-6)
    norm.weight.data = torch.randn(size, generator=torch.Generator().manual_seed(1)) + 1
    return norm


@torch.inference_mode()
def test_the_norm_is_the_model_s_and_does_not_depend_on_the_batch() -> None:
    norm, x = _norm(100), torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    full = kernels.rms_norm(x, norm.weight, norm.eps)
    torch.testing.assert_close(full, norm(x), rtol=2e-6, atol=2e-6)
    for count in COUNTS:
        for start in (0, 3):
            part = x[start : start + count]
            assert torch.equal(kernels.rms_norm(part, norm.weight, norm.eps), full[start : start + count])


@torch.inference_mode()
def test_norm_and_rotation_are_the_model_s_and_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, heads, size, first = 40, 3, 20, 40
    norm = _norm(size)
    products = torch.randn(rows, first + heads * size + 7, generator=generator)
    angles = torch.randn(rows, 1, size, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    full = torch.empty(rows, heads, size)
    kernels.norm_and_rotate(products, first, norm.weight, norm.eps, cos, sin, full)
    plain = products[:, first : first + heads * size].reshape(rows, heads, size)
    torch.testing.assert_close(full, rotate(norm(plain), cos, sin), rtol=2e-6, atol=2e-6)
    for count in COUNTS:
        part = torch.empty(count, heads, size)
        at = slice(3, 3 + count)
        kernels.norm_and_rotate(products[at], first, norm.weight, norm.eps, cos[at], sin[at], part)
        assert torch.equal(part, full[at])


@torch.inference_mode()
def test_the_activation_is_the_model_s_and_does_not_depend_on_the_batch() -> None:
    products = torch.randn(40, 2 * 101, generator=torch.Generator().manual_seed(0)) * 4
    products[0, :8] = torch.tensor([0.0, -0.0, 87.0, -87.0, 1e30, -1e30, -3e38, 1e38])
    full = kernels.silu_product(products)
    gate, up = products.double().chunk(2, dim=1)
    torch.testing.assert_close(full.double(), F.silu(gate) * up, rtol=2e-6, atol=2e-6)
    for count in COUNTS:
        assert torch.equal(kernels.silu_product(products[3 : 3 + count]), full[3 : 3 + count])


@pytest.mark.parametrize("sizes", [(300, 25), (64, 1)])
@torch.inference_mode()
def test_images_by_onednn_have_the_hidden_states_of_the_model(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    bagel = Checkpoint(checkpoint_dir).load_bagel(torch.device("cpu"), torch.float32)
    images = [sequence(bagel, tokens, 2, seed) for seed, tokens in enumerate(sizes)]
    plain = bagel.language_model.model(*make_batch(bagel, images))
    for module in (attention, executor, row_stable):
        monkeypatch.setattr(module, "takes_onednn", lambda dtype: True)
    found = CpuExecutor(bagel.language_model.model, SINGLE_THREAD)(*make_batch(bagel, images))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_other_types_have_none() -> None:
    assert few_rows_kernels(torch.bfloat16) is None
    assert few_rows_kernels(torch.float32) is kernels


@torch.inference_mode()
def test_without_numba_texts_have_the_same_hidden_states(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bagel = Checkpoint(checkpoint_dir).load_bagel(torch.device("cpu"), torch.float32)
    texts = [sequence(bagel, 0, 1, seed) for seed in range(3)]

    def hidden() -> torch.Tensor:
        embeddings, batch, kv = make_batch(bagel, texts)
        batch = replace(batch, wanted=slice(0, batch.tokens))
        return CpuExecutor(bagel.language_model.model, SINGLE_THREAD)(embeddings, batch, kv)

    compiled = hidden()
    for module in (executor, row_stable):
        monkeypatch.setattr(module, "few_rows_kernels", lambda dtype: None)
    plain = hidden()
    assert not torch.equal(compiled, plain), "the kernels have other roundings: they did not run"
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_attention_of_one_token_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, size, length in ((4, 2, 16, 1), (6, 2, 20, 65), (28, 4, 128, 300), (3, 3, 8, 33)):
        query = torch.randn(1, heads, size, generator=generator)
        key, value = (torch.randn(length, kv_heads, size, generator=generator) for _ in range(2))
        out = torch.empty_like(query)
        kernels.attend_row(query, 3 * key, value, out)
        exact = attend(query.double(), 3 * key.double(), value.double(), causal=True)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_attention_of_many_rows_is_attention_and_a_row_does_not_depend_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "takes_onednn", lambda x: True)
    monkeypatch.setattr(attention, "MAX_PART_ROWS", 650)  # two heads of 300 rows; and 700 rows are two parts
    generator = torch.Generator().manual_seed(0)

    def attended(*operands: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(operands[0], torch.nan)
        attention.attend_many(*operands, causal=False, out=out)
        return out

    sizes = (64, 4, 2, 16, 1), (90, 6, 2, 20, 1025), (300, 7, 1, 128, 2500), (700, 2, 1, 16, 80)
    for rows, heads, kv_heads, size, length in sizes:
        query = torch.randn(rows, heads, size, generator=generator)
        # Scores far from 0, on either side: padding must not be the largest of them.
        key = 3 * torch.randn(length, kv_heads, size, generator=generator) - 5 * query[:1, :kv_heads]
        value = torch.randn(length, kv_heads, size, generator=generator)
        found = attended(query, key, value)
        exact = attend(query.double(), key.double(), value.double(), causal=False)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=2e-5)
        assert torch.equal(attended(query[-64:], key, value), found[-64:])
        group = heads // kv_heads
        assert torch.equal(attended(query[:, :group], key[:, :1], value[:, :1]), found[:, :group])


@pytest.mark.parametrize("threads", [1, 3, 64])
@torch.inference_mode()
def test_threads_change_no_bit(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 1024, generator=generator), torch.randn(1027, 1024, generator=generator)
    query, key = torch.randn(1, 28, 64, generator=generator), torch.randn(300, 4, 64, generator=generator)
    many, angles = torch.randn(700, 1024, generator=generator), torch.randn(700, 1, 64, generator=generator)
    before = torch.get_num_threads()

    def results() -> list[torch.Tensor]:
        out, attended, rotated = (torch.full(shape, torch.nan) for shape in ((3, 1027), query.shape, (700, 8, 64)))
        kernels.product(x, weight, weight[:, 0].contiguous(), out)
        kernels.attend_row(query, key, key, attended)
        kernels.norm_and_rotate(many, 512, many[0, :64], 1e-6, angles.cos(), angles.sin(), rotated)
        scores, largest, total, shrink = many.clone(), torch.zeros(700), torch.ones(700), torch.empty(700)
        kernels.softmax_block(scores, 1000, largest, total, shrink)
        rows = kernels.rms_norm(many, many[0], 1e-6), kernels.silu_product(many)
        return [out, attended, rotated, scores, largest, total, shrink, *rows]

    found = []
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_process_that_compiles_gives_the_bits_of_one_that_loads(tmp_path: Path) -> None:
    """The first process of a server compiles the kernels, and those of other stages and ranks load them."""
    code = """
import sys
import torch
from bagel_triton.model.cpu import kernels
torch.manual_seed(0)
found = []
for rows, size in (1, 96), (16, 96), (40, 100), (40, 160):
    x, weight = torch.randn(rows, size), torch.randn(size)
    scores, largest, total, shrink = 4 * x, torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows)
    kernels.softmax_block(scores, size - 3, largest, total, shrink)
    out, rotated = torch.empty(rows, 37), torch.empty(rows, 2, size // 2)
    kernels.product(x, torch.randn(37, size), None, out)
    tables = torch.randn(2, rows, 1, size // 2)
    kernels.norm_and_rotate(x, 0, weight[: size // 2], 1e-6, *tables, rotated)
    query, key = torch.randn(1, 4, 16), torch.randn(size, 2, 16)
    attended = torch.empty_like(query)
    kernels.attend_row(query, key, key, attended)
    found += [scores, total, out, rotated, attended, kernels.rms_norm(x, weight, 1e-6), kernels.silu_product(x)]
torch.save(found, sys.argv[1])
"""
    for name in ("compiled", "loaded"):
        env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], env=env, check=True)
    compiled, loaded = (torch.load(tmp_path / name) for name in ("compiled", "loaded"))
    assert all(torch.equal(one, other) for one, other in zip(compiled, loaded, strict=True))


def test_a_smaller_team_than_was_asked_for_does_all_the_work() -> None:
    """OpenMP may give fewer threads, by a limit or under load."""
    code = """
import torch
from bagel_triton.model.cpu import kernels
torch.set_num_threads(4)
x, weight, out = torch.ones(3, 1024), torch.ones(2048, 1024), torch.full((3, 2048), torch.nan)
kernels.product(x, weight, None, out)
assert bool((out == 1024).all()), int((out != 1024).sum())
query, key = torch.ones(1, 28, 128), torch.ones(300, 4, 128)
attended = torch.full_like(query, torch.nan)
kernels.attend_row(query, key, key, attended)
assert torch.allclose(attended, query)
assert torch.allclose(kernels.rms_norm(torch.ones(700, 1024), torch.ones(1024), 0.0), torch.ones(()))
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_THREAD_LIMIT": "1"}, check=False)
    assert run.returncode == 0


def test_a_row_of_zeros_without_an_epsilon_is_no_error() -> None:
    assert kernels.rms_norm(torch.zeros(1, 8), torch.ones(8), 0.0).isnan().all()
