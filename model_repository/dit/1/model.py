"""Triton's rim of the flow stage: leased contexts in, latents out."""

from collections.abc import Sequence

import numpy as np
import torch

from bagel_triton.contexts import ContextHandle, DenoiseJob, decode_handle
from bagel_triton.engine.build import Parts, build_dit
from bagel_triton.engine.dit import DitEngine
from bagel_triton.engine.flow_run import Latents
from bagel_triton.errors import InvalidRequest
from bagel_triton.request import Arrays
from bagel_triton.stage_model import StageModel
from bagel_triton.triton_io import Reply, bytes_array, message_of, text_of


def handle_of(inputs: Arrays) -> ContextHandle:
    """The lease in the input ``selftest``."""
    try:
        return decode_handle(text_of(inputs, "selftest").encode())
    except ValueError as error:
        raise InvalidRequest(f"input selftest is not a lease: {error}", "selftest") from error


def outputs(pictures: Sequence[Latents], seed: int) -> Arrays:
    """``latents`` [pictures * tokens, channels] float32, a picture's grid, [rows, columns], and the seed."""
    return {
        "latents": torch.cat([picture.tokens for picture in pictures]).cpu().numpy(),
        "latent_grid": np.array([pictures[0].rows, pictures[0].columns], dtype=np.int32),
        "seed": np.array([seed], dtype=np.int64),
    }


class TritonPythonModel(StageModel):
    """``contexts`` -> ``latents``, ``latent_grid``, ``seed``; events where ``progress`` is true."""

    def build(self, parts: Parts) -> DitEngine:
        """The engine."""
        return build_dit(parts, self.metrics)

    def accept(self, inputs: Arrays, reply: Reply) -> None:
        """Queue a request's pictures, or read what the thinker lent for the self-test."""
        if "selftest" in inputs:
            handle = handle_of(inputs)
            name = bytes_array(handle.connector.encode())
            reply.answer(self.engine.read_pattern(handle), lambda _: {"selftest": name})
            return
        task = message_of(inputs, "contexts", DenoiseJob)
        job = self.work(task, task.request_id, inputs, reply, task.schedule)
        reply.settle(job.done, lambda pictures: outputs(pictures, task.flow.seed))
