"""The offline script's own ``main``, in this process: most of a run of its own is torch's start."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "client" / "end2end.py"
CHECKPOINT = ROOT / "tests" / "data" / "tiny-a"


class OfflineScript:
    """Runs ``main`` in ``folder``; what it printed goes to ``capsys``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.syspath_prepend(SCRIPT.parent)  # as when it is run
        monkeypatch.chdir(folder)
        self._script = _load()

    def __call__(self, *arguments: str, model: Path | str = CHECKPOINT) -> int:
        """The exit status."""
        try:
            return int(self._script.main(["--model", str(model), *arguments]))
        except SystemExit as exit_:
            return int(exit_.code or 0)


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("end2end", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script
