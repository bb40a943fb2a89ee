"""Many requests at once through stages in this process, without a server."""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import msgspec
from PIL import Image
from torch import Tensor

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.pipeline.pipeline import Item, LatentsT, Pipeline, PixelsT, RequestT, Stages
from bagel_triton.protocol.errors import BagelError, Cancelled, StageUnavailable, from_exception
from bagel_triton.protocol.events import DoneEvent, ProgressEvent, StageStats
from bagel_triton.protocol.request import GenerationRequest


def check(config: DeployConfig, request: GenerationRequest) -> None:
    """Refuse requests that fail with any prompt, before any weights are loaded.

    Args:
        request: a request without its prompt.

    Raises:
        InvalidRequest: names the field, its value and what is allowed.
        ValueError: the checkpoint or the configuration is wrong.
    """
    RequestPlanner.open(config).expand(msgspec.structs.replace(request, prompt="any"))


def load(config: DeployConfig, timeout_s: float) -> LocalStages:
    """The stages that ``config`` describes, for a batch; from the main thread only.

    A server bounds how long a request may wait, as its client may have gone. In a batch a
    request waits for its turn as long as the batch goes on.

    Raises:
        TimeoutError: loading took longer than ``timeout_s`` seconds.
        ValueError: the checkpoint or the configuration is wrong.
    """
    thinker = msgspec.structs.replace(config.thinker, lease_ttl_s=math.inf, admission_timeout_s=math.inf)
    with contextlib.ExitStack() as unless_late:
        with _time_limit(timeout_s):
            stages = LocalStages(msgspec.structs.replace(config, thinker=thinker))
            unless_late.callback(stages.close)
        unless_late.pop_all()
    return stages


class _Expired(BaseException):
    """No ``Exception``, so the interrupted code cannot mistake it for an error of its own."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def expire(number: int, frame: FrameType | None) -> None:
        raise _Expired

    deadline = time.monotonic() + seconds
    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.suppress(_Expired):
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    # The clock decides: a signal that comes in a finalizer is lost there.
    if time.monotonic() >= deadline:
        raise TimeoutError(f"loading took longer than {seconds:g} s")


def run_batch(
    stages: Stages[RequestT, LatentsT, PixelsT], requests: Sequence[RequestT], silence_s: float, max_inflight: int
) -> Generator[tuple[int, Item[PixelsT] | BagelError], None, None]:
    """Run ``requests`` together; (index, what happened), each request's in order.

    A request's last item is a :class:`DoneEvent`, or its error, which is that request's alone.
    When none makes progress for ``silence_s`` seconds, every request not done yet fails with
    :class:`StageUnavailable`. Closing the iterator cancels them.
    """
    pipeline = Pipeline(stages, math.inf)
    happened: queue.SimpleQueue[tuple[int, Item[PixelsT] | BagelError]] = queue.SimpleQueue()
    stop = threading.Event()

    def follow(index: int, request: RequestT) -> None:
        try:
            if stop.is_set():
                raise Cancelled("the batch ended before the request began")
            for item in pipeline.run(request, stop.is_set):
                happened.put((index, item))
        except Exception as error:
            happened.put((index, from_exception(error)))

    unfinished = len(requests)
    with ThreadPoolExecutor(max(1, min(unfinished, max_inflight)), "request") as threads:
        try:
            for index, request in enumerate(requests):
                threads.submit(follow, index, request)
            deadline = time.monotonic() + silence_s
            while unfinished:
                try:
                    wait_s = None if stop.is_set() else max(0.0, deadline - time.monotonic())
                    index, item = happened.get(timeout=wait_s)
                except queue.Empty:
                    stop.set()
                    continue
                if isinstance(item, ProgressEvent) and not item.steps:
                    continue  # it waits for a stage, which is no progress
                deadline = time.monotonic() + silence_s
                if stop.is_set() and isinstance(item, Cancelled):
                    item = StageUnavailable(f"nothing in the batch made progress for {silence_s:g} s")
                unfinished -= isinstance(item, DoneEvent | BagelError)
                yield index, item
        finally:
            stop.set()


def save_png(folder: Path, name: str, pixels: Tensor) -> Path:
    """Write uint8 ``pixels`` [height, width, 3] to ``NAME.png``, or ``NAME-2.png`` where that exists, and so on."""
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    while True:
        path = folder / f"{name}{next(suffixes)}.png"
        with contextlib.suppress(FileExistsError), path.open("xb") as file:
            Image.fromarray(pixels.numpy()).save(file, "PNG")
            return path


def stats_table(done: Mapping[int, DoneEvent]) -> str:
    """Seconds each request (by index, at least one) spent in each stage, queued and running, and their sums."""
    stages = list(dict.fromkeys(stats.stage for event in done.values() for stats in event.stages))
    header = ["prompt", *(f"{stage} {what}" for stage in stages for what in ("queue s", "run s")), "sum s"]
    times = {index: _times(event.stages, stages) for index, event in sorted(done.items())}
    rows = [[str(index), *(f"{value:.3f}" for value in (*row, sum(row)))] for index, row in times.items()]
    sums = [sum(column) for column in zip(*times.values(), strict=True)]
    rows.append(["all", *(f"{value:.3f}" for value in (*sums, sum(sums)))])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(lines)


def _times(stats: Sequence[StageStats], stages: Sequence[str]) -> list[float]:
    """``queue_s``, ``run_s`` of each of ``stages``; 0 for one that was not called."""
    by_stage: dict[str, tuple[float, float]] = {one.stage: (one.queue_s, one.run_s) for one in stats}
    return [value for stage in stages for value in by_stage.get(stage, (0.0, 0.0))]
