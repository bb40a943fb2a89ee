"""Attention of many sequences in one call, for a GPU: rows and keys packed, lengths in tensors.

The kernel is chosen here and not by torch. On Hopper torch prefers cuDNN, which plans anew for every number of
keys: with each token of a text. Flash is called by its own operation, which takes where each span's keys start and
how many there are, so no keys are copied and no mask is made. No GPU has run this yet; the plain implementation
is what every CPU test of the layouts uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bagel_triton.model.attention import attend, attention_kernel


@dataclass(frozen=True)
class KeySpan:
    """Rows ``start:stop`` of a batch that see ``length`` keys from number ``first_key`` on."""

    start: int
    stop: int
    first_key: int
    length: int
    causal: bool


@dataclass(frozen=True)
class VarlenCall:
    """One call: adjacent spans that are all causal or all not. One row alone is both.

    ``query_starts`` and ``key_starts`` are int32 [spans + 1], of which the last key start is not read;
    ``lengths`` is int32 [spans], each at most ``max_length``. Starts of queries count from the call's first row.
    The tensors decide; the lengths of ``spans`` are those of the step that they were made for.
    """

    spans: tuple[KeySpan, ...]
    query_starts: Tensor
    key_starts: Tensor
    lengths: Tensor
    max_length: int

    @property
    def rows(self) -> slice:
        """Rows of the batch."""
        return slice(self.spans[0].start, self.spans[-1].stop)

    @property
    def causal(self) -> bool:
        """Whether a row sees no later token."""
        return any(span.causal and span.stop - span.start > 1 for span in self.spans)


def grouped(spans: Sequence[KeySpan]) -> list[tuple[KeySpan, ...]]:
    """Spans by row, in as few groups as can be called at once."""
    groups: list[list[KeySpan]] = []
    for span in sorted(spans, key=lambda span: span.start):
        either = span.stop - span.start == 1
        last = groups[-1] if groups else None
        kinds = {one.causal for one in last or () if one.stop - one.start > 1}
        if last is not None and last[-1].stop == span.start and (either or not kinds or kinds == {span.causal}):
            last.append(span)
        else:
            groups.append([span])
    return [tuple(group) for group in groups]


def numbers_of(group: Sequence[KeySpan]) -> list[int]:
    """Contents of a call's tensors, in order."""
    rows = accumulate((span.stop - span.start for span in group), initial=0)
    return [*rows, *(span.first_key for span in group), 0, *(span.length for span in group)]


def call_of(group: tuple[KeySpan, ...], numbers: Tensor, max_length: int = 0) -> VarlenCall:
    """The call of a group whose ``numbers`` are in a tensor, int32; no ``max_length`` is that of the group."""
    size = len(group) + 1
    longest = max_length or max(span.length for span in group)
    query_starts, key_starts, lengths = numbers.split((size, size, size - 1))
    return VarlenCall(group, query_starts, key_starts, lengths, longest)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall) -> Tensor:
    """query [rows of the call, heads, head_dim]; key and value [keys, kv_heads, head_dim] -> like query, contiguous."""
    if attention_kernel(query.device, query.dtype).is_flash:
        longest_rows = max(span.stop - span.start for span in call.spans)
        starts = call.query_starts, call.key_starts, longest_rows, call.max_length
        out: Tensor = torch.ops.aten._flash_attention_forward(
            query, key, value, *starts, 0.0, call.causal, False, seqused_k=call.lengths
        )[0]
        return out
    return plain_varlen_attention(query, key, value, call)


def plain_varlen_attention(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall) -> Tensor:
    """The same from the tensors' numbers, a span after the other; they are read by the host."""
    queries, keys, lengths = (part.tolist() for part in (call.query_starts, call.key_starts, call.lengths))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for start, stop, first, length in zip(queries[:-1], queries[1:], keys[:-1], lengths, strict=True):
        seen = slice(first, first + length)
        out[start:stop] = attend(query[start:stop], key[seen], value[seen], call.causal)
    return out
