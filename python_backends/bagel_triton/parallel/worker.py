"""A rank other than 0: ``python -m bagel_triton.parallel.worker`` with a socket as standard input, or a Ray actor.

Its process ends when the socket does. An error ends it as well, and with it the stage: see
:mod:`bagel_triton.parallel.group`.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import sys
import threading
from datetime import timedelta
from typing import NoReturn

import msgspec
import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from bagel_triton.deploy.topology import DECODER, THINKER
from bagel_triton.kv.store import PagedStep, WorkspaceStep, new_store
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.device import Placement, resolve
from bagel_triton.parallel import messages
from bagel_triton.parallel.launch import LOOPBACK
from bagel_triton.parallel.layout import PoolLayout, Run
from bagel_triton.parallel.messages import (
    Arrange,
    Attach,
    Collect,
    Copy,
    Decode,
    Forward,
    Free,
    Keep,
    Meet,
    Message,
    Ready,
    Start,
)
from bagel_triton.parallel.patches import RankDecoder
from bagel_triton.parallel.rank import Arranged, RankModel, join, receive, selftest, send
from bagel_triton.parallel.sizes import Sizes
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.sharing import shared_weights

log = logging.getLogger(__name__)


class Worker:
    """A rank's stores and the layout of its forwards."""

    def __init__(self, model: RankModel) -> None:
        self._model = model
        self._stores: dict[int, Tensor] = {}
        self._cache: Tensor | None = None
        self._arranged: tuple[Arranged, bool] | None = None

    @torch.inference_mode()
    def handle(self, message: Message) -> None:
        """Do what a message says."""
        if isinstance(message, Attach):
            heads = self._model.heads
            geometry = msgspec.structs.replace(message.geometry, kv_heads=heads.stop - heads.start)
            self._cache = new_store(geometry, message.slots, self._model.device)
        elif isinstance(message, Copy):
            self._slots(message.target).copy_(self._slots(message.source))
        elif isinstance(message, Collect):
            send(torch.cat([self._slots(run) for run in message.slots], dim=2), 0)
        elif isinstance(message, Keep):
            self._keep(message)
        elif isinstance(message, Arrange):
            self._arrange(message)
        elif isinstance(message, Forward):
            self._compute()
        elif isinstance(message, Free):
            self._arranged = None
            for number in message.stores:
                del self._stores[number]
        else:
            raise ValueError(f"{type(message).__name__} is no message for a rank that has started")

    def _slots(self, run: Run) -> Tensor:
        """Keys and values at adjacent slots of the KV cache, a view."""
        assert self._cache is not None, "the KV cache is there before it is used"
        return self._cache[:, :, slice(*run)]

    def _keep(self, message: Keep) -> None:
        store = self._empty(*message.shape)
        past = self._empty(*message.shape[:2], message.past, *message.shape[3:])
        store[:, :, : message.past] = receive(past, 0)
        self._stores[message.store] = store

    def _arrange(self, message: Arrange) -> None:
        layout = message.layout
        rows = self._model.rows(layout)
        cos, sin = receive(self._empty(2, rows, 1, self._model.config.head_dim), 0)
        if isinstance(layout, PoolLayout):
            assert self._cache is not None, "the KV cache is there before it is used"
            kv: PagedStep | WorkspaceStep = layout.kv(self._cache)
        else:
            kv = layout.kv(self._stores)
        self._arranged = self._model.arranged(layout, cos, sin, kv), message.returns

    def _compute(self) -> None:
        assert self._arranged is not None, "a layout comes before its forwards"
        arranged, returns = self._arranged
        embeddings = receive(self._empty(arranged.batch.tokens, self._model.config.hidden_size), 0)
        hidden = self._model.forward(embeddings, arranged)
        if returns:
            send(hidden[arranged.wanted], 0)

    def _empty(self, *sides: int) -> Tensor:
        return torch.empty(sides, dtype=self._model.dtype, device=self._model.device)


def load(start: Start, place: Placement) -> tuple[Bagel | None, Autoencoder | None]:
    """The whole transformer and the autoencoder, where the rank has them.

    A tensor-parallel rank keeps its part of the transformer later.
    """
    config = start.config
    weights = shared_weights(config.shm_prefix, place.torch_device) if start.share else None
    checkpoint = Checkpoint(config.checkpoint, config.adapter, config.load, config.max_generated_image_size)
    model = autoencoder = None
    if start.stage != DECODER:
        stage = config.thinker if start.stage == THINKER else config.dit
        cut = Sizes.of(config, start.stage).cut
        model = checkpoint.load_bagel(place.torch_device, place.torch_dtype, weights, stage.quantization, cut=cut)
    if start.decodes:
        autoencoder = checkpoint.load_autoencoder(place.torch_device, torch.float32, weights)
    return model, autoencoder


def follow(connection: socket.socket, host: str) -> NoReturn:
    """Follow rank 0, at the other end of ``connection``, until it ends; ``host`` is this rank's own address."""
    waiting: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def take() -> None:
        status = 1
        try:
            while (message := messages.read(connection)) is not None:
                waiting.put(message)
            status = 0
        except Exception:
            log.exception("a message of rank 0 cannot be read")
        finally:
            os._exit(status)  # also while a forward waits for another rank

    threading.Thread(target=take, name="rank-0", daemon=True).start()
    start = waiting.get()
    assert isinstance(start, Start), "the first message"
    torch.set_num_threads(start.threads)
    place = resolve(start.device, start.config.dtype)
    device = place.torch_device
    model, autoencoder = load(start, place)
    messages.write(connection, Ready())
    meeting = waiting.get()
    assert isinstance(meeting, Meet), "the second message"
    sizes, timeout_s = Sizes.of(start.config, start.stage), start.config.bagel.stage_timeout_s
    store = TCPStore(meeting.host, meeting.port, sizes.ranks, timeout=timedelta(seconds=timeout_s))
    join(store, host, device, start.rank, sizes.ranks, timeout_s)
    selftest(device)
    pool = ThreadPool.of(device)
    pool.use_caller_thread()
    worker = None if model is None else Worker(RankModel(model, sizes, pool, device))
    ranks = start.config.vae_decode.patch_parallel_size
    decoder = None if autoencoder is None else RankDecoder(autoencoder.decoder, ranks, pool)
    while True:
        message = waiting.get()
        if isinstance(message, Decode):
            assert decoder is not None, "this rank decodes"
            with torch.inference_mode():
                decoder.decode(receive(torch.empty(message.shape, device=device), 0))
        else:
            assert worker is not None, "this rank has a transformer"
            worker.handle(message)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    follow(socket.socket(fileno=sys.stdin.fileno()), LOOPBACK)
