"""Encoders' outputs, kept for images that come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from bagel_triton.telemetry.metrics import Metrics


class EncodingCache:
    """Tensors by key, at most ``capacity`` bytes of them; those used longest ago go first.

    An editing session sends the same image with a new seed: its posterior draw, and so its
    keys and values, are new, but what the encoders made of its pixels is not.
    """

    def __init__(self, capacity: int, metrics: Metrics) -> None:
        self._capacity, self._bytes, self._metrics = capacity, 0, metrics
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes, encode: Callable[[], Tensor]) -> Tensor:
        """What is kept under ``key``, or else what ``encode`` returns; not to be written to."""
        self._metrics.count("thinker_encoding_queries")
        if key in self._kept:
            self._metrics.count("thinker_encoding_hits")
            self._kept.move_to_end(key)
            return self._kept[key]
        made = encode()
        if made.nbytes <= self._capacity:
            self._kept[key] = made
            self._bytes += made.nbytes
            while self._bytes > self._capacity:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return made
