"""The tritonserver of this machine: where it is, and its command line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bagel_triton.deploy.config import DEPLOY_VARIABLE
from bagel_triton.ipc.liveness import region_prefix
from bagel_triton.serving import CommandError
from bagel_triton.serving.machine import LOOPBACK
from bagel_triton.telemetry import tracing

EXIT_TIMEOUT_S = 2  # for requests in flight; one that was lost must not hold up a shutdown
LIBRARY_PATH = "LD_LIBRARY_PATH"
HEADERS = f"(?i){'|'.join(tracing.HEADERS)}"


@dataclass(frozen=True)
class TritonServer:
    """A tritonserver program; ``backends`` and ``libraries`` replace its defaults where they are given."""

    program: Path
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
    ) -> list[str]:
        """The command line that serves ``models`` on the loopback address, but gRPC on ``grpc_host``."""
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
            f"--metrics-address={LOOPBACK}",
            f"--metrics-port={metrics_port}",
            # Over gRPC and HTTP: a request's parent span reaches the orchestrator as a parameter.
            *(f"--{protocol}-header-forward-pattern={HEADERS}" for protocol in ("grpc", "http")),
            f"--backend-config=python,shm-region-prefix-name={region_prefix(shm_prefix)}",
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
        return TritonServer(Path(program))
    raise CommandError("no tritonserver: install the package nvidia-pytriton, or put tritonserver on PATH")


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
