"""Where a stage computes, from what a configuration says."""

from __future__ import annotations

import pytest
import torch

from bagel_triton.model.device import resolve


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("auto", "auto", ("cuda:0", "bfloat16")),
        ("cuda", "auto", ("cuda:0", "bfloat16")),
        ("cuda:1", "float32", ("cuda:1", "float32")),
        ("cpu", "auto", ("cpu", "float32")),
    ],
)
def test_a_gpu_is_always_numbered(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: str, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    placement = resolve(device, dtype)
    assert (placement.device, placement.dtype_name) == expected


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu", "device='tpu' is not allowed; allowed: auto, cpu, cuda, cuda:N"), ("cuda:2", "this machine has 2 CUDA")],
)
def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        resolve(device, "auto")
