"""The error of a request that waits too long for the thinker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bagel_triton.deploy.config import DeployConfig, ThinkerConfig
from bagel_triton.engine.loop import Job
from bagel_triton.engine.thinker.engine import Admission
from bagel_triton.engine.thinker.run import ThinkerRun
from bagel_triton.kv.block_pool import PrefixCache
from bagel_triton.kv.connectors.local import LocalProducer
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.errors import Overloaded
from bagel_triton.protocol.messages import Plan, SchedulingParams, ThinkerOutput
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving.memory_plan import pool_summary
from bagel_triton.telemetry.metrics import NoMetrics
from bagel_triton.weights.checkpoint import Checkpoint
from tests.support.runs import result_of

Admit = Callable[..., list[ThinkerRun]]
SMALL = GenerationRequest(prompt="A cute cat", height=32, width=32, seed=1, num_inference_steps=3)


@pytest.fixture
def admit(local_stages: LocalStages, checkpoint_dir: Path) -> Admit:
    """Admits requests of these names one after the other; returns those that run."""
    plan = result_of(local_stages.expand(SMALL))

    def admit_all(*names: str, **limits: float) -> list[ThinkerRun]:
        pool, config = local_stages.producer.pool, ThinkerConfig(admission_timeout_s=1e-9, **limits)
        model = Checkpoint(checkpoint_dir).config
        admission = Admission(model, local_stages.producer, PrefixCache(pool), config, NoMetrics(), {})
        running: list[ThinkerRun] = []
        for name in names:
            admission.admit(Job[Plan, ThinkerOutput](name, plan, lambda event: None, SchedulingParams()), running)
        return running

    return admit_all


def test_as_many_texts_are_admitted_as_the_pools_summary_says(local_stages: LocalStages, checkpoint_dir: Path) -> None:
    config = DeployConfig(str(checkpoint_dir), thinker=ThinkerConfig(kv_tokens=4 * 134 * 16 - 1))
    assert pool_summary(config).startswith("8575 tokens: 4 texts at once, of 64 tokens of prompt and max_tokens=2048;")
    plan = result_of(local_stages.expand(GenerationRequest(prompt="A cute cat " * 11, modality="text")))
    for blocks, texts in ((536, 4), (535, 3)):
        producer = LocalProducer(local_stages.producer.pool.geometry, blocks, torch.device("cpu"))
        parts = producer, PrefixCache(producer.pool), config.thinker, NoMetrics(), {}
        admission, running = Admission(Checkpoint(checkpoint_dir).config, *parts), list[ThinkerRun]()
        jobs = (Job[Plan, ThinkerOutput](str(n), plan, lambda event: None, SchedulingParams()) for n in range(5))
        while admission.admit(next(jobs), running):
            pass
        assert len(running) == texts
        assert 48 < running[0].branches[0].total_tokens <= 64


def test_one_request_too_many_gets_the_name_of_the_limit(admit: Admit) -> None:
    assert len(admit("first", "second", max_num_seqs=2)) == 2
    with pytest.raises(Overloaded, match=r"no room for \d+ s: it works on thinker\.max_num_seqs=1 requests$"):
        admit("first", "second", max_num_seqs=1)
