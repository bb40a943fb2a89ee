"""The setting of a bench run, and helpers that run stages."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bagel_triton.deploy.config import DeployConfig, ThinkerConfig
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.pipeline.pipeline import StageCall
from bagel_triton.protocol.events import Event, StageStats
from bagel_triton.protocol.messages import DenoiseJob, Plan
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig

Result = TypeVar("Result")
WAIT_S = 600.0
# Large enough that matrix products take most of a step, small enough for two cores.
GEOMETRY = TinyConfig(hidden_size=512, layers=8, heads=8, kv_heads=2, intermediate_size=1408)
CHECKPOINT = Path(".cache/bench")


@dataclass(frozen=True)
class Setting:
    """A checkpoint on a device, and how often each measurement is repeated."""

    checkpoint: Path
    device: str = "cpu"
    trials: int = 5

    @contextmanager
    def stages(self) -> Iterator[LocalStages]:
        """Every stage in this process; one that waits for another's bench is not taken for dead."""
        config = DeployConfig(str(self.checkpoint), device=self.device, thinker=ThinkerConfig(lease_ttl_s=WAIT_S))
        stages = LocalStages(config)
        try:
            yield stages
        finally:
            stages.close()


def ensure_checkpoint(directory: Path = CHECKPOINT) -> Path:
    """The random checkpoint of :data:`GEOMETRY`, made where it is not there yet."""
    if not directory.is_dir():
        tiny_checkpoint.write(directory, GEOMETRY)
    return directory


def answer(call: StageCall[Result], hear: Callable[[Event], None] = lambda event: None) -> tuple[Result, StageStats]:
    """A stage's answer and its timing; progress goes to ``hear``. Raises the stage's error."""
    following: Generator[Event, None, tuple[Result, StageStats]] = call.follow(lambda: False, WAIT_S)
    while True:
        try:
            hear(next(following))
        except StopIteration as end:
            result: tuple[Result, StageStats] = end.value
            return result


def plan_of(stages: LocalStages, request: GenerationRequest) -> Plan:
    """The plan of a request."""
    return answer(stages.expand(request))[0]


def denoise_job(stages: LocalStages, request: GenerationRequest) -> DenoiseJob:
    """``request`` for an image up to its contexts, lent."""
    job = answer(stages.think(plan_of(stages, request)))[0].job
    assert job is not None, "the request is for an image"
    return job


def image_request(height: int, width: int, steps: int, seed: int = 0) -> GenerationRequest:
    """Text to image, guided at every step."""
    return GenerationRequest(
        prompt="A cute cat that sits on a table",
        height=height,
        width=width,
        num_inference_steps=steps,
        seed=seed,
        cfg_interval=(0.0, 1.0),
    )
