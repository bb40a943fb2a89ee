"""A batch without a server: what comes of it, and what is undone."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.pipeline import offline
from bagel_triton.pipeline.offline import run_batch, save_png, stats_table
from bagel_triton.pipeline.pipeline import GeneratedImage, StageCall
from bagel_triton.protocol.errors import BagelError, InvalidRequest, StageUnavailable
from bagel_triton.protocol.events import DoneEvent, ProgressEvent, StageStats
from bagel_triton.protocol.messages import Usage
from tests.support.fake_stages import FakeStages


def test_every_request_ends_once_whatever_order_they_end_in():
    stages = FakeStages(delays={"slow": 0.5})
    items = list(run_batch(stages, ["slow", "fast", "third"], 5.0, max_inflight=2))
    assert [index for index, item in items if isinstance(item, DoneEvent)] == [1, 2, 0]
    images = {index: item.pixels for index, item in items if isinstance(item, GeneratedImage)}
    assert images == {
        index: f"pixels of latents 0 of job of {name}" for index, name in enumerate(("slow", "fast", "third"))
    }


def test_an_error_is_the_requests_own():
    items = list(run_batch(FakeStages(errors={"dit": InvalidRequest("no", "prompt")}), ["a cat", "a dog"], 5.0, 8))
    errors = [(index, item) for index, item in items if isinstance(item, BagelError)]
    assert sorted((index, error.message) for index, error in errors) == [(0, "no"), (1, "no")]


def test_silence_ends_the_batch_and_is_undone():
    stages = FakeStages(silent="dit")
    start = time.monotonic()
    items = list(run_batch(stages, ["a cat", "a dog"], 0.1, max_inflight=1))  # one never even began
    assert time.monotonic() - start < 5
    assert [type(item) for _, item in items] == [StageUnavailable, StageUnavailable]
    assert items[0][1].message == "nothing in the batch made progress for 0.1 s"
    assert stages.aborted == ["a cat-1"]


def test_waiting_for_a_stage_is_no_progress():
    stages, over = FakeStages(silent="dit"), threading.Event()
    denoise = stages.denoise

    def waiting(job: str) -> StageCall[list[str]]:
        call = denoise(job)
        threading.Thread(target=tell, args=(call,)).start()
        return call

    def tell(call: StageCall[list[str]]) -> None:
        while not over.wait(0.02):
            call.progress(ProgressEvent("dit", 0, 0))

    stages.denoise = waiting
    items = list(run_batch(stages, ["a cat"], 0.2, 8))  # else it never ends
    over.set()
    assert [type(item) for _, item in items] == [StageUnavailable]


def test_closing_the_batch_cancels_what_is_left():
    stages = FakeStages(silent="vae_decode")
    batch = run_batch(stages, ["a cat"], 60.0, 8)
    next(batch)
    batch.close()
    assert stages.aborted == ["a cat-1"]


def test_an_empty_batch_is_done():
    assert list(run_batch(FakeStages(), [], 5.0, 8)) == []


def test_an_image_is_never_written_over(tmp_path: Path):
    black, white = torch.zeros(2, 3, 3, dtype=torch.uint8), torch.full((2, 3, 3), 255, dtype=torch.uint8)
    paths = [save_png(tmp_path, "0", pixels) for pixels in (black, white, black)]
    assert [path.name for path in paths] == ["0.png", "0-2.png", "0-3.png"]
    for path, pixels in zip(paths, (black, white, black), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), pixels.numpy())


def test_a_stage_that_a_request_skipped_took_none_of_its_time():
    text = DoneEvent("a", None, Usage(), (StageStats("thinker", 0.25, 1.0),))
    image = DoneEvent("b", 1, Usage(), (StageStats("thinker", 0.0, 2.0), StageStats("dit", 0.5, 4.0)))
    rows = [line.split() for line in stats_table({3: image, 1: text}).splitlines()]
    assert " ".join(rows[0]) == "prompt thinker queue s thinker run s dit queue s dit run s sum s"
    assert rows[1:] == [
        ["1", "0.250", "1.000", "0.000", "0.000", "1.250"],
        ["3", "0.000", "2.000", "0.500", "4.000", "6.500"],
        ["all", "0.250", "3.000", "0.500", "4.000", "7.750"],
    ]


class Loading:
    """Stages whose loading takes its time and takes every error for its own."""

    def __init__(self, closed: list[bool], deaf: bool) -> None:
        self._closed = closed
        if deaf:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        with contextlib.suppress(Exception):
            time.sleep(0.1 if deaf else 60)

    def close(self) -> None:
        self._closed.append(True)


@pytest.mark.parametrize("deaf", [False, True], ids=["interrupted", "too late to be interrupted"])
def test_loading_ends_at_its_limit_whatever_it_catches(
    deaf: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(offline, "LocalStages", lambda config: Loading(closed, deaf))
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"loading took longer than 0\.05 s"):
        offline.load(DeployConfig(str(tmp_path)), 0.05)
    assert closed == [True] * deaf  # what was loaded after all is not left behind
    assert signal.getsignal(signal.SIGALRM) is before
