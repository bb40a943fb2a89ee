"""Adapters that are loaded and unloaded while the server runs, as the orchestrators see them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol

from bagel_triton.ipc.adapters import AdapterTable
from bagel_triton.ipc.sleep_gate import SleepGate
from bagel_triton.protocol.adapters import AdapterCall, AdapterNames
from bagel_triton.protocol.errors import (
    Asleep,
    BagelError,
    Cancelled,
    InvalidRequest,
    ModelNotFound,
    StageUnavailable,
    from_text,
)
from bagel_triton.protocol.intervals import REQUEST_S
from bagel_triton.protocol.validation import check_adapter
from bagel_triton.triton.stages import ModelCall
from bagel_triton.triton.tickets import Adapt, Status, exchange

CHANGE_S = 300.0  # for every stage to load an adapter or let go of it
SILENT_S = 30.0  # that a stage may leave calls unanswered meanwhile, while it is started again


class AdapterStage(Protocol):
    """One stage that computes with adapters, or all where one process has them."""

    def adapt(self, name: str, path: str) -> None:
        """Begin to load the adapter ``name`` from ``path``, or to let go of it where that is empty.

        Raises:
            BagelError: it does not answer, as of :meth:`adapters`.
        """

    def adapters(self) -> tuple[Collection[str], bool, str]:
        """Their names, whether a change is under way, and the text form of what the last one failed with."""


class RemoteAdapters:
    """Those of a stage that ``call`` reaches."""

    def __init__(self, call: ModelCall) -> None:
        self._call = call

    def adapt(self, name: str, path: str) -> None:
        exchange(self._call, Adapt(name, path))

    def adapters(self) -> tuple[Collection[str], bool, str]:
        answer, _ = exchange(self._call, Status())
        if (status := answer.status) is None:
            raise StageUnavailable("a stage answered without its status")
        return status.adapters, status.changing, status.failure


class ServerAdapters:
    """The adapters of a whole server; every method is safe from any thread.

    Args:
        table: the adapters that requests may name; this process alone changes it.
        gate: keeps a sleep from beginning during a change.
        stages: those that compute with adapters by name, as they are now; for a load those that can be reached, as
            the others are brought up to date when they are back.
        defaults: adapters of requests that name none.
    """

    def __init__(
        self,
        table: AdapterTable,
        gate: SleepGate,
        stages: Callable[[bool], Mapping[str, AdapterStage]],
        defaults: Collection[str] = (),
    ) -> None:
        self._table, self._gate, self._stages = table, gate, stages
        self._defaults = tuple(filter(None, defaults))
        self._changing_stages = threading.Lock()  # each makes one change at a time
        self._changing, self._ended = set[str](), threading.Condition()  # names
        self._unfinished: set[str] = set()  # names that no request can use, and that a stage may still have

    def answer(self, call: AdapterCall, gone: Callable[[], bool]) -> AdapterNames:
        """The names once ``call`` has been carried out.

        An adapter is unloaded when the requests in flight that use it have ended; meanwhile others are loaded and
        unloaded. ``gone`` gives up the wait for them, and the adapter stays. One that a stage did not let go of
        can be unloaded again.

        Raises:
            BagelError: the adapter cannot be loaded, there is none to unload, or a stage does not answer.
        """
        if call.action != "list":
            if not self._gate.enter():
                raise Asleep("the server is asleep; POST /v1/wake before its adapters are changed")
            try:
                with self._alone(call.name, gone):
                    self._load(call.name, call.path) if call.action == "load" else self._unload(call.name, gone)
            finally:
                self._gate.leave()
        return AdapterNames(tuple(self._table))

    @contextmanager
    def request(self, name: str | None) -> Iterator[None]:
        """Keeps the adapter ``name`` of a request loaded; an empty name is that of none, None one left to defaults.

        Raises:
            ModelNotFound: there is no such adapter.
        """
        with ExitStack() as held:
            if name is None:
                for default in self._defaults:  # the planner knows which it is, and whether it is there
                    held.enter_context(self._table.using(default))
            elif name:
                check_adapter(name, self._table)  # first, so that a name that is none's leaves no file
                held.enter_context(self._table.using(name))
                # Again with the lock held: an unloading that begins now waits for this request.
                check_adapter(name, self._table)
            yield

    @contextmanager
    def _alone(self, name: str, gone: Callable[[], bool]) -> Iterator[None]:
        """Keeps other changes of ``name`` waiting."""
        with self._ended:
            while name in self._changing:
                if gone():
                    raise Cancelled(f"the client left before the adapter {name!r} was changed")
                self._ended.wait(REQUEST_S)
            self._changing.add(name)
        try:
            yield
        finally:
            with self._ended:
                self._changing.remove(name)
                self._ended.notify_all()

    def _load(self, name: str, path: str) -> None:
        if name in self._table:
            allowed = "the name of no adapter that is loaded (POST /v1/unload_lora_adapter)"
            raise InvalidRequest.value("lora_name", name, allowed)
        if name in self._unfinished:
            self._let_go(name)
        try:
            self._change(name, path)
        except BagelError:
            with contextlib.suppress(BagelError):  # a stage that has it keeps what no request can name
                self._let_go(name)
            raise
        self._table.add(name, path)

    def _unload(self, name: str, gone: Callable[[], bool]) -> None:
        if name not in self._table and name not in self._unfinished:
            known = ", ".join(self._table) or "none, as no adapter is loaded"
            raise ModelNotFound.value("lora_name", name, known)
        folder = self._table.folders.get(name)
        self._table.remove(name)
        while self._table.is_used(name):
            if gone():
                if folder is not None:
                    self._table.add(name, folder)
                raise Cancelled(f"the client left before {name!r} was unloaded; it stays loaded")
            time.sleep(REQUEST_S)
        self._let_go(name)

    def _let_go(self, name: str) -> None:
        self._unfinished.add(name)
        self._change(name, "")
        self._unfinished.remove(name)

    def _change(self, name: str, path: str) -> None:
        """Have every stage load the adapter, or let go of it, all at once."""
        with self._changing_stages:
            until = time.monotonic() + CHANGE_S
            waiting = dict(self._stages(bool(path)))
            answered = dict.fromkeys(waiting, time.monotonic())
            begun: set[str] = set()
            while waiting:
                for stage_name, stage in list(waiting.items()):
                    try:
                        if stage_name not in begun:
                            stage.adapt(name, path)
                            begun.add(stage_name)
                        names, changing, failure = stage.adapters()
                    except InvalidRequest:
                        raise
                    except BagelError as error:
                        # Dead: it is started again, and called again until the time is over.
                        begun.discard(stage_name)
                        if time.monotonic() > answered[stage_name] + SILENT_S:
                            change = "load" if path else "let go of"
                            raise StageUnavailable(
                                f"{stage_name} does not answer, so it did not {change} {name!r}: {error.message}; "
                                "the call can be made again"
                            ) from error
                        continue
                    answered[stage_name] = time.monotonic()
                    if changing:
                        pass
                    elif failure:
                        raise from_text(failure)
                    elif (name in names) == bool(path):
                        del waiting[stage_name]
                    else:  # started again since it was called
                        begun.discard(stage_name)
                if waiting and time.monotonic() > until:
                    raise StageUnavailable(f"{', '.join(waiting)}: no change of {name!r} in {CHANGE_S:g} s")
                if waiting:
                    time.sleep(REQUEST_S)
