"""``bagel-triton serve`` around a real tritonserver with models of no weight: its start and its end."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from bagel_triton.deploy.topology import BAGEL_SINGLE_STAGE
from tests.support.waiting import soon

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "tiny-a"
# One model, and no hand-over between stages to be tested before READY.
DEPLOY = ROOT / "build" / "deploy" / "bagel_single_stage.yaml"
SHARED_MEMORY = Path("/dev/shm")
START_S, STOP_S = 120, 15
CONFIG = """
backend: "python"
max_batch_size: 0
input [{ name: "x" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [-1] }]
instance_group [{ kind: KIND_CPU }]
"""
MODEL = """
import time

class TritonPythonModel:
    def initialize(self, args):
        INITIALIZE

    def execute(self, requests):
        return []
"""


class Server:
    """A ``bagel-triton serve`` process and what it has printed."""

    def __init__(self, repository: Path, directory: Path) -> None:
        self.directory = directory
        command = [sys.executable, "-m", "bagel_triton.serving.cli", "serve", str(CHECKPOINT), "--port", "0"]
        command += ["--deploy-config", str(DEPLOY)]
        self.errors = directory / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, "--model-repository", str(repository)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TMPDIR": str(directory)},
            )

    def line(self, start: str) -> str:
        """The rest of the next line that starts with ``start``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().startswith(start):
                return line.strip().removeprefix(start).strip()
        pytest.fail(f"no line {start!r}; on stderr: {self.errors.read_text()}")

    def family(self) -> set[int]:
        """Process ids of tritonserver and its stubs."""
        parents = {pid: parent for pid, parent in map(_parent, _process_ids()) if parent}
        found = {self.process.pid}
        while children := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= children
        return found - {self.process.pid}

    def files(self) -> list[str]:
        """The files this server has in shared memory."""
        return [path.name for path in SHARED_MEMORY.glob(f"bagel_triton_{self.process.pid}_*")]

    def run_directories(self) -> list[Path]:
        return list(self.directory.glob("bagel_triton_*"))


def _process_ids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _parent(pid: int) -> tuple[int, int]:
    """``pid`` and its parent's id, 0 when it has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return pid, 0
    return pid, 0 if state == "Z" else int(parent)


def _living(pids: set[int]) -> set[int]:
    return {pid for pid in pids if _parent(pid)[1]}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server whose models run the given line when they load."""
    started: list[Server] = []

    def start(initialize: str = "pass", only: str | None = None) -> Server:
        repository = tmp_path / f"models{len(started)}"
        for model in BAGEL_SINGLE_STAGE.models:
            (repository / model / "1").mkdir(parents=True)
            (repository / model / "config.pbtxt").write_text(CONFIG)
            line = initialize if only in (None, model) else "pass"
            (repository / model / "1" / "model.py").write_text(MODEL.replace("INITIALIZE", line))
        directory = tmp_path / f"run{len(started)}"
        directory.mkdir()
        started.append(Server(repository, directory))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.terminate()
        server.process.communicate(timeout=STOP_S)


@pytest.mark.parametrize("signal_", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_it_is_healthy_when_ready_and_leaves_nothing(serve: Callable[..., Server], signal_: signal.Signals):
    server = serve("time.sleep(1)")
    length = "64 tokens of prompt and max_tokens=2048"
    assert server.line("KV pool") == f"32768 tokens: 15 texts at once, of {length}; max_num_seqs is 64"
    assert server.line("KV connector") == "local (pipeline bagel_single_stage is one process)"
    url = server.line("OpenAI API")
    assert soon(lambda: bool(server.family()), START_S)
    assert httpx.get(f"{url}/health", timeout=30).status_code == 503
    assert server.line("READY") == url
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200
    [model] = httpx.get(f"{url}/v1/models", timeout=30).json()["data"]
    names = [model["id"], *model["aliases"]]
    assert names == ["tiny-a", "bagel", "BAGEL-7B-MoT", "ByteDance-Seed/BAGEL-7B-MoT"]
    family = server.family()
    assert len(family) == 2 + len(BAGEL_SINGLE_STAGE.models)  # tritonserver and its guard
    assert server.files() != []
    assert len(server.run_directories()) == 1

    server.process.send_signal(signal_)
    assert server.process.wait(STOP_S) == 0
    assert _living(family) == set()
    assert server.files() == []
    assert server.run_directories() == []
    [access] = server.errors.read_text().splitlines()
    assert " INFO 200 GET /v1/models " in access


def test_it_stops_while_models_load(serve: Callable[..., Server]):
    server = serve("time.sleep(600)")
    assert soon(lambda: len(server.family()) > 1, START_S)
    family = server.family()
    server.process.terminate()
    assert server.process.wait(STOP_S) == 0
    assert _living(family) == set()
    assert server.files() == []
    assert server.run_directories() == []


def test_a_model_that_fails_to_load_is_one_clear_line(serve: Callable[..., Server]):
    server = serve("raise ValueError('layer 3 is missing')", only="bagel")
    assert server.process.wait(START_S) == 1
    error = server.errors.read_text()
    said = re.fullmatch(
        r"bagel-triton: error: tritonserver ended .*; its log: (\S+)\): .*'bagel'.*layer 3 is missing\n", error
    )
    assert said, error
    assert "layer 3 is missing" in Path(said[1]).read_text()
    assert server.files() == []


def test_it_ends_when_tritonserver_dies(serve: Callable[..., Server]):
    server = serve()
    server.line("READY")
    family = server.family()
    os.kill(min(pid for pid in family if _parent(pid)[1] == server.process.pid), signal.SIGKILL)
    assert server.process.wait(STOP_S) == 1
    assert server.errors.read_text().startswith("bagel-triton: error: tritonserver ended (signal SIGKILL; its log: ")
    assert _living(family) == set()
    assert server.files() == []


def test_a_killed_supervisor_leaves_no_process_and_the_next_sweeps_its_files(serve: Callable[..., Server]):
    killed = serve()
    killed.line("READY")
    family = killed.family()
    killed.process.kill()
    killed.process.wait()
    assert soon(lambda: not _living(family), STOP_S)
    assert killed.files() != []

    following = serve()
    following.line("READY")
    assert killed.files() == []
    assert following.files() != []
