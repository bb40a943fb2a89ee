"""``bagel``'s calls of the other models of its server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from bagel_triton.deploy.topology import BAGEL
from bagel_triton.ipc.liveness import Announcement
from bagel_triton.protocol.errors import Cancelled, Overloaded
from bagel_triton.protocol.messages import SchedulingParams, decode
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.triton.stages import EXPANDER_CALLS, StageConnections, TritonStages
from tests.support.waiting import soon

PREFIX = "bagel_test"


class Models:
    """Every model of a server: a call waits for ``go``, then is refused."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.go = threading.Event()

    def bls(self, model: str) -> Models:
        return self

    def __call__(
        self, arrays: Arrays, outputs: Sequence[str], request_id: str, headers: Mapping[str, str] | None = None
    ) -> Arrays:
        self.called.append(request_id)
        self.go.wait(30)
        raise Overloaded("full")


def test_a_request_that_ended_while_it_was_queued_for_planning_is_not_planned(tmp_path: Path) -> None:
    models, announcement = Models(), Announcement(PREFIX, "bagel", tmp_path)
    connections = StageConnections(BAGEL.models, models.bls, announcement, PREFIX, None)
    try:
        running = [f"running {number}" for number in range(EXPANDER_CALLS)]
        for name in running:
            TritonStages(connections, name, {}).expand({})
        assert soon(lambda: len(models.called) == EXPANDER_CALLS)
        left = TritonStages(connections, "left", {}).expand({})
        with pytest.raises(Cancelled):
            list(left.follow(lambda: True, 5.0))
        last = TritonStages(connections, "last", {}).expand({})
        models.go.set()
        assert isinstance(last.done.exception(10), Overloaded)
        assert sorted(models.called) == ["last", *running]
    finally:
        models.go.set()
        connections.close(1.0)
        announcement.withdraw()


def test_the_decoder_gets_the_requests_priority_and_deadline(tmp_path: Path) -> None:
    announcement, submitted = Announcement(PREFIX, "bagel", tmp_path), queue.SimpleQueue[Arrays]()

    def call(
        arrays: Arrays, outputs: Sequence[str], request_id: str, headers: Mapping[str, str] | None = None
    ) -> Arrays:
        submitted.put(arrays)
        raise Overloaded("full")

    connections = StageConnections(BAGEL.models, lambda model: call, announcement, PREFIX, None)
    scheduling = SchedulingParams(priority=-7, deadline=1e9)
    latents = {"latents": np.zeros((4, 2), np.float32), "latent_grid": np.array([2, 2], np.int32)}
    try:
        TritonStages(connections, "r", {}).decode(latents, "r", scheduling)
        sent = submitted.get(timeout=10)
        assert decode(bytes(sent["scheduling"].item()), SchedulingParams) == scheduling
        np.testing.assert_array_equal(sent["latent_grid"], [2, 2])
    finally:
        connections.close(1.0)
        announcement.withdraw()
