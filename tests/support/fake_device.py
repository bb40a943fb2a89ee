"""A CUDA device whose memory is this process's, with contents: for code that copies between it and the host.

Under :func:`fake_device` a tensor that is made on ``cuda``, or moved there, says that it is there. What CUDA refuses
fails: an operation on tensors of both, but a copy, and an address handed to a library that knows none of a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda:0")
COPIES = ("copy_", "__setitem__")


class OnGpu(Tensor):
    """A tensor of the fake device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def data_ptr(self) -> int:
        raise AssertionError("an address on the GPU is none of the host's")


class _Moves(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        named = [one for one in (*args, kwargs.get("device")) if isinstance(one, str | torch.device)]
        target = next((torch.device(one).type for one in named), None)
        name = getattr(func, "__name__", "")
        if name == "to" and isinstance(args[1], Tensor):
            target = args[1].device.type
        if name == "to" and target is not None:
            dtype = args[1].dtype if isinstance(args[1], Tensor) else args[0].dtype
            moved = args[0].as_subclass(Tensor).clone().to(dtype)
            return moved.as_subclass(OnGpu) if target == "cuda" else moved
        if name == "cpu":
            return args[0].as_subclass(Tensor).clone()
        if target == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).as_subclass(OnGpu)
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.dim()]
        places = {isinstance(one, OnGpu) for one in tensors}
        assert len(places) < 2 or name in COPIES, f"{name} of tensors on the CPU and the GPU"
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_device() -> Iterator[list[str]]:
    """The device, and the streams that were waited for."""
    waits: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waits.append("stream"))
    with (
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
        mock.patch.object(torch.cuda, "synchronize"),
        _Moves(),
    ):
        yield waits
