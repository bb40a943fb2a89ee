"""Sleep and wake: memory that is really free, the same pixels afterwards, and requests meanwhile."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig
from bagel_triton.engine.build import StageResources, build_decoder, build_dit, build_thinker
from bagel_triton.engine.dit.engine import DitEngine
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.engine.sleep import SleepingEngine
from bagel_triton.engine.thinker.engine import ThinkerEngine
from bagel_triton.engine.vae import DecoderEngine
from bagel_triton.ipc.shm import SHM_DIRECTORY
from bagel_triton.ipc.sleep_gate import SleepGate
from bagel_triton.parallel.group import RankGroup
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.errors import Asleep, Cancelled, DeadlineExceeded, StageUnavailable
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.protocol.sleep import SleepCall, SleepState
from bagel_triton.telemetry.metrics import NoMetrics
from bagel_triton.triton.sleep import ServerSleep
from bench.process_memory import ProcessMemory
from tests.support.leaks import Leaks
from tests.support.runs import generate, result_of, think
from tests.support.waiting import soon

MIB = 2**20
IMAGE = GenerationRequest(prompt="A cute cat", height=32, width=32, seed=1, num_inference_steps=3)
LONG = GenerationRequest(prompt="A cute cat", height=160, width=160, seed=1, num_inference_steps=60)


class SleepingStages(LocalStages):
    """A server's three stages, each with resources of its own as in processes of their own."""

    def __init__(self, config: DeployConfig) -> None:
        def open_() -> StageResources:
            return StageResources.open(config)

        self.planner = RequestPlanner.open(config)
        self.sleepers = {
            "thinker": SleepingEngine(open_, build_thinker),
            "dit": SleepingEngine(open_, build_dit),
            "vae_decode": SleepingEngine(open_, build_decoder),
        }

    @property
    def thinker(self) -> ThinkerEngine:  # type: ignore[override]
        return self.sleepers["thinker"].engine  # type: ignore[return-value]

    @property
    def dit(self) -> DitEngine:  # type: ignore[override]
        return self.sleepers["dit"].engine  # type: ignore[return-value]

    @property
    def decoder(self) -> DecoderEngine:  # type: ignore[override]
        return self.sleepers["vae_decode"].engine  # type: ignore[return-value]

    def change(self, level: int) -> None:
        for sleeper in self.sleepers.values():
            sleeper.change(level)
        for name, sleeper in self.sleepers.items():
            sleeper.wait()
            assert sleeper.state() == (level, False, ""), name

    def close(self) -> None:
        for sleeper in self.sleepers.values():
            sleeper.close()


@pytest.fixture
def prefix() -> Iterator[str]:
    """Of a server's files, none of which is left."""
    prefix = f"bagel_triton_test_{secrets.token_hex(4)}"
    yield prefix
    for path in SHM_DIRECTORY.glob(f"{prefix}*"):
        path.unlink()


@pytest.fixture
def stages(checkpoint_dir: Path, prefix: str) -> Iterator[SleepingStages]:
    """Stages whose weights are quantised, so that they are in shared memory, with 64 MiB of KV cache.

    The DiT's layers are offloaded.
    """
    config = DeployConfig(
        checkpoint=str(checkpoint_dir),
        device="cpu",
        dtype="float32",
        shm_prefix=prefix,
        thinker=ThinkerConfig(kv_tokens=64 * MIB // 1024, quantization="int8"),
        dit=DitConfig(quantization="int8", cpu_offload_gb=1.0),
    )
    running = SleepingStages(config)
    yield running
    running.close()


def kinds(prefix: str) -> set[str]:
    return {path.name.removeprefix(prefix).split("_")[1] for path in SHM_DIRECTORY.glob(f"{prefix}_*")}


@pytest.mark.parametrize(("level", "left"), [(1, {"weights"}), (2, set())])
def test_a_sleep_frees_memory_and_changes_no_pixel(
    stages: SleepingStages, prefix: str, level: int, left: set[str]
) -> None:
    before = generate(stages, IMAGE).pixels[0]
    assert kinds(prefix) == {"weights", "kv"}
    stages.change(level)
    assert kinds(prefix) == left
    for name in ("thinker", "dit", "decoder"):
        with pytest.raises(Asleep):
            getattr(stages, name)
    stages.change(0)
    assert torch.equal(generate(stages, IMAGE).pixels[0], before)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_sleeps_later_the_process_is_as_large_as_before(stages: SleepingStages) -> None:
    """In the first hundred, the libraries allocate buffers for each thread that computes at the same time as others."""
    expected = generate(stages, IMAGE).pixels[0]
    sizes, leaks = [], Leaks()
    for cycle in range(300):
        stages.change(1 + cycle % 2)
        if cycle == 10:
            leaks = Leaks()
        if cycle in (99, 299):
            sizes.append(ProcessMemory.own().anonymous)
            assert not leaks.threads()
        stages.change(0)
        assert torch.equal(generate(stages, IMAGE).pixels[0], expected)
    assert sizes[1] - sizes[0] < 3 * MIB, sizes


def test_a_job_in_flight_ends_before_its_stage_sleeps(stages: SleepingStages) -> None:
    _, job = think(stages, LONG)
    call = stages.denoise(job)
    stages.sleepers["dit"].change(2)
    with pytest.raises(Asleep):
        stages.denoise(job)
    assert len(result_of(call)) == 1
    stages.sleepers["dit"].wait()
    assert stages.sleepers["dit"].state() == (2, False, "")


def test_a_deeper_sleep_frees_the_weights_and_a_lighter_one_does_not_bring_them_back(
    stages: SleepingStages, prefix: str
) -> None:
    stages.change(1)
    stages.change(2)
    assert kinds(prefix) == set()
    sleeper = stages.sleepers["thinker"]
    sleeper.change(1)
    sleeper.wait()
    assert sleeper.level == 2


def test_ranks_that_cannot_be_used_are_not_in_the_way_of_the_next_wake(
    checkpoint_dir: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither they nor the KV cache outlive a failed wake."""
    thinker = ThinkerConfig(tensor_parallel_size=2)
    config = DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32", shm_prefix=prefix, thinker=thinker)
    sleeper = SleepingEngine(lambda: StageResources.open(config), build_thinker)
    sleeper.change(1)
    sleeper.wait()
    with monkeypatch.context() as patched:

        def fails(group: RankGroup, pool: object) -> None:
            raise MemoryError("no room")

        patched.setattr(RankGroup, "attach", fails)
        sleeper.change(0)
        sleeper.wait()
    assert sleeper.state() == (1, False, "INTERNAL: Internal(): MemoryError: no room")
    assert "kv" not in kinds(prefix)
    sleeper.change(0)
    sleeper.wait()
    assert sleeper.state() == (0, False, "")
    sleeper.close()


def test_an_engine_that_cannot_wake_says_why_and_stays_asleep(stages: SleepingStages) -> None:
    sleeper = stages.sleepers["thinker"]
    sleeper.change(2)
    sleeper.wait()

    def no_room() -> StageResources:
        raise MemoryError("no room")

    opened, sleeper._open = sleeper._open, no_room
    sleeper.change(0)
    sleeper.wait()
    assert (sleeper.level, sleeper.failure) == (2, "INTERNAL: Internal(): MemoryError: no room")
    sleeper._open = opened
    sleeper.change(0)
    sleeper.wait()
    assert sleeper.state() == (0, False, "")


class FakeSleeper:
    """A stage that changes at once, or fails."""

    def __init__(self, failure: str = "") -> None:
        self.level, self.failure = 0, failure

    def change(self, level: int) -> None:
        self.level = self.level if self.failure else level

    def state(self) -> tuple[int, bool, str]:
        return self.level, False, self.failure


def server(prefix: str, policy: str, *sleepers: FakeSleeper) -> ServerSleep:
    named = {f"stage {number}": sleeper for number, sleeper in enumerate(sleepers)}
    return ServerSleep(SleepGate(prefix), policy, lambda: named, NoMetrics())  # type: ignore[arg-type]


def never() -> bool:
    return False


def test_requests_in_flight_of_every_orchestrator_end_first_and_new_ones_wait(prefix: str) -> None:
    stage = FakeSleeper()
    one, other = server(prefix, "wait", stage), server(prefix, "wait", stage)
    answers: list[SleepState] = []
    waited: list[float] = []
    heard = threading.Event()

    def sleep() -> None:
        answers.append(one.answer(SleepCall("sleep", 2), never))

    def request() -> None:
        with other.request(never, 60.0, heard.set) as seconds:
            waited.append(seconds)

    with other.request(never, 60.0, lambda: None) as at_once:
        sleeping = threading.Thread(target=sleep)
        sleeping.start()
        assert soon(lambda: SleepGate(prefix).level == 2)
        assert (at_once < 1, stage.level, answers) == (True, 0, [])
        waiting = threading.Thread(target=request)
        waiting.start()
    sleeping.join()
    assert answers == [SleepState("asleep", 2, "wait")]
    assert heard.wait(10)
    assert waited == []
    assert one.answer(SleepCall("wake"), never) == SleepState("awake", 0, "wait")
    waiting.join()
    assert len(waited) == 1
    assert stage.level == 0


def test_requests_are_refused_time_out_or_leave_meanwhile(prefix: str) -> None:
    refusing, waiting = server(prefix, "refuse", FakeSleeper()), server(prefix, "wait", FakeSleeper())
    refusing.answer(SleepCall("sleep"), never)
    with pytest.raises(Asleep, match="asleep; try again later"), refusing.request(never, 1.0, lambda: None):
        pass
    with pytest.raises(DeadlineExceeded), waiting.request(never, 0.1, lambda: None):
        pass
    with pytest.raises(Cancelled), waiting.request(lambda: True, 9.0, lambda: None):
        pass


def test_a_server_that_drains_finishes_its_requests_and_refuses_others(prefix: str) -> None:
    one, other = server(prefix, "wait"), server(prefix, "wait")
    with one.request(never, 1.0, lambda: None):
        assert other.answer(SleepCall("drain"), never) == SleepState("draining", 0, "refuse")
        with pytest.raises(StageUnavailable, match="the server drains: it finishes the requests that it has"):
            other.request(never, 1.0, lambda: None).__enter__()
        assert one.answer(SleepCall("state"), never).state == "draining"
    assert one.answer(SleepCall("state"), never).state == "drained"
    assert one.answer(SleepCall("resume"), never) == SleepState("awake", 0, "wait")
    with other.request(never, 1.0, lambda: None):
        pass


def test_a_stage_that_fails_to_sleep_or_wake_is_named(prefix: str) -> None:
    failing = FakeSleeper("INTERNAL: Internal(): no room")
    with pytest.raises(StageUnavailable, match="stage 1 could not sleep: no room"):
        server(prefix, "wait", FakeSleeper(), failing).answer(SleepCall("sleep"), never)
    assert server(prefix, "wait").answer(SleepCall("state"), never).state == "asleep"


def test_who_asked_for_a_sleep_may_leave_before_it_begins(prefix: str) -> None:
    both = server(prefix, "wait", FakeSleeper())
    with both.request(never, 9.0, lambda: None):
        with pytest.raises(Cancelled):
            both.answer(SleepCall("sleep"), lambda: True)
        assert both.answer(SleepCall("state"), never) == SleepState("awake", 0, "wait")
    with pytest.raises(Cancelled):
        both.answer(SleepCall("sleep"), lambda: True)  # it waited for another change until its client left
    assert both.answer(SleepCall("state"), never) == SleepState("awake", 0, "wait")
