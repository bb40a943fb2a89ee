"""A Ray cluster of two nodes on this machine's loopback: ``python -m tests.support.ray_cluster CPUS CPUS``.

It prints the cluster's address, and stops at the end of its standard input.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.killing import arguments, descendants

# Ray listens on the loopback interface alone where it takes this machine for one that has no clusters.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
STORE_BYTES = 80 << 20  # the least that Ray takes, about


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    address: str
    process: int

    @property
    def actors(self) -> list[list[int]]:
        """The processes of ranks on each node, the fewest first."""
        nodes = [pid for pid in descendants(self.process) if "/raylet/raylet" in arguments(pid)]
        return sorted(([pid for pid in descendants(node) if "RankActor" in arguments(pid)] for node in nodes), key=len)


@contextlib.contextmanager
def cluster(head: int, other: int) -> Iterator[Cluster]:
    """A cluster that lasts as long as the context, with so many CPUs on the node that drivers join, and on the other.

    Its files are in a folder of their own.
    """
    command = [sys.executable, "-m", "tests.support.ray_cluster", str(head), str(other)]
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, **ON_LOOPBACK, "RAY_TMPDIR": folder}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = next((line.split()[1] for line in process.stdout if line.startswith("ADDRESS ")), None)
            assert address is not None, "the cluster did not start"
            yield Cluster(address, process.pid)
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(60)


def main() -> None:
    """Start the nodes, and stop them when the input ends."""
    from ray import cluster_utils

    nodes = cluster_utils.Cluster()
    for cpus in map(int, sys.argv[1:]):
        nodes.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES, include_dashboard=False)
    print(f"ADDRESS {nodes.address}", flush=True)
    sys.stdin.read()
    nodes.shutdown()


if __name__ == "__main__":
    main()
