"""A checkpoint's folder from the name that a user gives it: a folder, or a repository of the Hugging Face hub.

A repository that is in the cache is served from there, without a question to the hub: a start
needs no network, and weights change when someone downloads them, not because a branch moved.
The environment variables are huggingface_hub's own: ``HF_HOME``, ``HF_HUB_CACHE``,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_TOKEN``.

Run as a program, this module downloads one repository for :func:`find_checkpoint`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any

from bagel_triton.model.config import CheckpointError
from bagel_triton.protocol.intervals import SWEEP_S
from bagel_triton.weights.folder import (
    AUTOENCODER_FILE,
    CONFIG_FILES,
    HUB_NAME,
    INDEX_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    how_to_get,
    index_files,
    missing_files,
)

REQUIRED_FILES = (*CONFIG_FILES, *TOKENIZER_FILES, AUTOENCODER_FILE)
# Read where a repository has them.
OPTIONAL_FILES = (INDEX_FILE, "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
SWEEPS = 20
INTERRUPTED = 128 + signal.SIGINT
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_REVISION = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")
_COMMIT = re.compile(r"\w+")


def find_checkpoint(given: str | Path, revision: str | None = None) -> Path:
    """The folder that ``given`` means, downloaded if it is a repository of the hub that is not in the cache.

    Args:
        given: a folder, a repository's folder in a Hugging Face cache, or a repository's name (OWNER/NAME).
        revision: branch, tag or commit of the repository; main by default.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be downloaded; says why and what to do.
    """
    path = Path(given)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise CheckpointError(f"revision={revision!r} is not allowed; allowed: a branch, a tag or a commit")
    if path.is_dir():
        snapshot = _snapshot(path, revision) or _only_snapshot(path, revision)
        if snapshot is None and revision is not None:
            raise CheckpointError(
                f"revision={revision}: {given} is a folder, which has no such revision; give a repository's name"
            )
        return snapshot or path
    if path.exists():
        raise CheckpointError(f"checkpoint {given} is a file; give the folder that holds {WEIGHTS_FILE}")
    if not _NAME.fullmatch(str(given)):
        raise CheckpointError(f"checkpoint {given} does not exist; {how_to_get(HUB_NAME)}")
    return _from_hub(str(given), revision)


def repository_name(directory: Path) -> str | None:
    """OWNER/NAME of the repository whose snapshot in a Hugging Face cache ``directory`` is; None if it is no such."""
    resolved = directory.resolve()
    folder = resolved.parents[1].name if resolved.parent.name == "snapshots" else ""
    return folder.removeprefix("models--").replace("--", "/") if folder.startswith("models--") else None


def checkpoint_name(directory: Path) -> str:
    """The name of the checkpoint in ``directory``: the folder's own, or its repository's, without the owner."""
    return (repository_name(directory) or directory.resolve().name).rpartition("/")[2]


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants

    snapshot = _snapshot(_folder(Path(constants.HF_HUB_CACHE), name), revision)
    if snapshot is not None and not missing_files(snapshot):
        return snapshot
    if not constants.HF_HUB_OFFLINE:
        return _download_apart(name, revision)
    at = "" if revision is None else f" at revision {revision}"
    raise CheckpointError(
        f"checkpoint {name}{at} {_absence(name, revision)}, and HF_HUB_OFFLINE is set: no download; unset it, or give "
        "a folder"
    )


def _absence(name: str, revision: str | None) -> str:
    """Describe, for an error, the files of the repository ``name`` that the cache lacks."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    snapshot = _snapshot(_folder(cache, name), revision)
    missing = [] if snapshot is None else missing_files(snapshot)
    if missing:
        return f"is not complete in the Hugging Face cache {cache}, which misses {', '.join(missing)}"
    return f"is not in the Hugging Face cache {cache}"


def _folder(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}"


def _snapshot(repository: Path, revision: str | None) -> Path | None:
    """The snapshot of a cached ``repository`` at ``revision``, by default main; None where there is none."""
    if not repository.name.startswith("models--"):
        return None
    snapshots = repository / "snapshots"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or ""
    return snapshots / commit if _COMMIT.fullmatch(commit) and (snapshots / commit).is_dir() else None


def _only_snapshot(repository: Path, revision: str | None) -> Path | None:
    """The snapshot of a ``repository`` that has one alone, where no ``revision`` is asked for."""
    found = [*repository.glob("snapshots/*")] if repository.name.startswith("models--") and revision is None else []
    return found[0] if len(found) == 1 else None


def _download_apart(name: str, revision: str | None) -> Path:
    """Run :func:`download` in a process of its own, with its progress on this one's standard error.

    When huggingface_hub is interrupted, it waits until the files that it is downloading are
    complete, which may take an hour. A process can be ended at once.
    """
    command = [sys.executable, "-P", "-m", "bagel_triton.weights.hub", name, *([] if revision is None else [revision])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        try:
            reply = process.stdout.read()
        finally:
            process.stdin.close()  # it ends with it
    try:
        result: dict[str, str] = json.loads(reply)
    except ValueError:
        raise CheckpointError(f"checkpoint {name}: the download ended with status {process.returncode}") from None
    if "error" in result:
        raise CheckpointError(result["error"])
    return Path(result["folder"])


# --- code of the download process ---


def download(name: str, revision: str | None = None) -> Path:
    """Download the files of a checkpoint that are not in the cache yet; its snapshot there.

    Raises:
        CheckpointError: there is no such repository or revision, it is no checkpoint of BAGEL, the
            hub cannot be reached or breaks off, or the cache has no room.
    """
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    at = "" if revision is None else f" at revision {revision}"
    files, commit = _listing(name, revision)
    try:
        wanted = _wanted(name, at, files, commit)
        size = _check_room(name, {file: files[file] for file in wanted}, _folder(cache, name))
        print(f"downloading {name}{at} from {constants.ENDPOINT} to {cache}: {_readable(size)}", file=sys.stderr)
        # By its name and not by its commit, so that the cache knows the branch.
        patterns = [glob.escape(file) for file in wanted]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=_progress_bar(size)))
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_room(name, cache, "") from error
        if error.filename and Path(error.filename).is_relative_to(cache):
            raise CheckpointError(
                f"checkpoint {name}: the Hugging Face cache {cache} cannot be written: {_reason(error)}; "
                "set HF_HUB_CACHE to a folder that can"
            ) from error
        raise _broken_off(name, error) from error
    except Exception as error:  # huggingface_hub raises what its HTTP library and the Xet client raise
        raise _broken_off(name, error) from error


def _progress_bar(size: int) -> Any:
    """The class of huggingface_hub's progress bars, of which it shows one: that of ``size`` bytes on the disk."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bytes(tqdm):
        # The files' sizes come one by one, as each file's turn comes.
        total = property(lambda self: size, lambda self, value: None)

        def __init__(self, *args: Any, **options: Any) -> None:
            if options.get("unit") != "B" or str(options.get("name")).endswith(".transfer"):
                options["disable"] = True
            super().__init__(*args, **{**options, "desc": "downloading"})  # type: ignore[no-untyped-call]

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            """Leave it as it is, and show the end."""
            self.refresh()

    return Bytes


def _listing(name: str, revision: str | None) -> tuple[dict[str, Any], str]:
    """The repository's files by name, with huggingface_hub's facts of each, and the commit of ``revision``."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    endpoint = constants.ENDPOINT
    try:
        info = HfApi().model_info(
            name, revision=revision, files_metadata=True, timeout=float(constants.HF_HUB_ETAG_TIMEOUT)
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"checkpoint {name} is gated: accept its terms at {endpoint}/{name}, and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"checkpoint {name} has no revision {revision} at {endpoint}") from error
    except HfHubHTTPError as error:
        if isinstance(error, RepositoryNotFoundError) or error.response.status_code == HTTPStatus.UNAUTHORIZED:
            raise CheckpointError(
                f"checkpoint {name} is neither a folder here nor a repository at {endpoint}; "
                f"the published one is {HUB_NAME}, and a private one needs HF_TOKEN"
            ) from error
        raise CheckpointError(
            f"checkpoint {name} {_absence(name, revision)}, and {endpoint} answered with an error: {_reason(error)}"
        ) from error
    except Exception as error:  # the HTTP library's own, whichever one it is
        raise CheckpointError(
            f"checkpoint {name} {_absence(name, revision)}, and {endpoint} cannot be reached: "
            f"{_reason(error)}; without a network give a folder"
        ) from error
    return {file.rfilename: file for file in info.siblings or ()}, str(info.sha)


def _wanted(name: str, at: str, files: dict[str, Any], commit: str) -> list[str]:
    """The names of the files to download."""
    from huggingface_hub import hf_hub_download

    missing = [file for file in REQUIRED_FILES if file not in files]
    if WEIGHTS_FILE not in files and INDEX_FILE not in files:
        missing.append(f"{WEIGHTS_FILE} (or {INDEX_FILE} and its shards)")
    if missing:
        raise CheckpointError(f"repository {name}{at} is no checkpoint of BAGEL; missing: {', '.join(missing)}")
    weights = [WEIGHTS_FILE]
    if INDEX_FILE in files:
        shards = index_files(Path(hf_hub_download(name, INDEX_FILE, revision=commit)))
        absent = [file for file in shards if file not in files]
        if absent and WEIGHTS_FILE not in files:
            raise CheckpointError(f"repository {name}{at}: {INDEX_FILE} names {absent[0]}, which is not there")
        weights = weights if absent else shards
    return [*REQUIRED_FILES, *(file for file in OPTIONAL_FILES if file in files), *weights]


def _check_room(name: str, files: dict[str, Any], folder: Path) -> int:
    """The bytes of ``files`` that the repository's ``folder`` in the cache does not have yet.

    Raises:
        CheckpointError: its disk has no room for them.
    """
    size = 0
    for file in files.values():
        etag = file.lfs.sha256 if file.lfs else file.blob_id
        if not etag or not (folder / "blobs" / etag).exists():
            size += file.size or 0
    existing = next(parent for parent in folder.parents if parent.exists())
    if size > (free := shutil.disk_usage(existing).free):
        raise _no_room(name, folder.parent, f": it needs {_readable(size)}, and {_readable(free)} are free")
    return size


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _no_room(name: str, cache: Path, sizes: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {name}: no space in the Hugging Face cache {cache}{sizes}; free some, or set HF_HUB_CACHE"
    )


def _broken_off(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {name}: the download broke off: {_reason(error)}; "
        "try again: files that are complete are not downloaded again"
    )


def _reason(error: BaseException) -> str:
    """The first line of the error at the bottom of ``error``."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _abandon(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """End this process at once, and remove the files that it is writing: huggingface_hub does not resume them."""
    for _ in range(SWEEPS):
        if not _remove_partial_files():
            break
        time.sleep(SWEEP_S)  # its other threads may open more
    os._exit(INTERRUPTED)


def _remove_partial_files() -> bool:
    """Remove the files that this process has open for a download; whether there were any."""
    found = False
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            path = descriptor.readlink()
            if path.suffix == ".incomplete":  # one that is removed has another name
                path.unlink()
                found = True
    return found


def _end_with_parent() -> None:
    sys.stdin.read()
    _abandon()


def main(argv: list[str]) -> int:
    """Download the repository that ``argv`` names, and print its folder or the error as JSON."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _abandon)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = {"folder": str(download(*argv))}
    except CheckpointError as error:
        result = {"error": str(error)}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
