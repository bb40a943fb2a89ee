"""A tritonserver with some of the models, as one of several hosts has it."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.ipc import shm as shared_memory
from bagel_triton.serving import machine, tritonserver

START_S, STOP_S = 180, 30


@dataclass(frozen=True)
class TritonHost:
    """``grpc`` is its address, ``url`` its HTTP one, ``log`` what it printed."""

    grpc: str
    url: str
    log: Path


@contextlib.contextmanager
def triton_host(
    config: DeployConfig,
    models: Sequence[str],
    directory: Path,
    address: str = machine.LOOPBACK,
    prefix: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Iterator[TritonHost]:
    """Serve ``models`` at ``address``; ``prefix`` is a command to run the server by, ``options`` are its own."""
    directory.mkdir()
    http, grpc, metrics = machine.choose_ports({"http": 0, "grpc": 0, "metrics": 0}).values()
    with shared_memory.SharedMemoryPrefix() as shared:
        server = tritonserver.find(directory)
        settings, log = directory / "deploy.yaml", directory / "tritonserver.log"
        msgspec.structs.replace(config, shm_prefix=shared.prefix).write(settings)
        command = server.command(
            machine.source_file("model_repository"),
            models,
            http_port=http,
            grpc_port=grpc,
            metrics_port=metrics,
            shm_prefix=shared.prefix,
            verbose=False,
        )
        command = [part.replace(f"address={machine.LOOPBACK}", f"address={address}") for part in command]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*prefix, *command, *options], env=server.environment(settings), stdout=output, stderr=subprocess.STDOUT
            )
        try:
            _wait(process, f"http://{address}:{http}", models, log)
            yield TritonHost(f"{address}:{grpc}", f"http://{address}:{http}", log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, models: Sequence[str], log: Path) -> None:
    end = time.monotonic() + START_S
    waiting = list(models)
    with httpx.Client(base_url=url, trust_env=False) as client:
        while waiting:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                waiting = [model for model in waiting if not client.get(f"/v2/models/{model}/ready").is_success]
            time.sleep(0.1)
