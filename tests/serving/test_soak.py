"""Minutes of mixed load with errors, clients that leave and processes that are killed: nothing lost, nothing grows."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from bagel_triton.deploy.topology import BAGEL, ENSEMBLE
from tests.serving.test_together import EIGHT, image_body, until_idle
from tests.support.exact import same_image
from tests.support.killing import arguments, descendants, health, kill, stage_pids, until
from tests.support.serving import Server, reply_images

SOAK_S = float(os.environ.get("BAGEL_TRITON_SOAK_S", "600"))
IN_FLIGHT = 32
STAGES = tuple(model for model in BAGEL.models if model != ENSEMBLE)
KILL_EVERY_S, BACK_S, ANSWER_S = 20.0, 90.0, 60.0
GROWTH_MB = 48  # of a process, over a third of the time: a message kept for each request would be more

IMAGE = image_body({**EIGHT[1], "height": 48, "width": 48, "num_inference_steps": 4}, seed=1)
TEXT = {"messages": [{"role": "user", "content": "Hi"}], "modalities": ["text"], "max_tokens": 6}
LATE = image_body({**EIGHT[0], "height": 64, "width": 64, "num_inference_steps": 1000}, seed=1) | {"timeout": 0.7}


class Clients:
    """``IN_FLIGHT`` clients that send one request after the other; a tenth fails late, a tenth leaves early."""

    def __init__(self, server: Server, image: np.ndarray) -> None:
        self._server, self._image = server, image
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(IN_FLIGHT)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for the requests that are in flight."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * ANSWER_S)
        assert not any(thread.is_alive() for thread in self._threads), "a request did not end"

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=self._server.url, trust_env=False, timeout=ANSWER_S) as client:
            while not self._stop.is_set():
                kind = chance.choices(["image", "text", "late", "leaves"], [60, 20, 10, 10])[0]
                end = self._ask(client, kind, chance)
                with self._lock:
                    self.ends[f"{kind} {end}"] += 1

    def _ask(self, client: httpx.Client, kind: str, chance: random.Random) -> str:
        path = "/v1/chat/completions"
        if kind == "leaves":
            with contextlib.suppress(httpx.TimeoutException):
                client.post(path, json=LATE, timeout=chance.uniform(0.05, 0.5))
            return "left"
        body = {"image": IMAGE, "text": TEXT, "late": LATE}[kind]
        try:
            reply = client.post(path, json=body)
        except httpx.HTTPError as error:
            self.wrong.append(f"{kind}: {error!r}")
            return "lost"
        allowed = {"image": (200, 503), "text": (200, 503), "late": (504, 503)}[kind]
        if reply.status_code not in allowed:
            self.wrong.append(f"{kind}: {reply.status_code} {reply.text[:200]}")
        elif (
            kind == "image" and reply.status_code == 200 and not same_image(reply_images(reply.json())[0], self._image)
        ):
            self.wrong.append("another image")
        return str(reply.status_code)


def threads(server: Server) -> dict[str, int]:
    """Threads of each stage's process."""
    return {
        stage: sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in stage_pids(server, stage))
        for stage in STAGES
    }


def memory_mb(server: Server) -> dict[int, float]:
    """Private memory of the server's processes, but for shared pages, which are the weights'."""
    found = {}
    for pid in descendants(server.process.pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            found[pid] = sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
    return found


@pytest.fixture
def own_server(checkpoint_dir: Path) -> Iterator[Server]:
    with Server(checkpoint_dir) as running:
        yield running


def is_back(server: Server) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return health(server) == 200 and all(stage_pids(server, stage) for stage in STAGES)
    return False


@pytest.mark.long
@pytest.mark.timeout(SOAK_S + 400)
def test_minutes_of_everything_at_once(own_server: Server) -> None:
    image = own_server.images(IMAGE)[0]
    own_server.chat(TEXT)
    until_idle(own_server)
    before = threads(own_server)
    started = time.monotonic()

    clients = Clients(own_server, image)
    for stage in itertools.cycle(STAGES):
        if time.monotonic() - started > SOAK_S * 2 / 3:
            break
        time.sleep(KILL_EVERY_S / 2)
        killed = kill(own_server, stage)
        until(lambda killed=killed: not arguments(killed), f"{stage} is still there", BACK_S)
        print(
            f"{stage} killed: back after {until(lambda: is_back(own_server), 'not back', BACK_S):.1f} s, {clients.ends}"
        )
        time.sleep(KILL_EVERY_S / 2)
    clients.stop()
    assert not clients.wrong, Counter(clients.wrong).most_common(5)
    until_idle(own_server)
    assert own_server.images(IMAGE)[0].shape == image.shape

    halfway, ends = memory_mb(own_server), clients.ends
    clients = Clients(own_server, image)
    time.sleep(SOAK_S / 3)
    clients.stop()
    assert not clients.wrong, Counter(clients.wrong).most_common(5)
    assert not any(end.endswith("503") for end in clients.ends), clients.ends
    until_idle(own_server)
    after = memory_mb(own_server)
    print(f"with kills {dict(ends)}, without {dict(clients.ends)}")
    print(
        {
            arguments(pid)[-80:].strip("\0"): (round(mb), round(after[pid]))
            for pid, mb in halfway.items()
            if pid in after
        }
    )
    assert halfway.keys() == after.keys(), "a process was replaced while none was killed"
    grown = {arguments(pid): (mb, after[pid]) for pid, mb in halfway.items() if after[pid] > mb + GROWTH_MB}
    assert not grown
    time.sleep(1)
    more = {stage: (count, threads(own_server)[stage]) for stage, count in before.items()}
    print(f"threads {more}")
    assert all(now <= count + 4 for count, now in more.values()), more
