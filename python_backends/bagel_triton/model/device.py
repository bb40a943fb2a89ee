"""The device and precision of a stage, and how the transformer runs there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from bagel_triton.model.attention import attention_kernel
from bagel_triton.model.autoencoder import Decoder
from bagel_triton.model.cpu.executor import CpuExecutor
from bagel_triton.model.cpu.row_decoder import decode_by_rows
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.cuda import autoencoder as cuda_autoencoder
from bagel_triton.model.cuda.executor import CudaExecutor
from bagel_triton.model.cuda.graphs import CAPTURES
from bagel_triton.model.mot import PackedBatch, Reduce, Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """A resolved device and dtype, which determine the attention backend."""

    torch_device: torch.device
    torch_dtype: torch.dtype

    @property
    def device(self) -> str:
        """The device's name, such as ``cpu`` or ``cuda:0``."""
        return str(self.torch_device)

    @property
    def dtype_name(self) -> Literal["float32", "bfloat16"]:
        """The dtype's name."""
        return "float32" if self.torch_dtype == torch.float32 else "bfloat16"

    @property
    def attention(self) -> str:
        """The kernel of the attention, and why it is that one."""
        name, why = attention_kernel(self.torch_device, self.torch_dtype)
        return f"{name} ({why})"


def resolve(device: str, dtype: str) -> Placement:
    """Resolve ``auto``: CUDA if there is a device, else the CPU; float32 on a CPU, bfloat16 on CUDA.

    ``cuda`` becomes ``cuda:0``, as calls of the driver need the index.

    Raises:
        ValueError: the message has the value and what is allowed.
    """
    name = ("cuda:0" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device={device!r} is not allowed; allowed: auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"device={device!r} is not there: this machine has {count} CUDA devices")
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not allowed; allowed: auto, {', '.join(DTYPES)}")
    return Placement(torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(name), DTYPES[dtype])


CPU = torch.device("cpu")


def on_gpu(device: torch.device) -> bool:
    """Whether forwards on ``device`` take all sequences in one call: see :mod:`bagel_triton.kv.store`."""
    return device.type == "cuda"


def is_lost(device: torch.device) -> bool:
    """Whether every call of ``device`` fails, as after an illegal access: CUDA then repeats that error forever.

    Other errors, such as too little memory, end with their call.
    """
    if device.type != "cuda":
        return False
    try:
        _wait_for_device(device)
    except RuntimeError:
        return True
    return False


def _wait_for_device(device: torch.device) -> None:
    with CAPTURES:
        torch.cuda.synchronize(device)


class Forward(Protocol):
    """Hidden states before the final norm: [tokens, hidden] -> same shape, which may be the embeddings' memory.

    ``kv`` is a :class:`~bagel_triton.model.attention.StepKV`, on a CPU a
    :class:`~bagel_triton.model.attention.SequenceKV`.
    """

    def __call__(self, embeddings: Tensor, batch: PackedBatch, kv: Any) -> Tensor: ...


def forward_on(
    device: torch.device, transformer: Transformer, pool: ThreadPool, reduce: Reduce | None = None
) -> Forward:
    """The executor for ``device``; ``pool`` is a CPU's, and ``reduce`` of a ``transformer`` of some of the heads."""
    executor = CudaExecutor(transformer, reduce) if on_gpu(device) else CpuExecutor(transformer, pool, reduce)
    if (offload := transformer.offload) is None:
        return executor

    def forward(embeddings: Tensor, batch: PackedBatch, kv: Any) -> Tensor:
        with offload.forward():
            return executor(embeddings, batch, kv)

    return forward


def whole_images_on(device: torch.device, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that runs an autoencoder's encoder or decoder on ``device`` over whole images: float32 in and out."""
    if on_gpu(device):
        return cuda_autoencoder.whole(network)
    return partial(decode_by_rows, network) if isinstance(network, Decoder) else network


@contextlib.contextmanager
def own_stream(device: torch.device, first: bool) -> Iterator[None]:
    """On a GPU, run the calling thread's work in a stream of its own, ``first`` before those of other engines.

    In the device's default stream a step of text would wait for all that the DiT has queued.
    """
    if device.type != "cuda":
        yield
        return
    _wait_for_device(device)  # the weights are there
    with torch.cuda.stream(torch.cuda.Stream(device, priority=-1 if first else 0)):
        yield


def wait_for_stream(device: torch.device) -> None:
    """Wait until the GPU has finished this thread's queued work, so its results can be handed over."""
    if device.type == "cuda":
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


class Paced:
    """Keeps the host at most one step ahead of a GPU: progress and cancellation are those of steps that have run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: torch.cuda.Event | None = None

    def step(self) -> None:
        """Wait until the step before this one has run; call it when this one is queued."""
        if self._device.type != "cuda":
            return
        if self._before is not None:
            self._before.synchronize()
        self._before = torch.cuda.Event()
        self._before.record(torch.cuda.current_stream(self._device))
