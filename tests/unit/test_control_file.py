"""What the supervisor counts reaches the metrics, once; that it stops is heard."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bagel_triton.ipc import control_file
from tests.support.waiting import soon

PREFIX = "bagel_triton_1_2"


class Counts:
    """What was told, by the metric's name and label."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def count_up_to(self, name: str, total: int, **labels: str) -> None:
        self.seen["/".join([name, *labels.values()])] = total


@contextmanager
def told(directory: Path) -> Iterator[Counts]:
    counts, closing = Counts(), threading.Event()
    thread = threading.Thread(target=control_file.watch_control_file, args=(PREFIX, counts, closing, directory))
    thread.start()
    yield counts
    closing.set()
    thread.join()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_file, "WATCH_S", 0.01)


def test_each_reload_is_counted_once_and_a_new_process_counts_those_before_it(tmp_path: Path) -> None:
    kept = control_file.ControlFile(PREFIX, tmp_path)
    with told(tmp_path) as counts:
        for name in ("dit", "dit", "thinker", control_file.SERVER):
            kept.reloaded(name)
        expected = {"stage_reloads/dit": 2, "stage_reloads/thinker": 1, "server_restarts": 1}
        assert soon(lambda: counts.seen == expected)
        time.sleep(0.05)
        assert counts.seen == expected
    for path in tmp_path.iterdir():  # a crashed tritonserver's files are swept away
        path.unlink()
    kept.reloaded(control_file.SERVER)
    with told(tmp_path) as counts:
        assert soon(lambda: counts.seen == expected | {"server_restarts": 2})


def test_without_a_supervisor_nothing_is_counted(tmp_path: Path) -> None:
    with told(tmp_path) as counts:
        time.sleep(0.05)
    assert not counts.seen


def test_that_the_server_stops_is_heard_and_ends_the_listening(tmp_path: Path) -> None:
    kept, closing = control_file.ControlFile(PREFIX, tmp_path), threading.Event()
    thread = threading.Thread(target=control_file.watch_control_file, args=(PREFIX, Counts(), closing, tmp_path))
    thread.start()
    assert not closing.wait(0.05)
    kept.stop()
    assert closing.wait(10)
    thread.join()
