"""Triton's rim of the flow stage: leased contexts in, latents out."""

from collections.abc import Callable

import numpy as np

from bagel_triton.engine.build import Parts, build_dit
from bagel_triton.engine.dit import DitEngine, Latents
from bagel_triton.messages import DenoiseJob, ProgressEvent
from bagel_triton.request import Arrays
from bagel_triton.stage_model import StageModel
from bagel_triton.triton_io import Reply, message_of


def outputs(latents: Latents, seed: int) -> Arrays:
    """``latents`` [tokens, channels] float32, their grid, [rows, columns], and the noise's seed."""
    return {
        "seed": np.array([seed], dtype=np.int64),
        "latents": latents.tokens.cpu().numpy(),
        "latent_grid": np.array([latents.rows, latents.columns], dtype=np.int32),
    }


def ignore(event: ProgressEvent) -> None:
    """An ensemble takes every response for the answer: it gets no progress."""


class TritonPythonModel(StageModel):
    """``contexts`` -> ``latents``, ``latent_grid``, ``seed``; events in between where ``progress`` is true."""

    def build(self, parts: Parts, gauge: Callable[[str, float], None]) -> DitEngine:
        """The engine."""
        return build_dit(parts)

    def accept(self, inputs: Arrays, reply: Reply) -> None:
        """Queue a picture."""
        job = message_of(inputs, "contexts", DenoiseJob)
        wanted = "progress" in inputs and bool(inputs["progress"].reshape(-1)[0])
        visit = self.engine.submit(job, job.request_id, reply.progress if wanted else ignore)
        reply.settle(visit.done, lambda latents: outputs(latents, job.flow.seed))
