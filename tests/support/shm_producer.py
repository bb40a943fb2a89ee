"""A producer in a process of its own, told what to do through a pipe."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from bagel_triton.kv.block_pool import KVSequence
from bagel_triton.kv.connectors.shm import ShmProducer
from bagel_triton.protocol.messages import Branch, KVGeometry, encode
from tests.support.kv import append


def produce(pipe: Connection, prefix: str, geometry: KVGeometry) -> None:
    """Lend two contexts of scattered blocks, then ``reclaim``, ``close`` or ``die`` as told."""
    producer = ShmProducer(geometry, 16, prefix)
    contexts = [KVSequence(producer.pool), KVSequence(producer.pool)]
    for start in range(0, 10, 2):
        for number, context in enumerate(contexts):
            append(producer.pool, context, range(100 * number + start, 100 * number + start + 2))
    for context in contexts:
        pipe.send_bytes(encode(producer.leases.publish("r", Branch.GEN, context, 60.0)))
    while True:
        match pipe.recv():
            case "reclaim":
                pipe.send(producer.leases.reclaim())
            case "close":
                producer.close()
                pipe.send(None)
            case "die":
                os._exit(9)
            case "end":
                return
