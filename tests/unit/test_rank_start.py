"""The start and the end of a group of ranks, whose other ranks are played here."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bagel_triton.deploy.config import DeployConfig, DitConfig
from bagel_triton.deploy.topology import DIT
from bagel_triton.parallel import group, messages
from bagel_triton.parallel.group import RankGroup
from bagel_triton.parallel.launch import LOOPBACK, RankProcess, hang_up
from bagel_triton.parallel.messages import Meet, Ready
from bagel_triton.parallel.rank import join


class Dying:
    """A rank that has its weights and ends as the ranks meet."""

    is_here = True

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair()
        self._ended = threading.Event()
        threading.Thread(target=self._play, args=(theirs,)).start()

    start = classmethod(lambda cls: cls())

    def _play(self, theirs: socket.socket) -> None:
        with theirs:
            messages.read(theirs)
            messages.write(theirs, Ready())
            assert isinstance(messages.read(theirs), Meet)
        self._ended.set()

    def wait(self) -> str:
        self._ended.wait()
        return "has ended"

    def close(self) -> None:
        hang_up(self.connection)

    def reap(self, timeout_s: float) -> None: ...


def test_a_rank_that_ends_while_the_ranks_meet_fails_the_start(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: gloo would wait for the stage's time-out, and NCCL for ever. The next start is as the first."""
    monkeypatch.setattr(group, "RankProcess", Dying)
    config = DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32", dit=DitConfig(cfg_parallel_size=2))
    with pytest.raises(RuntimeError, match="a rank of the dit has ended"):
        RankGroup.start(config, DIT, None, share=False)
    join(dist.HashStore(), LOOPBACK, torch.device("cpu"), 0, 1, 30.0)
    assert dist.distributed_c10d._get_default_group().group_name == "0"  # that of new processes
    dist.destroy_process_group()


def test_sockets_of_ranks_are_on_one_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would take the name for a prefix of others."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    join(dist.HashStore(), LOOPBACK, torch.device("cpu"), 0, 1, 30.0)
    dist.destroy_process_group()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")


def test_a_rank_that_cannot_read_a_message_ends() -> None:
    """Rank 0 would wait for it for ever."""
    rank = RankProcess.start()
    rank.connection.sendall(b"\x01\x00\x00\x00\xc1")
    assert rank.wait() == "has ended with status 1"
    rank.close()
