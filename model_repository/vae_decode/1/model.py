"""The pixel stage as a Triton model: latents in, a uint8 image out."""

import torch

from bagel_triton.engine.build import StageResources, build_decoder
from bagel_triton.engine.dit.run import Latents
from bagel_triton.engine.vae import DecoderEngine
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import SchedulingParams
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.triton.io import message_of
from bagel_triton.triton.stage_model import StageModel
from bagel_triton.triton.tickets import Work


class TritonPythonModel(StageModel):
    """``latents``, ``latent_grid``, optional ``scheduling`` -> ``generated_image``."""

    def build(self, resources: StageResources) -> DecoderEngine:
        """The engine."""
        latent = resources.checkpoint.config.latent
        self._channels, self._longest = latent.token_channels, latent.max_side // latent.stride
        return build_decoder(resources, self.metrics)

    def work(self, inputs: Arrays, request_id: str) -> Work:
        """One image's latents."""
        for name in ("latents", "latent_grid"):
            if name not in inputs:
                raise InvalidRequest(f"input {name} is required", name)
        rows, columns = (int(side) for side in inputs["latent_grid"])
        shape = list(inputs["latents"].shape)
        if not (1 <= rows <= self._longest and 1 <= columns <= self._longest):
            allowed = f"rows and columns from 1 to {self._longest}"
            raise InvalidRequest.value("latent_grid", [rows, columns], allowed)
        if shape != [rows * columns, self._channels]:
            allowed = f"[rows * columns, {self._channels}] of latent_grid, here [{rows}, {columns}]"
            raise InvalidRequest.value("latents", f"shape {shape}", allowed)
        latents = Latents(torch.from_numpy(inputs["latents"].copy()), rows, columns)
        known = "scheduling" in inputs
        scheduling = message_of(inputs, "scheduling", SchedulingParams) if known else SchedulingParams()
        return Work(latents, request_id, lambda image: {"generated_image": image.numpy()}, scheduling)
