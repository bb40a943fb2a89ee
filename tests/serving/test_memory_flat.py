"""Five hundred requests later, every process of the server is as large as it was."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving.test_together import image_body
from tests.support.killing import arguments, descendants, shared_files
from tests.support.serving import Server
from tests.support.waiting import soon

WARM_UP, REQUESTS, AT_ONCE = 150, 500, 4
GROWN_MB = 12.0  # what an allocator's thread may keep at a time; a kilobyte lost a request would be 0.5
IMAGE = {"prompt": "A cute cat", "height": 32, "width": 32, "num_inference_steps": 3}
TEXT = {"messages": [{"role": "user", "content": "hi"}], "modalities": ["text"], "max_tokens": 4}


@pytest.fixture(scope="module")
def own_server(checkpoint_dir: Path) -> Iterator[Server]:
    """One that no other test's requests grow."""
    with Server(checkpoint_dir) as running:
        yield running


def body(number: int) -> dict[str, Any]:
    """Texts, images, and images after thinking, each with a seed of its own."""
    if number % 3 == 0:
        return {**TEXT, "temperature": 1.0, "seed": number}
    if number % 3 == 1:
        return image_body(IMAGE, seed=number)
    return image_body({**IMAGE, "think": True, "max_think_tokens": 5}, seed=number)


def megabytes(server: Server) -> dict[str, float]:
    """What every process of the server holds for itself, and the last part of its command line."""
    found = {}
    for pid in [server.process.pid, *descendants(server.process.pid)]:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        own = next(line for line in status if line.startswith("RssAnon:"))
        name = next((part for part in arguments(pid).split("\0") if part.endswith("/model.py")), "")
        found[f"{pid} {'/'.join(name.split('/')[-3:-2])}"] = int(own.split()[1]) / 1024
    return found


@pytest.mark.long
def test_memory_is_flat(own_server: Server) -> None:
    def serve(first: int, count: int) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            replies = list(pool.map(lambda number: own_server.chat(body(number)), range(first, first + count)))
        assert [reply.status_code for reply in replies] == [200] * count
        assert soon(lambda: own_server.gauge("bagel_thinker_kv_blocks_used") == 0)

    serve(0, WARM_UP)
    before, files = megabytes(own_server), shared_files(own_server)
    serve(WARM_UP, REQUESTS)
    after = megabytes(own_server)
    assert after.keys() == before.keys()
    grown = {name: round(after[name] - size, 1) for name, size in before.items()}
    assert max(grown.values()) < GROWN_MB, grown
    assert shared_files(own_server) == files
    assert own_server.gauge("bagel_thinker_kv_leases") == 0
