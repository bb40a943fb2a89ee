"""Packed attention against the formula: grouped heads, a past, causal and whole spans in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bagel_triton.model.attention import AttentionKernel, QuerySpan, SequenceKV, attend, attention_kernel

HEAD_DIM = 16


@dataclass(frozen=True)
class FixedKV(SequenceKV):
    """Keys and values that were written before, [length, kv_heads, head_dim] a sequence."""

    spans: Sequence[QuerySpan]
    sequences: Sequence[tuple[Tensor, Tensor]]

    def write_rows(self, layer: int, key: Tensor, value: Tensor, rows: slice) -> None:
        raise AssertionError("attention writes nothing")

    def rounds(self, spans: Sequence[QuerySpan]) -> list[Sequence[QuerySpan]]:
        return [spans]

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        return self.sequences[sequence]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _keys_and_values(lengths: list[int], kv_heads: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (_random(2 * n + 1, length, kv_heads, HEAD_DIM), _random(2 * n + 2, length, kv_heads, HEAD_DIM))
        for n, length in enumerate(lengths)
    ]


def _naive(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """One row and head at a time, in float64."""
    rows, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    out = torch.empty(rows, heads, HEAD_DIM, dtype=torch.float64)
    for row in range(rows):
        seen = length - rows + row + 1 if causal else length
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = key[:seen, shared].double() @ query[row, head].double() / HEAD_DIM**0.5
            out[row, head] = scores.softmax(0) @ value[:seen, shared].double()
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize(
    ("rows", "length", "causal"),
    [(5, 5, True), (5, 12, True), (1, 12, True), (1, 1, True), (5, 12, False), (12, 12, False), (70, 600, True)],
)
def test_it_is_the_formula(heads: int, kv_heads: int, rows: int, length: int, causal: bool) -> None:
    query, ((key, value),) = _random(0, rows, heads, HEAD_DIM), _keys_and_values([length], kv_heads)
    out, expected = attend(query, key, value, causal), _naive(query, key, value, causal)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_spans_of_every_kind_share_a_batch_and_no_keys() -> None:
    """Two images' latents and their markers, behind them two prompts, in an order of their own."""
    query, sequences = _random(0, 31, 6, HEAD_DIM), _keys_and_values([20, 9, 14, 5], 2)
    spans = [
        QuerySpan(0, 8, 1, causal=False),
        QuerySpan(8, 20, 0, causal=False),
        QuerySpan(20, 22, 1, causal=False),
        QuerySpan(22, 24, 0, causal=False),
        QuerySpan(24, 28, 2, causal=True),
        QuerySpan(28, 31, 3, causal=True),
    ]
    out = FixedKV(spans, sequences).attend(0, query)
    for span in spans:
        assert torch.equal(out[span.rows], attend(query[span.rows], *sequences[span.sequence], span.causal))
        expected = _naive(query[span.rows], *sequences[span.sequence], span.causal)
        torch.testing.assert_close(out[span.rows].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_last_of_a_prompts_rows_sees_all_and_the_first_only_the_past() -> None:
    query, ((key, value),) = _random(0, 3, 4, HEAD_DIM), _keys_and_values([8], 2)
    before = attend(query, key, value, causal=True)
    key[7] += 1.0
    value[7] += 1.0
    after = attend(query, key, value, causal=True)
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[torch.dtype, tuple[int, int]], AttentionKernel]]:
    """The kernel of a GPU of that compute capability."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    before = torch.backends.cuda.cudnn_sdp_enabled()

    def choose(dtype: torch.dtype, capability: tuple[int, int]) -> AttentionKernel:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        attention_kernel.cache_clear()
        return attention_kernel(torch.device("cuda:0"), dtype)

    yield choose
    attention_kernel.cache_clear()
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_gpu_takes_flash_and_never_cudnn(
    kernel: Callable[[torch.dtype, tuple[int, int]], AttentionKernel],
) -> None:
    """cuDNN plans anew for every number of keys, so with every token of a text."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert kernel(torch.bfloat16, (9, 0)).is_flash
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_hopper_takes_flash_3_where_it_is_installed(
    kernel: Callable[[torch.dtype, tuple[int, int]], AttentionKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", chosen.append)
    assert kernel(torch.bfloat16, (9, 0)) == ("flash-2", "torch's own; flash_attn_interface is not installed")
    monkeypatch.setattr("bagel_triton.model.attention.find_spec", lambda name: object())
    assert kernel(torch.bfloat16, (10, 0)) == ("flash-2", "torch's own; flash-3 needs compute capability 9.0, not 10.0")
    assert chosen == []
    assert kernel(torch.bfloat16, (9, 0)) == ("flash-3", "flash_attn_interface is installed")
    assert chosen == ["FA3"]

    def broken(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", broken)
    assert kernel(torch.bfloat16, (9, 0)).name == "flash-2"


def test_what_flash_does_not_take_is_said(kernel: Callable[[torch.dtype, tuple[int, int]], AttentionKernel]) -> None:
    assert kernel(torch.float32, (9, 0)) == ("torch-sdpa", "flash takes no float32")
    assert kernel(torch.bfloat16, (7, 5)) == ("torch-sdpa", "flash needs compute capability 8.0, not 7.5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_uses_torchs_own_attention(dtype: torch.dtype) -> None:
    assert attention_kernel(torch.device("cpu"), dtype).name == "torch-sdpa"
