"""An engine that can sleep: it is closed and its memory freed, and built again when it wakes; and its adapters.

The engine itself knows nothing of this. A sleep of level 1 keeps what was loaded where that is host memory; level 2
drops it, and the checkpoint is read again. Either frees the KV cache, the encoders' caches and a GPU's weights.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from bagel_triton.engine.build import StageResources
from bagel_triton.engine.loop import Job
from bagel_triton.protocol.errors import Asleep, BagelError, from_exception
from bagel_triton.protocol.intervals import WATCH_S

log = logging.getLogger(__name__)


class Engine(Protocol):
    """The part of an engine, or of several, that sleeps."""

    def abort(self, request_id: str) -> None: ...
    def abort_job(self, job: Job[Any, Any]) -> None: ...
    def idle(self) -> Future[bool]: ...
    @property
    def is_lost(self) -> bool: ...
    def close(self) -> None: ...


E = TypeVar("E", bound=Engine)


class SleepingEngine(Generic[E]):
    """Holds an engine, or none while it is asleep.

    Args:
        open_: finds what an engine is built from; loads nothing.
        build: builds one.
        level: of the sleep that it starts in; 0 for awake.

    Raises:
        Exception: as of ``open_`` and ``build``, where it starts awake.
    """

    def __init__(
        self, open_: Callable[[], StageResources], build: Callable[[StageResources], E], level: int = 0
    ) -> None:
        self._open, self._build = open_, build
        self._resources: StageResources | None = None
        self._engine: E | None = None
        self._changed = threading.Condition()
        self.level, self._target, self.failure = level, level, ""
        self._worker: threading.Thread | None = None
        self._adapting: tuple[str, str] | None = None  # the name and path of the adapter that changes
        self._closing = threading.Event()
        if not level:
            self._wake()

    @property
    def engine(self) -> E:
        """The engine.

        Raises:
            Asleep: there is none.
        """
        engine = self._engine
        if engine is None or self._target:
            raise Asleep("the stage is asleep; POST /v1/wake")
        return engine

    @property
    def changing(self) -> bool:
        """Whether it is falling asleep or waking, or an adapter is being loaded."""
        return self._target != self.level or self._adapting is not None

    def state(self) -> tuple[int, bool, str]:
        """The level of its sleep, whether that is changing, and the text form of what the last change failed with."""
        with self._changed:
            return self.level, self.changing, self.failure

    @property
    def is_lost(self) -> bool:
        """Whether the engine has lost its device."""
        engine = self._engine
        return engine is not None and engine.is_lost

    def abort(self, request_id: str) -> None:
        """Abort a request's work; nothing is to be done while it is asleep."""
        if (engine := self._engine) is not None:
            engine.abort(request_id)

    def abort_job(self, job: Job[Any, Any]) -> None:
        """Abort this job, likewise."""
        if (engine := self._engine) is not None:
            engine.abort_job(job)

    def change(self, level: int) -> None:
        """Begin to sleep at ``level``, or to wake (0), and return at once.

        Jobs that are there finish first, and new ones are refused. A sleep of level 2 gets no lighter. An error stays
        in :attr:`failure` until the next change.
        """
        with self._changed:
            self.failure = ""
            self._target = max(level, self.level) if level else 0
            self._start()

    def adapt(self, name: str, path: str) -> None:
        """Begin to load the adapter ``name`` from ``path``, or to let go of it where that is empty; returns at once.

        An error stays in :attr:`failure` until the next change.

        Raises:
            Asleep: there is no engine.
        """
        with self._changed:
            if self.level or self._target:
                raise Asleep("the stage is asleep; POST /v1/wake before its adapters are changed")
            self.failure = ""
            self._adapting = name, path
            self._start()

    def adapters(self) -> tuple[Collection[str], bool, str]:
        """Names of the adapters, whether a change is under way, and the text form of what the last one failed with."""
        with self._changed:
            names = () if self._resources is None else self._resources.adapter_names
            return names, self.changing, self.failure

    def _start(self) -> None:
        """Have a thread make the changes that are left."""
        if self.changing and self._worker is None:
            self._worker = threading.Thread(target=self._follow, name="sleep", daemon=True)
            self._worker.start()

    def wait(self) -> None:
        """Wait until no change is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._worker is None)

    def close(self) -> None:
        """Close the engine for good."""
        self._closing.set()
        self.wait()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        if self._resources is not None:
            self._resources.close()

    def _follow(self) -> None:
        while True:
            with self._changed:
                target, adapting = self._target, self._adapting
                if not self.changing:
                    self._worker = None
                    self._changed.notify_all()
                    return
            failure = ""
            try:
                if adapting is not None and self._resources is not None:
                    self._resources.adapt(*adapting)
                elif target == self.level:
                    pass
                elif target:
                    self._finish_jobs()
                    self._sleep(target)
                else:
                    self._wake()
            except Exception as error:
                action = "sleep" if target else "wake"
                log.exception("it could not %s", action if adapting is None else f"change the adapter {adapting[0]!r}")
                failure = from_exception(error).to_text()
            with self._changed:
                if adapting is not None:
                    self.failure = failure
                    self._adapting = None if self._adapting == adapting else self._adapting
                elif failure:
                    self.failure, self._target = failure, self.level
                else:
                    self.level = target

    def _finish_jobs(self) -> None:
        """Wait until the engine has nothing left to do."""
        while (engine := self._engine) is not None and not self._closing.wait(0.0):
            try:
                if engine.idle().result():
                    return
            except BagelError:  # it has ended already
                return
            self._closing.wait(WATCH_S)

    def _sleep(self, level: int) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        del engine
        if self._resources is not None and not self._resources.rest(level):
            self._resources = None

    def _wake(self) -> None:
        resources = self._resources or self._open()
        try:
            self._engine = self._build(resources)
        except BaseException:
            resources.rest(2)
            self._resources = None
            raise
        self._resources = resources
