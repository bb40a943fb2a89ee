"""A discrete-event simulation of many GPUs: how long requests take, by load and by how they are routed.

    python -m bench.simulate                # 1000 GPUs; the table of docs/scaling.md
    python -m bench.simulate --gpus 64 --cell 8 --load 0.8

A *cell* is one server of stage 0 and its servers of stage 1, all on GPUs of their own; an HTTP balancer stands before
the cells. Inside a cell the package's own ``Balancer`` chooses, so what is simulated is the code that runs. Requests
come at random (Poisson). A DiT denoises up to ``--batch`` images together and shares its time among them, as the time
of a step is proportional to its tokens; the others wait in order. The service times are those **calculated** for an
H100 in docs/benchmarks.md, and read from there; no GPU has measured them. ``--step-ms`` and ``--token-ms`` replace
them.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bagel_triton.deploy.config import POLICIES, Policy
from bagel_triton.pipeline.balancer import Assignment, Balancer

STEPS = 50
GUIDED = 0.82  # of the steps: t > 0.4 with a shift of 3; in the others one branch of two is evaluated
SIDES = (512, 1024)
TEXTS = 32  # that a full thinker decodes at a time
BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
THOUGHT_TOKENS = 300
OUTER: tuple[Policy, ...] = ("random", "round-robin", "least-queue-length")


def calculated(row: str, column: str = "H100, ms") -> float:
    """Milliseconds of the step ``row`` in the benchmarks' table for a GPU."""
    tables = [line.strip("| ").split(" | ") for line in BENCHMARKS.read_text().splitlines() if line.startswith("| ")]
    at = next(titles.index(column) for titles in tables if titles[0] == "step" and column in titles)
    return float(next(cells[at] for cells in tables if cells[0] == row))


@dataclass(frozen=True)
class Kind:
    """Requests of one kind: their share of all, their seconds on an idle thinker and DiT, and their size."""

    share: float
    thinker_s: float
    dit_s: float
    work: int


def kinds(step_ms: dict[int, float], token_ms: float, thinking: float) -> list[Kind]:
    """Half of the images 512x512 and half 1024x1024; a share of ``thinking`` is thought about first."""
    found = []
    for side, milliseconds in step_ms.items():
        dit_s = (STEPS - 1) * milliseconds / 1e3 * (GUIDED + (1 - GUIDED) / 2)
        for share, tokens in ((thinking, THOUGHT_TOKENS), (1 - thinking, 1)):
            work = (side // 16) ** 2 * STEPS
            found.append(Kind(share / len(step_ms), tokens * token_ms / 1e3, dit_s, work))
    return found


@dataclass(eq=False)
class Request:
    """A request on its way; ``ends`` is called when it is done."""

    kind: Kind
    came: float
    ends: Callable[[float], None] = field(default=lambda now: None)


class Shared:
    """A server that shares its time among up to ``batch`` requests; the others wait in the order in which they came.

    ``_virtual`` is the time that each active request has been given so far, so one ends when that reaches the value
    at which it joined plus its own time.
    """

    def __init__(self, clock: Clock, batch: int) -> None:
        self._clock, self._batch = clock, batch
        self._virtual = self._updated = self.busy_s = 0.0
        self._active: list[tuple[float, int, Callable[[float], None]]] = []
        self._waiting: deque[tuple[float, Callable[[float], None]]] = deque()
        self._number = self._version = 0

    def serve(self, seconds: float, done: Callable[[float], None]) -> None:
        """Call ``done`` once ``seconds`` of this server's time have been spent on a request."""
        self._advance()
        self._waiting.append((seconds, done))
        self._admit()

    def _advance(self) -> None:
        now = self._clock.now
        if self._active:
            self._virtual += (now - self._updated) / len(self._active)
            self.busy_s += now - self._updated
        self._updated = now

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._batch:
            seconds, done = self._waiting.popleft()
            self._number += 1
            heapq.heappush(self._active, (self._virtual + seconds, self._number, done))
        self._version += 1
        if self._active:
            version, left = self._version, (self._active[0][0] - self._virtual) * len(self._active)
            self._clock.after(max(0.0, left), lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:  # another request came or left meanwhile
            return
        self._advance()
        _, _, done = heapq.heappop(self._active)
        self._admit()
        done(self._clock.now)


class Clock:
    """Runs events in the order of their time."""

    def __init__(self) -> None:
        self.now, self._number = 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Run ``event`` in so many seconds."""
        self._number += 1
        heapq.heappush(self._events, (self.now + seconds, self._number, event))

    def run(self) -> None:
        """Run until no event is left."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


class Cell:
    """A thinker, and the DiTs that it calls."""

    def __init__(self, clock: Clock, dits: int, batch: int, policy: Policy, draw: random.Random) -> None:
        self._thinker = Shared(clock, 64)
        self.dits = {f"dit{number}": Shared(clock, batch) for number in range(dits)}
        self._balancer = Balancer(policy, draw.choice)
        self._balancer.set_members(self.dits)

    def serve(self, request: Request) -> None:
        """Follow a request through both stages."""
        self._thinker.serve(request.kind.thinker_s, lambda _: self._denoise(request))

    def _denoise(self, request: Request) -> None:
        assignment = self._balancer.take(request.kind.work)

        def done(now: float) -> None:
            self._balancer.give_back(assignment)
            request.ends(now)

        self.dits[assignment.address].serve(request.kind.dit_s, done)


@dataclass(frozen=True)
class Outcome:
    """Seconds of each request, sorted; the mean of their ratios to the time alone; the busy share of each DiT."""

    seconds: list[float]
    slowdown: float
    busy: list[float]

    def percentile(self, percent: float) -> float:
        """The time within which ``percent`` of the requests were done."""
        return self.seconds[min(len(self.seconds) - 1, int(len(self.seconds) * percent / 100))]


def simulate(
    every: Sequence[Kind],
    *,
    cells: int,
    dits: int,
    batch: int,
    load: float,
    outer: Policy,
    policy: Policy,
    requests: int,
    seed: int = 0,
) -> Outcome:
    """Send ``requests`` at ``load``, a share of what all DiTs can do, to ``cells`` of ``dits`` DiTs each.

    The first tenth of the requests, which find idle servers, is not counted.
    """
    draw, clock = random.Random(seed), Clock()
    places = {f"cell{number}": Cell(clock, dits, batch, policy, draw) for number in range(cells)}
    balancer = Balancer(outer, draw.choice)
    balancer.set_members(places)
    mean_s = sum(kind.share * kind.dit_s for kind in every)
    rate = load * cells * dits / mean_s
    seconds: list[float] = []
    slowdowns: list[float] = []

    def arrivals() -> Iterator[tuple[Kind, float]]:
        for kind in draw.choices(every, [kind.share for kind in every], k=requests):
            yield kind, draw.expovariate(rate)

    coming = iter(arrivals())

    def arrive(number: int, kind: Kind) -> None:
        assignment: Assignment = balancer.take(1)
        began = clock.now

        def ends(now: float) -> None:
            balancer.give_back(assignment)
            if number >= requests // 10:
                seconds.append(now - began)
                slowdowns.append((now - began) / (kind.thinker_s + kind.dit_s))

        places[assignment.address].serve(Request(kind, began, ends))
        follow(number + 1)

    def follow(number: int) -> None:
        if (following := next(coming, None)) is not None:
            kind, wait_s = following
            clock.after(wait_s, lambda: arrive(number, kind))

    follow(0)
    clock.run()
    busy = [dit.busy_s / clock.now for place in places.values() for dit in place.dits.values()]
    return Outcome(sorted(seconds), statistics.fmean(slowdowns), sorted(busy))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each load and each pair of policies."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", type=int, default=1000, help="in all (%(default)s)")
    parser.add_argument("--cell", type=int, default=25, help="GPUs of a cell, one of them a thinker's (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="max_num_seqs of a DiT (%(default)s)")
    parser.add_argument("--load", type=float, nargs="+", default=[0.6, 0.8, 0.9], help="shares of the DiTs' capacity")
    parser.add_argument("--thinking", type=float, default=0.2, help="share of requests with a thought (%(default)s)")
    parser.add_argument("--requests", type=int, default=40_000, help="of each row (%(default)s)")
    steps = [calculated(f"guided step, {side}") for side in SIDES]
    token = calculated(f"decode, {TEXTS} texts") / TEXTS
    parser.add_argument("--step-ms", type=float, nargs=2, default=steps, metavar=("512", "1024"))
    parser.add_argument("--token-ms", type=float, default=token, help="of a thinker that is full")
    args = parser.parse_args(arguments)
    cells, dits = args.gpus // args.cell, args.cell - 1
    if cells < 1 or dits < 1:
        parser.error(f"--gpus={args.gpus} --cell={args.cell} is not allowed; allowed: 2 <= cell <= gpus")
    every = kinds(dict(zip(SIDES, args.step_ms, strict=True)), args.token_ms, args.thinking)
    mean_s = sum(kind.share * kind.dit_s for kind in every)
    print(f"{cells} cells of 1 thinker and {dits} DiTs; an image takes {mean_s:.2f} s of a DiT, on average\n")
    print("| load | images/s | before the cells | in a cell | slowdown | p95, s | p99, s | busiest DiT | idlest |")
    print("|---|---|---|---|---|---|---|---|---|")
    for load in args.load:
        for outer, policy in _pairs():
            found = simulate(
                every,
                cells=cells,
                dits=dits,
                batch=args.batch,
                load=load,
                outer=outer,
                policy=policy,
                requests=args.requests,
            )
            times = " | ".join(f"{found.percentile(percent):.1f}" for percent in (95, 99))
            print(
                f"| {load:.0%} | {load * cells * dits / mean_s:.0f} | {outer} | {policy} "
                f"| {found.slowdown:.2f} | {times} | {found.busy[-1]:.0%} | {found.busy[0]:.0%} |",
                flush=True,
            )
    return 0


def _pairs() -> list[tuple[Policy, Policy]]:
    """Every policy in a cell behind the best balancer, and every balancer before the best policy."""
    return [("least-queue-length", policy) for policy in POLICIES] + [
        (outer, POLICIES[0]) for outer in OUTER if outer != "least-queue-length"
    ]


if __name__ == "__main__":
    raise SystemExit(main())
