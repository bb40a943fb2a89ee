"""A GPU of shapes alone: code runs on fake CUDA tensors, and what a device would be given is counted.

Under :func:`fake_gpu` a tensor on ``cuda`` has a shape, a dtype and no memory (torch's FakeTensorMode), so the
published geometry fits everywhere and torch needs no CUDA build. Tensors on the CPU stay real: token ids, block
tables and sampling compute as ever. What comes down from the fake device is zeros.

A kernel is an operation that a CUDA build would launch; views and allocations are none. A wait is a point where
the host stops until the device has finished what was queued: any copy but one from pinned memory that is
``non_blocking``, reading a number, an event's or a stream's ``synchronize``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Operations that launch nothing, though their schemas do not call them views.
FREE = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach, aten.detach_,
    aten.alias, aten._unsafe_view, aten._reshape_alias, aten.lift_fresh, aten.split, aten.split_with_sizes,
    aten.unbind, aten.chunk,
}  # fmt: skip
# Kernels that read rows of their first tensor, not all of it: what they write is what they read.
GATHERS = {aten.index_select, aten.embedding, aten.index, aten.gather}
SCATTERS = {aten.index_copy_, aten.index_put_, aten.index_add_, aten.scatter_}
# They need whole rows next to each other, and copy their input where it is not so.
WANT_CONTIGUOUS = {aten._fused_rms_norm, aten.native_layer_norm, aten.roll}
ATTENTION = {aten._flash_attention_forward, aten._scaled_dot_product_flash_attention}
ELSEWHERE = {torch.float32, torch.float64}


class DeviceMix(AssertionError):
    """An operation met tensors of the CPU and of the GPU, which CUDA refuses or copies in silence."""


class Promotion(AssertionError):
    """An operation met floating tensors of two dtypes, so that it computed in the wider one."""


class NoDevice(FakeTensorMode):
    """A FakeTensorMode that never looks for a device, whatever ``torch.cuda`` says of one."""

    avoid_device_init = True


@dataclass
class Tally:
    """What a GPU was given."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    downloads: int = 0
    views: int = 0
    masks: int = 0  # attentions that torch was given a mask for, which its flash kernel refuses
    graphs: int = 0  # replays
    graph_kernels: int = 0  # which launch these, apart from ``kernels``
    flops: float = 0.0  # of products and convolutions
    attention_flops: float = 0.0
    weight_bytes: float = 0.0  # read and written by products and attention
    bytes: float = 0.0  # read and written by all others
    wide_bytes: float = 0.0  # of those, written as float32 or float64

    def extrapolated(self, other: Tally, times: int) -> Tally:
        """This, and ``times`` the difference of ``other`` to it."""

        def one(mine: Any, its: Any) -> Any:
            if isinstance(mine, Counter):
                return Counter({name: one(mine[name], its[name]) for name in mine | its})
            return mine + times * (its - mine)

        return Tally(*(one(getattr(self, part.name), getattr(other, part.name)) for part in fields(self)))

    def replay(self, captured: Tally) -> None:
        """Add what a graph's replay does on the GPU."""
        self.graphs += 1
        self.graph_kernels += sum(captured.kernels.values())
        for name in ("flops", "attention_flops", "weight_bytes", "bytes", "wide_bytes"):
            setattr(self, name, getattr(self, name) + getattr(captured, name))

    @property
    def launches(self) -> int:
        return sum(self.kernels.values()) + self.graphs

    @property
    def stops(self) -> int:
        return sum(self.waits.values())


class Counting(TorchDispatchMode):
    """Runs CPU operations as they are and all others on fake tensors; keeps a :class:`Tally` of these."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self.tally = Tally()
        self._pinned: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda"]
        target = kwargs.get("device")
        to_gpu = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not on_gpu and not to_gpu:
            return self._on_cpu(func, args, kwargs)
        if func.namespace == "prim":  # questions such as its device
            with self._fake:
                return func(*args, **kwargs)
        if packet is aten.scaled_dot_product_attention:
            return self._attended(*args, **kwargs)
        if packet is aten._fused_rms_norm:  # composite, but for the kernel that a CUDA build has
            self._check(packet, tensors, on_gpu)
            with self._fake:
                normed = torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
            self._count(func, packet, args, kwargs, on_gpu, normed)
            return normed, normed
        if func._can_decompose():  # in inference mode composite operations come here whole
            with self:
                return func.decompose(*args, **kwargs)
        if packet is aten._to_copy and target is not None:
            return self._moved(func, args[0], kwargs)
        if packet is aten.copy_ and args[0].device != args[1].device:
            return self._copied(func, *args, **kwargs)
        if packet in (aten._local_scalar_dense, aten.equal, aten.nonzero):
            self.tally.waits[str(packet)] += 1
            self.tally.downloads += 1
            return self._zero(args[0].dtype)
        if packet in (aten.index, aten.index_put_):  # an index on the CPU is uploaded in silence
            args = (args[0], [self._uploaded(one) for one in args[1]], *args[2:])
            tensors = on_gpu = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        self._check(packet, tensors, on_gpu)
        into = kwargs.pop("out", None)
        with self._fake:
            out = func(*args, **kwargs) if into is None else packet(*args, **kwargs)
        if into is not None:
            assert (into.shape, into.dtype) == (out.shape, out.dtype), f"{func}: out= is {into.shape}, not {out.shape}"
            out = into
        self._count(func, packet, args, kwargs, on_gpu, out)
        return out

    def _on_cpu(self, func: Any, args: Any, kwargs: Any) -> Any:
        pinned = kwargs.pop("pin_memory", None)
        with unset_fake_temporarily():
            out = func(*args, **kwargs)
        if pinned:
            self._pinned.add(out)
        return out

    def _is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        return any(kept.untyped_storage().data_ptr() == storage for kept in self._pinned)

    def _moved(self, func: Any, source: Tensor, kwargs: Any) -> Tensor:
        target = torch.device(kwargs["device"])
        if not isinstance(source, FakeTensor):  # up
            self._transfer("upload", kwargs.get("non_blocking", False) and self._is_pinned(source))
            with self._fake:
                return torch.empty_like(source, device=target, dtype=kwargs.get("dtype") or source.dtype)
        if target.type == "cpu":
            self._transfer("download", False)
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        with self._fake:
            out: Tensor = func(source, **kwargs)
        self._count(func, func.overloadpacket, (source,), kwargs, [source], out)
        return out

    def _copied(self, func: Any, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        up = isinstance(to, FakeTensor)
        host = source if up else to
        if up and host.dim() == 0:
            raise DeviceMix(f"{func}: a number on the CPU goes to the GPU by a copy of its own")
        self._transfer("upload" if up else "download", non_blocking and self._is_pinned(host))
        if not up:
            with unset_fake_temporarily():
                to.zero_()
        return to

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *rest: Any, **kw: Any
    ) -> Any:
        """torch's own attention, whose kernel depends on the device: one, whichever it is."""
        self._check(aten.scaled_dot_product_attention, [query, key, value], [query, key, value])
        with self._fake:
            out = torch.empty_like(query)
        tally = self.tally
        tally.kernels["scaled_dot_product_attention"] += 1
        tally.masks += mask is not None
        tally.attention_flops += 4.0 * query.numel() * key.shape[-2]
        tally.weight_bytes += 2 * query.nbytes + key.nbytes + value.nbytes
        return out

    def _uploaded(self, index: Tensor | None) -> Tensor | None:
        if index is None or isinstance(index, FakeTensor):
            return index
        return self._moved(aten._to_copy.default, index, {"device": "cuda:0"})

    def _transfer(self, kind: str, runs_on: bool) -> None:
        if kind == "upload":
            self.tally.uploads += 1
        else:
            self.tally.downloads += 1
        if not runs_on:
            self.tally.waits[kind] += 1

    def _zero(self, dtype: torch.dtype) -> Any:
        return 0.0 if dtype.is_floating_point else 0

    def _check(self, packet: Any, tensors: list[Tensor], on_gpu: list[Tensor]) -> None:
        """Refuse what CUDA would refuse, would copy in silence, or would compute in a wider dtype."""
        if packet in FREE:
            return
        if any(tensor.device.type != "cuda" for tensor in tensors):
            shapes = [f"{tensor.device.type}{list(tensor.shape)}" for tensor in tensors]
            raise DeviceMix(f"{packet}: {', '.join(shapes)}")
        if packet in (aten.copy_, aten._to_copy, aten.index_copy_, aten._scaled_mm):
            return
        dtypes = {tensor.dtype for tensor in on_gpu if tensor.dtype.is_floating_point and tensor.dim()}
        if len(dtypes) > 1 and packet is not aten.native_layer_norm:
            raise Promotion(f"{packet}: {sorted(map(str, dtypes))}")

    def _count(self, func: Any, packet: Any, args: Any, kwargs: Any, on_gpu: list[Tensor], out: Any) -> None:
        tally = self.tally
        if func.is_view or packet in FREE or packet is aten.view or (packet is aten._to_copy and out is args[0]):
            tally.views += 1
            return
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = packet.__name__
        tally.kernels[name] += 1
        read = sum(tensor.nbytes for tensor in on_gpu)
        written = sum(tensor.nbytes for tensor in made)
        if packet in GATHERS:
            read = written
        elif packet in SCATTERS:
            read = written = on_gpu[-1].nbytes
        if packet in WANT_CONTIGUOUS and not on_gpu[0].is_contiguous():
            tally.kernels["contiguous"] += 1
            read += 2 * on_gpu[0].nbytes
        if packet in ATTENTION:
            tally.attention_flops += _attention_flops(packet, args)
            tally.weight_bytes += sum(tensor.nbytes for tensor in made[:1]) + args[0].nbytes
            return
        count = flop_registry.get(packet) or flop_registry.get(getattr(aten, name.removesuffix("_"), None))
        if count is not None:
            tally.flops += count(*args, **kwargs, out_val=out)
            tally.weight_bytes += read + written
            return
        tally.bytes += read + written
        tally.wide_bytes += sum(tensor.nbytes for tensor in made if tensor.dtype in ELSEWHERE)


def _attention_flops(packet: Any, args: Any) -> float:
    """Two products of every query row with all keys of its span; of those causal as if they saw all."""
    query, key = args[0], args[1]
    if packet is aten._flash_attention_forward and query.dim() == 3:
        return 4.0 * query.shape[0] * query.shape[1] * query.shape[2] * args[6]  # max_k
    batch, heads, rows, width = query.shape
    return 4.0 * batch * heads * rows * key.shape[2] * width


class Indexing(TorchFunctionMode):
    """``x[...]`` of a fake tensor by plain operations: torch's own sets the current device, which a CPU build lacks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return _item(args[0], args[1])
        if func is Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            return _set_item(*args)
        if func is Tensor.contiguous and isinstance(args[0], FakeTensor):
            return args[0] if args[0].is_contiguous() else aten.clone(args[0], memory_format=torch.contiguous_format)
        if func is Tensor.copy_ and any(isinstance(one, FakeTensor) for one in args[:2]):
            return aten.copy_.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _item(x: Tensor, index: Any) -> Tensor:
    view, tensors = _sliced(x, index)
    return aten.index(view, tensors) if tensors else view


def _set_item(x: Tensor, index: Any, value: Any) -> None:
    view, tensors = _sliced(x, index)
    if tensors:
        aten.index_put_(view, tensors, value)
    elif isinstance(value, Tensor):
        aten.copy_.default(view, value)
    else:
        view.fill_(value)


def _sliced(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """``x`` after the numbers and slices of ``index``, and the tensors (or lists) that are left of it, by dimension."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is ... for part in parts):
        at = next(number for number, part in enumerate(parts) if part is ...)
        missing = x.dim() - sum(part is not None for part in parts) + 1
        parts = (*parts[:at], *(slice(None),) * missing, *parts[at + 1 :])
    tensors: list[Tensor | None] = []
    for part in parts:
        dim = len(tensors)
        if part is None:
            x = x.unsqueeze(dim)
            tensors.append(None)
        elif isinstance(part, int):
            x = x.select(dim, part)
        elif isinstance(part, slice):
            if part != slice(None):
                x = aten.slice(x, dim, part.start, part.stop, part.step or 1)
            tensors.append(None)
        else:
            tensors.append(part if isinstance(part, Tensor) else torch.tensor(part))
    return x, tensors if any(tensor is not None for tensor in tensors) else []


class FakeEvent:
    """``torch.cuda.Event``."""

    gpu: Counting

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.tally.waits["event"] += 1


class FakeGraph:
    """``torch.cuda.CUDAGraph``: what was counted while it was captured is given again by each replay."""

    gpu: Counting
    captured: Tally

    def replay(self) -> None:
        self.gpu.tally.replay(self.captured)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        before, self.gpu.tally = self.gpu.tally, Tally()
        yield
        self.captured, self.gpu.tally = self.gpu.tally, before
        if self.captured.waits or self.captured.uploads or self.captured.downloads:
            raise AssertionError(f"a graph cannot wait for the host, nor it for a graph: {self.captured}")


class FakeStream(contextlib.AbstractContextManager["FakeStream"]):
    """``torch.cuda.Stream``, and what ``torch.cuda.stream`` returns of it."""

    gpu: Counting

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.priority = device, priority

    def __exit__(self, *error: object) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or FakeEvent()

    def synchronize(self) -> None:
        self.gpu.tally.waits["stream"] += 1


@contextlib.contextmanager
def fake_gpu() -> Iterator[Counting]:
    """Every tensor made on ``cuda`` in this thread is fake from here on, and so is ``torch.cuda``."""
    gpu = Counting(NoDevice(allow_non_fake_inputs=True))
    event, stream, graph = (type(kind.__name__, (kind,), {"gpu": gpu}) for kind in (FakeEvent, FakeStream, FakeGraph))
    current = stream()

    def synchronize(device: Any = None) -> None:
        gpu.tally.waits["device"] += 1

    replaced: dict[str, Callable[..., Any]] = {
        "Event": event,
        "Stream": stream,
        "stream": lambda one: one,
        "CUDAGraph": graph,
        "graph": lambda captured, **options: captured.capture(),
        "graph_pool_handle": lambda: (0, 0),
        "current_stream": lambda device=None: current,
        "synchronize": synchronize,
        "get_device_capability": lambda device=None: (9, 0),
        "is_available": lambda: True,
        "device_count": lambda: 1,
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.backends.cuda, "is_flash_attention_available", return_value=True))
        stack.enter_context(gpu._fake)
        stack.enter_context(gpu)
        stack.enter_context(Indexing())
        yield gpu
