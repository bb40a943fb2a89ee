"""The tritonserver of this machine: where it is, its command line, and its process while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

import httpx

from bagel_triton.deploy.config import DEPLOY_VARIABLE
from bagel_triton.ipc.liveness import region_prefix
from bagel_triton.protocol.intervals import FOLLOW_S, REAP_S, START_S
from bagel_triton.serving import CommandError
from bagel_triton.serving.machine import LOOPBACK
from bagel_triton.serving.process import adopt_orphans, guarded
from bagel_triton.telemetry import tracing

EXIT_TIMEOUT_S = 2  # for requests in flight; one that was lost must not hold up a shutdown
EMBEDDED_RELEASE = (24, 10)  # of the package nvidia-pytriton
RELEASE_VARIABLE = "NVIDIA_TRITON_SERVER_VERSION"
LIBRARY_PATH = "LD_LIBRARY_PATH"
HEADERS = f"(?i){'|'.join(tracing.HEADERS)}"
STOP_TIMEOUT_S = EXIT_TIMEOUT_S + 4.0  # its own timeout, and time to unload the models
CRASHES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
REPORT_EVERY_S = 10.0


@dataclass(frozen=True)
class TritonServer:
    """A tritonserver program; ``backends`` and ``libraries`` replace its defaults where they are given.

    What depends on its ``release`` stands in :meth:`command`, behind a comparison.
    """

    program: Path
    release: tuple[int, int] = EMBEDDED_RELEASE
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()

    def environment(self, deploy: Path) -> dict[str, str]:
        """This process's environment, changed so that stubs run this Python and read ``deploy``."""
        environment = dict(os.environ)
        environment[DEPLOY_VARIABLE] = str(deploy)
        # The stages' processes share the cores. A thread that spins at its barrier takes a core from another
        # stage, which slows every small step of two busy stages many times over.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # torch makes this folder when some of its modules are imported, and leaves it in the temporary one.
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(deploy.parent / "torchinductor"))
        # A stub takes its standard library and packages from the first python3 on PATH.
        environment["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), environment.get("PATH", os.defpath)])
        if self.libraries:
            given = [environment[LIBRARY_PATH]] if environment.get(LIBRARY_PATH) else []
            environment[LIBRARY_PATH] = os.pathsep.join([*map(str, self.libraries), *given])
        return environment

    def command(
        self,
        model_repository: Path,
        models: Sequence[str],
        *,
        http_port: int,
        grpc_port: int,
        metrics_port: int,
        shm_prefix: str,
        verbose: bool,
        grpc_host: str = LOOPBACK,
        metrics_host: str = LOOPBACK,
    ) -> list[str]:
        """The command line that serves ``models``: HTTP on the loopback address, the others where they are said."""
        return [
            str(self.program),
            f"--model-repository={model_repository}",
            *([f"--backend-directory={self.backends}"] if self.backends else []),
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in models),
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--http-address={LOOPBACK}",
            f"--http-port={http_port}",
            f"--grpc-address={grpc_host}",
            f"--grpc-port={grpc_port}",
            f"--metrics-address={metrics_host}",
            f"--metrics-port={metrics_port}",
            # Over gRPC and HTTP: a request's parent span reaches the orchestrator as a parameter.
            *(f"--{protocol}-header-forward-pattern={HEADERS}" for protocol in ("grpc", "http")),
            f"--backend-config=python,shm-region-prefix-name={region_prefix(shm_prefix)}",
            # 25.06 began to refuse bodies above 64 MiB, such as several images inline.
            *([f"--http-max-input-size={2**31 - 1}"] if self.release >= (25, 6) else []),
            *(["--log-verbose=1"] if verbose else []),
        ]


def find(directory: Path) -> TritonServer:
    """The tritonserver of the nvidia-pytriton package, else the one on ``PATH``.

    Args:
        directory: an empty folder of this server's own, for the files that are laid out for it.

    Raises:
        CommandError: there is none, or a library that it needs is missing.
    """
    # Only the binaries of the package are used; its modules are never imported.
    package = importlib.util.find_spec("pytriton")
    if package is not None and package.origin is not None:
        return _embedded(Path(package.origin).parent, directory)
    if program := shutil.which("tritonserver"):
        return TritonServer(Path(program), release_of(os.environ))
    raise CommandError("no tritonserver: install the package nvidia-pytriton, or put tritonserver on PATH")


def release_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """The release, year and month, that a container names in ``environ``; that of the embedded server without one."""
    year, _, month = environ.get(RELEASE_VARIABLE, "").partition(".")
    if year.isdigit() and month[:2].isdigit():
        return int(year), int(month[:2])
    return EMBEDDED_RELEASE


def _embedded(package: Path, directory: Path) -> TritonServer:
    root = package / "tritonserver"
    stub = root / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    if not stub.is_file():
        raise CommandError(f"the installed nvidia-pytriton has no Python backend for Python {VERSION}")
    _check_numpy()
    backend = directory / "backends" / "python"
    backend.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).symlink_to(root / "backends" / "python" / name)
    shutil.copy(stub, backend)
    (backend / stub.name).chmod(0o755)  # installers do not always keep the mode
    # A folder with libpython alone: its own may hold libraries that must not shadow the system's.
    libraries = directory / "lib"
    libraries.mkdir()
    (libraries / NAME).symlink_to(find_libpython())
    return TritonServer(
        program=root / "bin" / "tritonserver",
        backends=backend.parent,
        libraries=(library_folder(package.parent), libraries),
    )


def library_folder(site_packages: Path) -> Path:
    """The shared libraries that the nvidia-pytriton package brings."""
    return site_packages / "nvidia_pytriton.libs"


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.partition(".")[0]) >= 2:
        raise CommandError(f"numpy {version} makes this tritonserver return empty outputs; install numpy<2")


VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
NAME = f"libpython{VERSION}.so.1.0"


def find_libpython() -> Path:
    """The shared library of this interpreter's version; the interpreter's own where it has one.

    Raises:
        CommandError: there is none; names the package that has it.
    """
    for directory in _directories():
        if (directory / NAME).is_file():
            return directory / NAME
    raise CommandError(
        f"{NAME} is not on this machine, and tritonserver's Python backend needs it: "
        f"install the package libpython{VERSION} (Debian, Ubuntu) or use a Python built with --enable-shared"
    )


def _directories() -> Iterator[Path]:
    for variable in ("LIBDIR", "LIBPL"):
        if value := sysconfig.get_config_var(variable):
            yield Path(value)
    yield Path(sys.base_prefix) / "lib"
    yield from _loader_directories()


def _loader_directories() -> Iterator[Path]:
    """Folders in which the system's loader has a library of this name."""
    ldconfig = shutil.which("ldconfig") or shutil.which("ldconfig", path="/sbin:/usr/sbin")
    if ldconfig is None:
        return
    cache = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True).stdout
    for line in cache.splitlines():  # "	libz.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libz.so.1"
        name, _, path = line.strip().partition(" => ")
        if name.startswith(f"{NAME} "):
            yield Path(path).parent


class StartupProgress:
    """Reports the models that a start waits for, every :data:`REPORT_EVERY_S` seconds."""

    def __init__(self) -> None:
        self._began = self._reported = time.monotonic()
        self.missing = "the server itself"

    def note(self, missing: str) -> None:
        """Note what is still ``missing``; print it now and then, and since when."""
        self.missing = missing
        if time.monotonic() - self._reported > REPORT_EVERY_S:
            self._reported = time.monotonic()
            print(f"  waiting for {missing} ({self._reported - self._began:.0f} s)", flush=True)


class TritonProcess:
    """A tritonserver and its stubs, in a process group that ends with this process."""

    def __init__(self, process: asyncio.subprocess.Process, models: Sequence[str], http_port: int, log: Path) -> None:
        self._process = process
        self._models = models
        self._url = f"http://{LOOPBACK}:{http_port}"
        self._log = log
        self._scratch = Scratch()
        self.loaded = asyncio.Event()  # every model was ready once

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        models: Sequence[str],
        http_port: int,
        log: Path,
    ) -> Self:
        """Start ``command``, which serves ``models``; its output is added to the file ``log``."""
        adopt_orphans()  # stubs outlive their server for a moment
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *guarded(list(command)),
                env=environment,
                stdin=asyncio.subprocess.PIPE,  # closed when this process ends
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return cls(process, models, http_port, log)

    async def ended(self) -> str:
        """Wait for the process to end by itself; why it did, in one line."""
        status = await self._process.wait()
        reason = failure(self._log)
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        ended = f"tritonserver ended ({how}; its log: {self._log})"
        return f"{ended}: {reason}" if reason else ended

    @property
    def crashed(self) -> bool:
        """Whether it ended by a fault of its own, after it had served."""
        return self.loaded.is_set() and self._process.returncode in CRASHES

    async def until_ready(self, progress: StartupProgress) -> None:
        """Wait for every model to be ready; prints now and then which are not."""
        waiting = list(self._models)
        async with httpx.AsyncClient(base_url=self._url, trust_env=False) as client:
            while waiting:
                # It does not listen before it has tried to load every model.
                with contextlib.suppress(httpx.TransportError):
                    waiting = [model for model in waiting if not await _is_ready(client, model)]
                if waiting:
                    loaded = loaded_models(self._log)
                    missing = [model for model in waiting if model not in loaded]
                    progress.note(", ".join(missing) or "the server itself")
                await asyncio.sleep(START_S)
        self._scratch.claim()
        self.loaded.set()

    async def stop(self, at_once: bool = False) -> None:
        """End the process and its stubs, within :data:`STOP_TIMEOUT_S` seconds or ``at_once``."""
        # While it loads models it ignores SIGTERM.
        if not at_once and self._process.returncode is None and self.loaded.is_set():
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # the group is empty
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        with contextlib.suppress(ChildProcessError):  # none is left
            while True:
                os.waitpid(-self._process.pid, os.WNOHANG)
                await asyncio.sleep(REAP_S)
        self._scratch.remove()


async def _is_ready(client: httpx.AsyncClient, model: str) -> bool:
    return (await client.get(f"/v2/models/{model}/ready")).is_success


class Scratch:
    """The folder that Triton's Python backend makes under /tmp and often leaves there, empty.

    Its name is fixed in the backend but for a random end, and no variable moves it. So those that appear while a
    server starts are taken for its own. Removing a folder of a server that starts at the same time does no harm:
    only one that unpacks an environment of its own uses the folder, and then it is not empty.
    """

    def __init__(self, directory: Path = Path("/tmp")) -> None:
        self._directory = directory
        self._before = self._present()
        self._own: set[Path] = set()

    def claim(self) -> None:
        """Those that appeared since the start are this server's."""
        self._own = self._present() - self._before

    def remove(self) -> None:
        """Remove them, where they are empty."""
        for path in self._own or self._present() - self._before:
            with contextlib.suppress(OSError):
                path.rmdir()

    def _present(self) -> set[Path]:
        return set(self._directory.glob("python_env_??????"))


_LOADED = re.compile(r"\] \"successfully loaded '([^']+)'\"")
_FAILED = re.compile(r"^E.*?\] \"?((?:failed to load|failed to poll|Poll failed).*?)\"?$", re.MULTILINE)
_LAST_WORDS = re.compile(
    r"^(?:error: |.*error while loading shared libraries: |terminate called after throwing ).*$", re.MULTILINE
)


def loaded_models(log: Path) -> set[str]:
    """Names of the models whose loading the log reports."""
    return set(_LOADED.findall(_read(log)))


def failure(log: Path) -> str | None:
    """The reason that tritonserver ended, in one line; None if the log has none."""
    text = _read(log)
    if failed := _FAILED.search(text):
        return _one_line(_unescape(failed[1]))
    if last_words := _LAST_WORDS.findall(text):
        return _one_line(last_words[-1].removeprefix("error: ").removeprefix("creating server: "))
    return None


async def follow(log: Path, out: TextIO) -> None:
    """Copy ``log`` to ``out`` as it grows, until cancelled."""
    with log.open(errors="replace") as lines:
        try:
            while True:
                out.write(lines.read())
                out.flush()
                await asyncio.sleep(FOLLOW_S)
        finally:
            out.write(lines.read())
            out.flush()


def _read(log: Path) -> str:
    return log.read_text(errors="replace")


def _unescape(message: str) -> str:
    """``message`` as it was before the log made one line of it."""
    return message.replace(r"\n", "\n").replace(r"\"", '"')


def _one_line(message: str) -> str:
    """``message`` without the stack that the Python backend appends."""
    return " ".join(message.partition("\n\nAt:\n")[0].split())
