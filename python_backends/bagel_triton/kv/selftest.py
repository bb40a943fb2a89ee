"""A connector's self-test: the thinker lends a pattern, and the DiT claims and compares it.

Both ends run in the stages' own processes, on the engines' threads, so the test covers what
requests use: the mapping or connection, the lease words, the copy.
"""

from __future__ import annotations

import secrets
import zlib

import torch
from torch import Tensor

from bagel_triton.kv.block_pool import KVSequence
from bagel_triton.kv.connectors.base import Consumer, Producer
from bagel_triton.kv.store import store_shape
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import Branch, KVGeometry, KVHandle

BLOCKS = 4
TTL_S = 10.0


def lend_pattern(producer: Producer, ttl_s: float = TTL_S) -> KVHandle:
    """A lease on a pattern of a few scattered blocks, the last one not full.

    Raises:
        KVCacheFull: there is no room for it.
    """
    pool, geometry = producer.pool, producer.pool.geometry
    request_id = f"selftest-{secrets.token_hex(8)}"
    size = geometry.block_tokens
    context, gaps = KVSequence(pool), KVSequence(pool)
    try:
        for block in range(min(BLOCKS, pool.blocks.count // 2)):
            context.extend(size if block < BLOCKS - 1 else max(1, size - 1))
            gaps.extend(size)
        slots = pool.slots(context.blocks, 0, context.tokens)
        pool.store[:, :, slots] = _pattern(request_id, geometry, context.tokens).to(pool.store.device)
        if pool.store.is_cuda:
            torch.cuda.synchronize(pool.store.device)
        handle = producer.leases.publish(request_id, Branch.GEN, context, ttl_s)
    except Exception:
        context.free()
        raise
    finally:
        gaps.free()
    return handle


def read_pattern(consumer: Consumer, handle: KVHandle, device: torch.device) -> None:
    """Claim the lease of :func:`lend_pattern` into memory of ``device`` and compare.

    Raises:
        LeaseError: it cannot be claimed, or the contents differ.
    """
    if handle.tokens > BLOCKS * handle.geometry.block_tokens:
        raise LeaseError(f"{handle.tokens} tokens are more than a self-test lends")
    expected = _pattern(handle.request_id, handle.geometry, handle.tokens)
    found = torch.empty(expected.shape, dtype=expected.dtype, device=device)
    consumer.claim(handle, found)
    wrong = int((found.cpu() != expected).sum())
    if wrong or not handle.tokens:
        raise LeaseError(
            f"the self-test of connector {handle.connector} read {wrong} of {expected.numel()} numbers wrong"
        )


def _pattern(request_id: str, geometry: KVGeometry, tokens: int) -> Tensor:
    """Small integers, exact in every dtype and different for every request."""
    generator = torch.Generator().manual_seed(zlib.crc32(request_id.encode()))
    numbers = torch.randint(-128, 128, store_shape(geometry, tokens), generator=generator)
    return numbers.to(getattr(torch, geometry.dtype))
