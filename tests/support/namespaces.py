"""Hosts of a test: network namespaces on one switch, any of which can be cut off."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

NETWORK = "10.203.77"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    """A namespace; what runs behind ``prefix`` is in it."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def connect(self, up: bool) -> None:
        """Plug the cable in or out: what is sent meanwhile is lost, and no connection is closed."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up" if up else "down")


@contextlib.contextmanager
def hosts(names: Sequence[str]) -> Iterator[list[Host]]:
    """A host for each of ``names``, and this process on the same switch; the test is skipped without the rights."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (iproute2)")
    mark = f"bt{os.getpid() % 100_000}"
    made = [Host(f"{mark}_{name}", f"{NETWORK}.{number}") for number, name in enumerate(names, 2)]
    switch = f"{mark}_switch"
    with contextlib.ExitStack() as undone:
        for namespace in (switch, *(host.namespace for host in made)):
            try:
                _ip("netns", "add", namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            undone.callback(_ip, "netns", "del", namespace)
        # The switch has a namespace of its own: a firewall of this machine may drop what crosses a bridge.
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        ports = [(("-n", host.namespace), "eth0", host.address) for host in made]
        for number, (where, device, address) in enumerate([*ports, ((), mark, f"{NETWORK}.1")]):
            _ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", f"{mark}p")
            target = where[1] if where else str(os.getpid())
            _ip("-n", switch, "link", "set", f"{mark}p", "netns", target)
            _ip(*where, "link", "set", f"{mark}p", "name", device)
            _ip(*where, "addr", "add", f"{address}/24", "dev", device)
            _ip(*where, "link", "set", device, "up")
            _ip("-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
        for host in made:
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield made
