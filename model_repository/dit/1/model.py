"""Triton's rim of the flow stage: leased contexts in, latents out."""

from collections.abc import Sequence

import numpy as np
import torch

from bagel_triton.engine.build import StageResources, build_dit
from bagel_triton.engine.dit.engine import DitEngine
from bagel_triton.engine.dit.run import Latents
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import DenoiseJob, KVHandle, decode_handle
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.triton.io import Reply, bytes_array, message_of, text_of
from bagel_triton.triton.stage_model import StageModel


def handle_of(inputs: Arrays) -> KVHandle:
    """The lease in the input ``selftest``."""
    try:
        return decode_handle(text_of(inputs, "selftest").encode())
    except ValueError as error:
        raise InvalidRequest(f"input selftest is not a lease: {error}", "selftest") from error


def outputs(images: Sequence[Latents], seed: int) -> Arrays:
    """``latents`` [images * tokens, channels] float32, an image's grid, [rows, columns], and the seed."""
    return {
        "latents": torch.cat([image.tokens for image in images]).cpu().numpy(),
        "latent_grid": np.array([images[0].rows, images[0].columns], dtype=np.int32),
        "seed": np.array([seed], dtype=np.int64),
    }


class TritonPythonModel(StageModel):
    """``contexts`` -> ``latents``, ``latent_grid``, ``seed``; events where ``progress`` is true."""

    def build(self, parts: StageResources) -> DitEngine:
        """The engine."""
        return build_dit(parts, self.metrics)

    def accept(self, inputs: Arrays, reply: Reply) -> None:
        """Queue a request's images, or read what the thinker lent for the self-test."""
        if "selftest" in inputs:
            handle = handle_of(inputs)
            name = bytes_array(handle.connector.encode())
            reply.answer(self.engine.read_pattern(handle), lambda _: {"selftest": name})
            return
        task = message_of(inputs, "contexts", DenoiseJob)
        job = self.work(task, task.request_id, inputs, reply, task.schedule)
        reply.settle(job.done, lambda images: outputs(images, task.flow.seed))
