"""Which server of stage 1 gets a request: the policies, the accounts, and the servers that are out."""

from __future__ import annotations

from collections import Counter

import pytest

from bagel_triton.deploy.config import POLICIES, Policy
from bagel_triton.pipeline.balancer import Balancer, MemberStatus
from bagel_triton.protocol.errors import StageUnavailable


def balancer(policy: Policy = "least-outstanding-tokens", members: str = "abc") -> Balancer:
    made = Balancer(policy, choice=lambda equal: equal[0])
    made.set_members(members)
    return made


def test_work_goes_where_least_is_outstanding() -> None:
    shared = balancer()
    large = shared.take(100)
    small = [shared.take(10) for _ in range(6)]
    assert (large.address, Counter(one.address for one in small)) == ("a", Counter(b=3, c=3))
    shared.give_back(large)
    shared.give_back(large)  # a second time changes nothing
    assert shared.take(1).address == "a"


def test_the_work_of_other_callers_counts() -> None:
    shared = balancer()
    shared.report("a", "ready", elsewhere=50)
    shared.report("b", "ready", elsewhere=20)
    assert [shared.take(30).address for _ in range(4)] == ["c", "b", "c", "a"]


def test_the_shortest_queue_counts_requests_whatever_they_cost() -> None:
    shared = balancer("least-queue-length")
    assert [shared.take(work).address for work in (100, 1, 1, 100)] == ["a", "b", "c", "a"]


def test_round_robin_takes_turns() -> None:
    shared = balancer("round-robin")
    assert Counter(shared.take(1).address for _ in range(9)) == Counter(a=3, b=3, c=3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_server_that_is_out_or_to_be_avoided_gets_nothing(policy: Policy) -> None:
    shared = balancer(policy, "abcd")
    shared.report("a", "down")
    shared.report("b", "draining")
    assert {shared.take(1, avoid=("c",)).address for _ in range(5)} == {"d"}
    assert shared.has_other(("d",))
    assert not shared.has_other(("c", "d"))
    shared.report("a", "ready")
    assert shared.take(1, avoid=("c", "d")).address == "a"


def test_with_every_server_out_the_error_says_how() -> None:
    shared = balancer(members="ab")
    shared.report("a", "down")
    shared.report("b", "draining")
    with pytest.raises(StageUnavailable, match="no server of stage 1 takes requests: a is down, b is draining"):
        shared.take(1)


def test_servers_join_and_leave_with_their_accounts() -> None:
    shared = balancer(members="a")
    first = shared.take(5)
    shared.set_members("ab")
    assert shared.take(1).address == "b"
    shared.set_members("b")
    assert (shared.state("a"), shared.statuses()) == ("down", {"b": MemberStatus("ready", 1)})
    shared.give_back(first)  # of a server that has left
