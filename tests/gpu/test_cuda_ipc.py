"""``cuda_ipc`` between two processes on one GPU."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator

import pytest
import torch

from bagel_triton.ipc.cuda_memory import device_of, device_uuid
from bagel_triton.kv.block_pool import KVCacheFull
from bagel_triton.kv.store import token_bytes
from bagel_triton.protocol.errors import LeaseError
from bagel_triton.protocol.messages import CudaAddress, KVGeometry, KVHandle, decode, encode
from tests.support.connectors import Ends
from tests.support.kv import contents_of
from tests.support.kv_process import Peer, peer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC needs a CUDA device; there is none here"),
]
BAGEL = KVGeometry(layers=28, kv_heads=4, head_dim=128, block_tokens=16, dtype="bfloat16")
GIGABYTE = 1 << 30


def _ends(blocks: int = 16, geometry: KVGeometry | None = None) -> Ends:
    prefix = f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}"
    return Ends("cuda_ipc", prefix, blocks, geometry or Ends.geometry, "cuda:0")


@contextlib.contextmanager
def _both(ends: Ends) -> Iterator[tuple[Peer, Peer]]:
    with peer(ends.producer) as producer, peer(ends.consumer) as consumer:
        yield producer, consumer
    assert ends.files() == []


def test_contexts_travel_between_two_processes() -> None:
    with _both(_ends()) as (producer, consumer):
        for labels in (range(3), range(10, 25), range(20, 21)):
            handle = producer.lend(labels)
            assert torch.equal(consumer.ask("claim", encode(handle)), contents_of(labels))
        assert isinstance(handle.address, CudaAddress)
        assert handle.address.device == device_uuid(torch.device("cuda:0"))
        assert producer.ask("reclaim") == 3
        assert producer.ask("used") == 0


def test_a_device_is_found_by_its_uuid() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    assert device_of(device_uuid(device)) == device
    assert device_of("no such device") is None


def test_a_fork_is_lent_with_its_shared_past() -> None:
    with _both(_ends()) as (producer, consumer):
        handle = producer.ask("fork", range(6), range(50, 57))
        assert torch.equal(consumer.ask("claim", handle), contents_of([*range(6), *range(50, 57)]))
        producer.ask("reclaim")
        assert producer.ask("used") == 2


def test_a_consumer_that_was_killed_holds_nothing_past_the_leases_time() -> None:
    ends = _ends()
    with peer(ends.producer) as producer:
        handle = producer.lend(range(6), ttl_s=0.5)
        with peer(ends.consumer) as victim, pytest.raises(EOFError):
            victim.ask("stop_inside", encode(handle))
        time.sleep(0.5)
        assert producer.ask("reclaim") == 1
        assert producer.ask("used") == 0
        with peer(ends.consumer) as other:
            assert torch.equal(other.ask("claim", encode(producer.lend(range(8)))), contents_of(range(8)))


def test_a_producer_that_was_restarted_is_mapped_anew() -> None:
    ends = _ends()
    with peer(ends.producer) as producer, peer(ends.consumer) as consumer:
        old = producer.lend(range(3))
        assert torch.equal(consumer.ask("claim", encode(old)), contents_of(range(3)))
        left = producer.lend(range(4))
        producer.kill()
        with peer(ends.producer) as successor:
            new = successor.lend(range(30, 36))
            assert torch.equal(consumer.ask("claim", encode(new)), contents_of(range(30, 36)))
            with pytest.raises(LeaseError, match="is gone"):
                consumer.ask("claim", encode(left))


def test_a_full_pool_is_one_error_and_empties_again() -> None:
    with _both(_ends(blocks=4)) as (producer, consumer):
        handle = producer.lend(range(16))
        with pytest.raises(KVCacheFull):
            producer.lend(range(1))
        consumer.ask("claim", encode(handle))
        producer.ask("reclaim")
        assert torch.equal(consumer.ask("claim", encode(producer.lend(range(16)))), contents_of(range(16)))


def test_a_gigabyte_arrives_whole() -> None:
    tokens = -(-GIGABYTE // token_bytes(BAGEL))
    with _both(_ends(blocks=-(-tokens // BAGEL.block_tokens), geometry=BAGEL)) as (producer, consumer):
        right, seconds = consumer.ask("check_random", producer.ask("lend_random", tokens, 7), 7, "cuda:0")
        assert right
        assert seconds < 5.0


def test_what_is_claimed_was_written_before_and_is_not_written_over_while_it_is_read() -> None:
    """Many leases over the same few blocks, with both processes' streams busy all the time."""
    tokens = 2048
    with _both(_ends(blocks=3 * tokens // BAGEL.block_tokens, geometry=BAGEL)) as (producer, consumer):
        pending: list[tuple[bytes, int]] = []
        for seed in range(60):
            producer.ask("reclaim")
            pending.append((producer.ask("lend_random", tokens, seed), seed))
            if len(pending) == 2:
                handle, written = pending.pop(0)
                right, _ = consumer.ask("check_random", handle, written, "cuda:0")
                assert right, f"lease {decode(handle, KVHandle).lease} was read before or after its time"
