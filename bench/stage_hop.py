"""The cost of a stage call: tickets by BLS, tickets over gRPC, and a gRPC stream a call, in one server.

The worker answers at once, after two events; so a hop's time is all overhead.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from bagel_triton.ipc import shm as shared_memory
from bagel_triton.serving import machine, tritonserver
from bench.figure import Figure
from bench.setting import Setting

NAME = "stage_hop"
MODELS = Path(__file__).with_name("hop_models")
WAYS = ("BLS tickets", "grpc tickets", "grpc stream")
# At once, and float32 numbers there and back: a message between stages, a large image's latents.
LOADS = ((1, 100), (8, 100), (32, 100), (4, 262_144))
SECONDS, START_S = 8.0, 60.0


def run(setting: Setting, loads: Sequence[tuple[int, int]] = LOADS, seconds: float = SECONDS) -> list[Figure]:
    """Hops a second, and the median and the 99th percentile of a hop's time, for each way and load."""
    figures = []
    with tempfile.TemporaryDirectory(prefix="bagel_triton_") as folder, _server(Path(folder)) as address:
        for at_once, elements in loads:
            for way in WAYS:
                taken = _measured(address, way, at_once, elements, seconds)
                size = "400 B" if elements == 100 else f"{elements * 4 / 2**20:g} MiB"
                where = f"{way}, {size}, {at_once} at a time"
                figures.append(Figure(NAME, where, len(taken) / seconds, "hops/s"))
                figures.append(Figure(NAME, where, float(np.median(taken)) * 1e3, "ms, median"))
                figures.append(Figure(NAME, where, float(np.quantile(taken, 0.99)) * 1e3, "ms, 99 %"))
    return figures


def _measured(address: str, way: str, at_once: int, elements: int, seconds: float) -> NDArray[np.float64]:
    texts = {"way": way, "grpc": address}
    numbers = {"elements": np.int32(elements), "at_once": np.int32(at_once), "seconds": np.float64(seconds)}
    arrays = {name: np.array([text.encode()], dtype=np.object_) for name, text in texts.items()}
    arrays |= {name: np.array([number]) for name, number in numbers.items()}
    types = {"elements": "INT32", "at_once": "INT32", "seconds": "FP64"}
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, [1], types.get(name, "BYTES")))
        inputs[-1].set_data_from_numpy(array)
    with triton.InferenceServerClient(address) as client:
        latencies: NDArray[np.float64] = client.infer("hop_caller", inputs).as_numpy("latencies")
    return latencies


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str]:
    """The gRPC address of a tritonserver with the three models."""
    http, grpc, metrics = machine.choose_ports({"http": 0, "grpc": 0, "metrics": 0}).values()
    models = [path.name for path in MODELS.iterdir() if path.is_dir()]
    with shared_memory.SharedMemoryPrefix() as shared:
        server = tritonserver.find(folder)
        command = server.command(
            MODELS,
            models,
            http_port=http,
            grpc_port=grpc,
            metrics_port=metrics,
            shm_prefix=shared.prefix,
            verbose=False,
        )
        log = folder / "log"
        with log.open("wb") as output:
            environment = server.environment(folder / "none") | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, env=dict(os.environ) | environment, stdout=output, stderr=output)
        try:
            address = f"{machine.LOOPBACK}:{grpc}"
            _wait(process, address, models, log)
            yield address
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, models: Sequence[str], log: Path) -> None:
    end = time.monotonic() + START_S
    with triton.InferenceServerClient(address) as client:
        while True:
            with contextlib.suppress(triton.InferenceServerException):
                if all(client.is_model_ready(model) for model in models):
                    return
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
