"""``mooncake`` between two processes whose contexts are on a GPU, by way of the host's memory."""

from __future__ import annotations

import os
import secrets

import pytest
import torch

from bagel_triton.protocol.messages import KVGeometry
from tests.support.connectors import Ends, require_mooncake
from tests.support.kv_process import peer

DEVICE = "cuda:0"
BAGEL = KVGeometry(layers=28, kv_heads=4, head_dim=128, block_tokens=16, dtype="bfloat16")
TOKENS = 1024

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's contexts need a CUDA device; there is none here"),
]


def test_contexts_arrive_whole_while_the_blocks_of_earlier_ones_are_written_again() -> None:
    require_mooncake()
    prefix = f"bagel_triton_test_{os.getpid()}_{secrets.token_hex(4)}"
    ends = Ends("mooncake", prefix, 3 * TOKENS // BAGEL.block_tokens, BAGEL, DEVICE)
    with peer(ends.producer) as producer, peer(ends.consumer) as consumer:
        pending: list[tuple[bytes, int]] = []
        for seed in range(20):
            producer.ask("reclaim")
            pending.append((producer.ask("lend_random", TOKENS, seed), seed))
            if len(pending) == 2:
                handle, written = pending.pop(0)
                right, _ = consumer.ask("check_random", handle, written, DEVICE)
                assert right, f"context {written} is not what was lent"
