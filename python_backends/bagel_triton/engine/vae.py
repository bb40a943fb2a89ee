"""The decoding stage: latents to uint8 images, those of one size together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bagel_triton.deploy.config import VaeDecodeConfig
from bagel_triton.engine.dit.run import Latents
from bagel_triton.engine.loop import EngineLoop, Job
from bagel_triton.model.autoencoder import Autoencoder, decode, unpack_latents
from bagel_triton.model.config import LatentConfig
from bagel_triton.model.cpu import strip_decoder as strips
from bagel_triton.model.device import whole_images_on
from bagel_triton.protocol.errors import Cancelled
from bagel_triton.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from bagel_triton.parallel.group import RankGroup

DecodeJob = Job[Latents, Tensor]


class DecoderEngine(EngineLoop[Latents, Tensor]):
    """Owns the autoencoder's decoder, from one thread; results are uint8 [height, width, 3].

    Previews wait behind all images, and are dropped once their request's image is there. ``ranks`` decode, if there
    are any; they are closed with it.
    """

    stage = "vae_decode"

    def __init__(
        self,
        autoencoder: Autoencoder,
        latent: LatentConfig,
        config: VaeDecodeConfig,
        metrics: Metrics | None = None,
        ranks: RankGroup | None = None,
    ) -> None:
        device = next(autoencoder.parameters()).device
        super().__init__(metrics, config.max_waiting, device=device)
        self._autoencoder, self._latent, self._config = autoencoder, latent, config
        # On a CPU batching gains nothing, and a convolution's rounding depends on the batch.
        self._limit = 1 if device.type == "cpu" else config.max_batch_size
        self._in_strips: Callable[[Tensor], Tensor] = partial(strips.decode_in_strips, autoencoder.decoder)
        self._whole = whole_images_on(device, autoencoder.decoder)
        self._ranks = ranks
        if ranks is not None:
            self._in_strips = self._whole = ranks.decode
            ranks.join(self.end)
        self._batch: list[DecodeJob] = []
        self.start()

    def _active(self) -> list[DecodeJob]:
        return list(self._batch)

    def _housekeep(self) -> bool:
        waiting = list(self._waiting)
        finished = {job.request_id for job in waiting if not job.scheduling.preview}
        for job in waiting:
            if job.scheduling.preview and job.request_id in finished:
                self._fail(job, Cancelled(f"the image of request {job.request_id} came before its preview"))
        return False

    def _admit(self, job: DecodeJob) -> bool:
        if self._batch:
            first = self._batch[0].task
            same_size = (first.rows, first.columns) == (job.task.rows, job.task.columns)
            if not same_size or len(self._batch) >= self._limit:
                return False
        self._batch.append(job)
        return True

    @torch.inference_mode()
    def _step(self) -> None:
        latents = torch.stack(
            [
                unpack_latents(job.task.tokens, job.task.rows, job.task.columns, self._latent.patch_size)
                for job in self._batch
            ]
        )
        pixels = latents.shape[2] * latents.shape[3] * self._latent.downsample**2
        large = pixels > strips.WORTH_IT
        decoder = self._in_strips if large and self._config.use_tiling is not False else self._whole
        # Large images fill a GPU alone, and together only take more of its memory.
        parts = latents.split(1 if large else len(latents))
        images = torch.cat([decode(self._autoencoder, part, decoder) for part in parts]).cpu()
        batch, self._batch = self._batch, []
        for job, image in zip(batch, images, strict=True):
            job.finish(image, self.stage)

    def _free(self, job: DecodeJob) -> None:
        self._batch.remove(job)

    def close(self) -> None:
        """Stop the thread, and the ranks."""
        super().close()
        if self._ranks is not None:
            self._ranks.close()
