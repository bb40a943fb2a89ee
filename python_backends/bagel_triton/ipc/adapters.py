"""The LoRA adapters of a server, as all of its processes see them, and which of them requests are using.

A file in shared memory, ``PREFIX_adapters_OWNER``, has each owner's folders by name, from its first change on: the
orchestrator's is what requests may name, a stage's is what it loads when it is started again, if the files are in the
state that it loaded them in.
``PREFIX_adapter_HASH`` carries a shared lock of every request that uses the adapter of that name. The kernel drops the
locks of a process that dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bagel_triton.ipc.shm import SHM_DIRECTORY


class AdapterTable(Collection[str]):
    """The adapters of ``owner``, a Triton model of the server with ``prefix``; as a collection, their names.

    Without a change they are ``initial``. One process writes a table, from any thread; any process may read it.
    """

    def __init__(self, prefix: str, owner: str, initial: Mapping[str, str], directory: Path = SHM_DIRECTORY) -> None:
        self._prefix, self._directory, self._initial = prefix, directory, dict(initial)
        self._path = directory / f"{prefix}_adapters_{owner}"
        self._writing = threading.Lock()

    @property
    def entries(self) -> dict[str, tuple[str, str]]:
        """The folder of each adapter and the state of its files, empty where that is not known, by name."""
        try:
            return {name: (folder, state) for name, (folder, state) in json.loads(self._path.read_text()).items()}
        except FileNotFoundError:
            return {name: (folder, "") for name, folder in self._initial.items()}

    @property
    def folders(self) -> dict[str, str]:
        """The folder of each adapter, by name."""
        return {name: folder for name, (folder, _) in self.entries.items()}

    @property
    def added(self) -> dict[str, str]:
        """Those that are not initial."""
        return {name: folder for name, folder in self.folders.items() if self._initial.get(name) != folder}

    def add(self, name: str, folder: str, state: str = "") -> None:
        """Add an adapter, or give it another folder, whose files are in ``state``."""
        with self._writing:
            self._write({**self.entries, name: (folder, state)})

    def remove(self, name: str) -> None:
        """Take an adapter out."""
        with self._writing:
            self._write({known: entry for known, entry in self.entries.items() if known != name})

    def reset(self) -> None:
        """Forget all changes."""
        self._path.unlink(missing_ok=True)

    def __contains__(self, name: object) -> bool:
        return name in self.folders

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Keeps the adapter ``name`` loaded."""
        descriptor = self._open_lock(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    def is_used(self, name: str) -> bool:
        """Whether a request of any process uses the adapter ``name``."""
        descriptor = self._open_lock(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _open_lock(self, name: str) -> int:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        path = self._directory / f"{self._prefix}_adapter_{digest}"
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _write(self, entries: Mapping[str, tuple[str, str]]) -> None:
        unfinished = self._path.with_name(f"{self._path.name}.new")
        unfinished.write_text(json.dumps(entries))
        unfinished.rename(self._path)
