"""The flow stage as a Triton model: leased KV in, latents out."""

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch

from bagel_triton.engine.build import StageResources, build_dit
from bagel_triton.engine.dit.engine import DitEngine
from bagel_triton.engine.dit.run import Latents
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import DenoiseJob, KVHandle, decode_handle
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.triton.io import bytes_array, mapped, message_array, message_of, text_of
from bagel_triton.triton.stage_model import StageModel
from bagel_triton.triton.tickets import Work


def handle_of(inputs: Arrays) -> KVHandle:
    """The lease in the input ``selftest``."""
    try:
        return decode_handle(text_of(inputs, "selftest").encode())
    except ValueError as error:
        raise InvalidRequest(f"input selftest is not a lease: {error}", "selftest") from error


class TritonPythonModel(StageModel):
    """``denoise_job`` -> ``latents``, ``latent_grid``, ``seed``, ``scheduling``."""

    def build(self, resources: StageResources) -> DitEngine:
        """The engine."""
        return build_dit(resources, self.metrics)

    def work(self, inputs: Arrays, request_id: str) -> Work:
        """A request's images."""
        job = message_of(inputs, "denoise_job", DenoiseJob)

        def outputs(images: Sequence[Latents]) -> Arrays:
            return {
                "latents": torch.cat([image.tokens for image in images]).cpu().numpy(),
                "latent_grid": np.array([images[0].rows, images[0].columns], dtype=np.int32),
                "seed": np.array([job.flow.seed], dtype=np.int64),
                "scheduling": message_array(job.scheduling),  # for the decoder
            }

        return Work(job, job.request_id, outputs, job.scheduling)

    def selftest(self, inputs: Arrays) -> Future[Arrays]:
        """Read the pattern that the thinker lent; the connector's name."""
        handle = handle_of(inputs)
        name = bytes_array(handle.connector.encode())
        return mapped(self.engine.read_pattern(handle), lambda _: {"selftest": name})
