"""Choice among the servers of a stage: accounts of their work, and policies, without any connection."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from bagel_triton.deploy.config import Policy
from bagel_triton.protocol.errors import StageUnavailable

State = Literal["ready", "draining", "down"]


@dataclass(eq=False)
class Assignment:
    """A request's work at a server, in latent tokens times steps, until it is given back."""

    address: str
    work: int


@dataclass
class _Member:
    state: State
    elsewhere: int = 0  # work that other callers have there
    assigned: set[Assignment] = field(default_factory=set)

    @property
    def work(self) -> int:
        return self.elsewhere + sum(one.work for one in self.assigned)


@dataclass(frozen=True)
class MemberStatus:
    """A server as ``/metrics`` shows it; ``requests`` are this caller's own."""

    state: State
    requests: int


class Balancer:
    """Shares requests among servers. Every method is safe from any thread.

    A server that has not been reported on yet counts as ready: the first call would show otherwise.

    Args:
        policy: how one of the servers that are in is chosen.
        choice: draws from equal ones; a test's or a simulation's own.
    """

    def __init__(
        self,
        policy: Policy = "least-outstanding-tokens",
        choice: Callable[[list[str]], str] = random.choice,
    ) -> None:
        self._policy, self._choice = policy, choice
        self._members: dict[str, _Member] = {}
        self._turn = 0
        self._lock = threading.Lock()

    def set_members(self, addresses: Iterable[str]) -> None:
        """Take these servers and no others; requests at one that left go on."""
        with self._lock:
            self._members = {address: self._members.get(address) or _Member("ready") for address in addresses}

    def report(self, address: str, state: State, elsewhere: int = 0) -> None:
        """Note what a check of a server found; ``elsewhere`` is the work of other callers there."""
        with self._lock:
            if (member := self._members.get(address)) is not None:
                member.state, member.elsewhere = state, elsewhere

    def take(self, work: int, avoid: Collection[str] = ()) -> Assignment:
        """Assign ``work`` to a server that is ready and not among ``avoid``.

        Raises:
            StageUnavailable: there is none; says the state of each.
        """
        with self._lock:
            ready = self._ready(avoid)
            if not ready:
                states = ", ".join(f"{address} is {member.state}" for address, member in self._members.items())
                raise StageUnavailable(f"no server of stage 1 takes requests: {states or 'none is known'}")
            assignment = Assignment(self._chosen(ready), work)
            self._members[assignment.address].assigned.add(assignment)
            return assignment

    def give_back(self, assignment: Assignment) -> None:
        """Note that the work has ended; a second time changes nothing."""
        with self._lock:
            if (member := self._members.get(assignment.address)) is not None:
                member.assigned.discard(assignment)

    def has_other(self, avoid: Collection[str]) -> bool:
        """Whether a server that is not among ``avoid`` is ready."""
        with self._lock:
            return bool(self._ready(avoid))

    def state(self, address: str) -> State:
        """The state at the last check; "down" for a server that is no member."""
        with self._lock:
            member = self._members.get(address)
            return "down" if member is None else member.state

    def statuses(self) -> dict[str, MemberStatus]:
        """Every server's state, by address."""
        with self._lock:
            return {
                address: MemberStatus(member.state, len(member.assigned)) for address, member in self._members.items()
            }

    def _ready(self, avoid: Collection[str]) -> list[str]:
        return [name for name, member in self._members.items() if member.state == "ready" and name not in avoid]

    def _chosen(self, ready: list[str]) -> str:
        if self._policy == "random":
            return self._choice(ready)
        if self._policy == "round-robin":
            self._turn += 1
            return ready[self._turn % len(ready)]
        by_work = self._policy == "least-outstanding-tokens"

        def load(address: str) -> int:
            member = self._members[address]
            return member.work if by_work else len(member.assigned)

        least = min(map(load, ready))
        return self._choice([address for address in ready if load(address) == least])
