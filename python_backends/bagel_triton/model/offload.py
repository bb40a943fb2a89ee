"""Layers whose weights stay in the host's memory and are copied to the device just before they are computed.

Applied to the plain network from outside. A layer's large weights become views of one of two *slots* on the device,
which the layers that are offloaded take in turns: while one layer is computed from one slot, the next is copied into
the other, on a GPU by a stream of its own. So addresses never change and no memory is allocated on the way. Norms and
biases stay on the device, as do all layers that are not offloaded; these lie between the others, evenly, so that
copies have time.

A CPU takes the same way, with plain copies and from memory to memory: nothing is saved there, and results are those
of the weights themselves to the last bit. No GPU has run this yet.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bagel_triton.model.mot import Expert, Layer, Transformer
from bagel_triton.model.quantization import QUANTIZED, QuantizedLinear

SLOTS = 2
GIB = 2**30
_ALIGNMENT = 256  # bytes, as CUDA's allocator has it


def offloaded(layers: int, layer_bytes: int, gigabytes: float) -> list[int]:
    """Numbers of the layers that are offloaded where ``gigabytes`` GiB of weights are to be, spread over all.

    Whole layers, each of ``layer_bytes``, so it may be up to one more.
    """
    count = math.ceil(min(layers, gigabytes * GIB / layer_bytes)) if layer_bytes else 0
    return [layer for layer in range(layers) if (layer + 1) * count // layers > layer * count // layers]


def offloadable(transformer: Transformer, layer: int) -> list[str]:
    """The names in ``transformer`` of the tensors of a ``layer`` that are offloaded with it."""
    return [f"layers.{layer}.{place}" for place, _ in _places(_layer(transformer, layer))]


def offloadable_bytes(transformer: Transformer) -> int:
    """Bytes that one layer gives to the host."""
    return sum(tensor.nbytes for _, tensor in _places(_layer(transformer, 0)))


def _layer(transformer: Transformer, number: int) -> Layer:
    return transformer.layers[number]  # type: ignore[return-value]


def _places(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    """The large tensors of ``layer``, of the experts that it has."""
    for name, expert in (("gen", layer.gen), ("und", layer.und)):
        for linear in QUANTIZED if isinstance(expert, Expert) else ():
            module = expert.get_submodule(linear)
            for kind in ("weight", "weight_scale") if isinstance(module, QuantizedLinear) else ("weight",):
                yield f"{name}.{linear}.{kind}", getattr(module, kind)


@dataclass(eq=False)
class _Slot:
    """Memory of one layer on the device; ``copied`` is an event of a GPU when ``holds`` is there."""

    tensors: list[Tensor]
    holds: int | None = None
    copied: Any = None


class LayerOffload:
    """Keeps ``layers`` of ``transformer`` in the host's memory, where their weights are now.

    Everything else is on ``device`` already. With ``ahead`` the next layer is copied while one is computed; then a
    layer is lost as soon as the next one is fetched. Otherwise the one fetched before it stays, too.
    """

    def __init__(
        self, transformer: Transformer, layers: Sequence[int], device: torch.device, ahead: bool | None = None
    ) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = self._copies is not None if ahead is None else ahead
        self._order = {layer: position for position, layer in enumerate(layers)}
        self._layers = list(layers)
        self._busy = threading.Lock()
        self._last: Any = None  # an event when the last forward is done
        self._host: list[list[Tensor]] = []
        self._slots: list[_Slot] = []
        for position, number in enumerate(layers):
            layer = _layer(transformer, number)
            places = list(_places(layer))
            if position < SLOTS:
                self._slots.append(_Slot([torch.empty_like(tensor, device=device) for _, tensor in places]))
            self._host.append(self._kept([tensor for _, tensor in places]))
            for (place, tensor), target in zip(places, self._slot(position).tensors, strict=True):
                _put(layer, place, target, isinstance(tensor, nn.Parameter))
        transformer.offload = self

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Keeps other engines out of the slots during a forward."""
        with self._busy:
            if self._last is not None:
                torch.cuda.current_stream(self._device).wait_event(self._last)
            try:
                yield
            finally:
                if self._copies is not None:
                    self._last = torch.cuda.current_stream(self._device).record_event()

    def fetch(self, layer: int) -> None:
        """Have ``layer`` on the device for what this thread's stream computes from now on; in the layers' order."""
        position = self._order.get(layer)
        if position is None:
            return
        slot = self._slot(position)
        if slot.holds != layer:
            self._copy(position)
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
        following = (position + 1) % len(self._layers)
        # With an odd number of layers the last and the first have one slot.
        if self.ahead and self._slot(following) is not slot and self._slot(following).holds != self._layers[following]:
            self._copy(following)

    def _slot(self, position: int) -> _Slot:
        return self._slots[position % SLOTS]

    def _copy(self, position: int) -> None:
        """Copy a layer into its slot, when all that was queued until now has been computed."""
        slot = self._slot(position)
        slot.holds = self._layers[position]
        if self._copies is None:
            for target, source in zip(slot.tensors, self._host[position], strict=True):
                target.copy_(source)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            for target, source in zip(slot.tensors, self._host[position], strict=True):
                target.copy_(source, non_blocking=True)
            slot.copied = self._copies.record_event()

    def _kept(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``tensors`` where they are; for a GPU together in memory that it can read by itself."""
        if self._copies is None:
            return [tensor.detach() for tensor in tensors]
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        memory = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        kept = [
            memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(ends[:-1], tensors, strict=True)
        ]
        for target, tensor in zip(kept, tensors, strict=True):
            target.copy_(tensor)
        return kept


def _put(layer: Layer, place: str, tensor: Tensor, is_parameter: bool) -> None:
    """Replace the tensor of ``layer`` that is called ``place``."""
    module, _, kind = place.rpartition(".")
    owner = layer.get_submodule(module)
    setattr(owner, kind, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
