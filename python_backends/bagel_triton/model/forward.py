"""How the transformer runs on a device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from bagel_triton.model.batch import PackedBatch
from bagel_triton.model.cpu.executor import CpuExecutor
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.cuda.executor import CudaExecutor
from bagel_triton.model.device import on_gpu
from bagel_triton.model.mot import Transformer


class Forward(Protocol):
    """Hidden states before the final norm: [tokens, hidden] -> same shape, which may be the embeddings' memory.

    ``kv`` is a :class:`~bagel_triton.model.attention.StepKV`, on a CPU a
    :class:`~bagel_triton.model.attention.SequenceKV`.
    """

    def __call__(self, embeddings: Tensor, batch: PackedBatch, kv: Any) -> Tensor: ...


def forward_on(device: torch.device, transformer: Transformer, pool: ThreadPool) -> Forward:
    """The executor for ``device``; ``pool`` is a CPU's."""
    return CudaExecutor(transformer) if on_gpu(device) else CpuExecutor(transformer, pool)
