"""Ranks of a stage as Ray actors in a placement group, on this host and others.

Ray chooses where a rank runs and starts it. The rank then connects to rank 0, and its messages and tensors are those
of a rank on this host. The placement group belongs to rank 0's process: Ray removes it, and the actors, when that
process ends, however that comes.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bagel_triton
from bagel_triton.parallel.launch import hang_up
from bagel_triton.parallel.messages import receive_exactly
from bagel_triton.parallel.rank import listen

KEY_BYTES = 32
PLACEMENT_S = 60.0  # until the cluster has room for the ranks
START_S = 300.0  # until an actor has started and connected
POLL_S = 1.0


class RankActor:
    """The actor: a rank that follows rank 0 until the actor ends."""

    def place(self) -> tuple[str, str, str]:
        """Its node's id and address, and the version of this package there."""
        import ray

        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), bagel_triton.__version__

    def follow(self, address: tuple[str, int], key: bytes, number: int) -> None:
        """Connect to rank 0 at ``address`` as rank ``number``, and do what it says."""
        import ray

        from bagel_triton.parallel.worker import follow

        connection = socket.create_connection(address, START_S)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(key + number.to_bytes(4))
        follow(connection, ray.util.get_node_ip_address())


class ActorRank:
    """A rank that is a Ray actor; its connection comes later than it."""

    connection: socket.socket

    def __init__(self, actor: Any, group: Any, node: str, host: str, is_here: bool) -> None:
        self._actor, self._group, self._node, self._host, self.is_here = actor, group, node, host, is_here
        self._done: Any = None
        self._ended = threading.Event()

    def __str__(self) -> str:
        return f"a Ray actor on node {self._node[:8]}, {self._host}"

    def follow(self, address: tuple[str, int], key: bytes, number: int) -> None:
        """Let it connect to ``address``."""
        self._done = self._actor.follow.remote(address, key, number)

    def check(self) -> None:
        """Fail where it has ended.

        Raises:
            RuntimeError: says how.
        """
        import ray

        if ray.wait([self._done], timeout=0)[0]:
            raise RuntimeError(f"worker_backend=ray: {self} {self.wait()}")

    def wait(self) -> str:
        """Wait for its end; returns what Ray says of it."""
        import ray

        try:
            ray.get(self._done)
        except Exception as error:  # its own, or what Ray knows of its death
            return f"has ended: {error}"
        finally:
            self._ended.set()
        return "has ended"

    def close(self) -> None:
        """Remove the placement group, and with it all of its actors."""
        from ray.util import remove_placement_group

        with contextlib.suppress(Exception):  # Ray has lost its cluster, and the actors with it
            remove_placement_group(self._group)
        if hasattr(self, "connection"):
            hang_up(self.connection)

    def reap(self, timeout_s: float) -> None:
        """Wait until Ray knows that it has ended."""
        self._ended.wait(timeout_s)


def start_actors(address: str, count: int, gpus: bool) -> tuple[str, Sequence[ActorRank]]:
    """Start ``count`` ranks in the Ray cluster at ``address``, each on a CPU of its own, or with ``gpus`` a GPU.

    Returns this host's address in the cluster, and the ranks.

    Raises:
        RuntimeError: there is no such cluster, it has no room, or an actor cannot start there.
    """
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    _connect(address)
    host, node = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
    kind = "GPU" if gpus else "CPU"
    bundles = [{"CPU": 1.0} | ({"GPU": 1.0} if gpus else {})] * count
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(PLACEMENT_S):
            free = ray.available_resources().get(kind, 0.0)
            raise RuntimeError(
                f"worker_backend=ray: the cluster has no room for {count} ranks of one {kind} each within "
                f"{PLACEMENT_S:g} s; free are {free:g} {kind}s"
            )
        remote = ray.remote(num_cpus=1, num_gpus=int(gpus), max_restarts=0)(RankActor)
        places = [PlacementGroupSchedulingStrategy(group, number) for number in range(count)]
        actors = [remote.options(scheduling_strategy=place).remote() for place in places]
        try:
            found = ray.get([actor.place.remote() for actor in actors], timeout=START_S)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"worker_backend=ray: a rank does not start: {error}") from error
        ranks = []
        for actor, (its_node, its_host, version) in zip(actors, found, strict=True):
            if version != bagel_triton.__version__:
                raise RuntimeError(
                    f"worker_backend=ray: node {its_node[:8]}, {its_host}, has bagel-triton {version}; "
                    f"allowed: {bagel_triton.__version__}, as here"
                )
            ranks.append(ActorRank(actor, group, its_node, its_host, its_node == node))
        _accept(host, ranks)
    except BaseException:
        remove_placement_group(group)
        raise
    return host, ranks


def _connect(address: str) -> None:
    """Join the cluster, once in a process."""
    import ray

    if ray.is_initialized():
        return
    try:
        with ThreadPoolExecutor(1) as pool:  # in the main thread it would take the signals of Triton's process
            pool.submit(ray.init, address=address, configure_logging=False).result()
    except (ConnectionError, ValueError) as error:  # also: the address is not that of this host's cluster
        raise RuntimeError(
            f"worker_backend=ray: no Ray cluster of this host at ray_address={address}: {error}; start one on each "
            "host: ray start --head, then ray start --address HOST:PORT"
        ) from error


def _accept(host: str, ranks: Sequence[ActorRank]) -> None:
    """Have every rank connect to ``host``; a stranger, without the key, is turned away."""
    key = secrets.token_bytes(KEY_BYTES)
    by_number = dict(enumerate(ranks, start=1))
    with listen(host) as listening:
        for number, rank in by_number.items():
            rank.follow(listening.getsockname(), key, number)
        listening.settimeout(POLL_S)
        give_up_at = time.monotonic() + START_S
        while by_number:
            for rank in by_number.values():
                rank.check()
            if time.monotonic() > give_up_at:
                missing = ", ".join(str(rank) for rank in by_number.values())
                raise RuntimeError(f"worker_backend=ray: not connected to {host} within {START_S:g} s: {missing}")
            with contextlib.suppress(TimeoutError):
                connection, _ = listening.accept()
                connection.settimeout(POLL_S)
                said = receive_exactly(connection, KEY_BYTES + 4) or b""
                number = int.from_bytes(said[KEY_BYTES:])
                if not hmac.compare_digest(said[:KEY_BYTES], key) or number not in by_number:
                    connection.close()
                    continue
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                by_number.pop(number).connection = connection
