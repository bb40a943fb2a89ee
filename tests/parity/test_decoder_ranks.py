"""Images decoded by several ranks, each some rows: the pixels of one rank, and the end of the stage with a rank's."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_triton.deploy.config import DeployConfig, VaeDecodeConfig
from bagel_triton.engine.build import StageResources, build_decoder
from bagel_triton.engine.dit.run import Latents
from bagel_triton.engine.vae import DecoderEngine
from bagel_triton.model.autoencoder import decode, unpack_latents
from bagel_triton.protocol.errors import StageUnavailable
from tests.support.killing import arguments, descendants

PATCH = 2  # latents of a token, a side


def latents(height: int, width: int) -> Latents:
    """Of ``height`` x ``width`` pixels; top and bottom are unlike, so that statistics of a part would show."""
    rows, columns = height // 16, width // 16
    noise = torch.randn(rows, columns, 64, generator=torch.Generator().manual_seed(height))
    slope = torch.linspace(0, 1, rows)[:, None, None]
    return Latents((noise * (0.1 + 3 * slope) + 3 * slope - 1).flatten(0, 1), rows, columns)


def decoded(engine: DecoderEngine, task: Latents) -> Tensor:
    image, _ = engine.submit(task, "a", lambda event: None).done.result(60)
    return image


@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.long)])
def test_pixels_are_those_of_one_rank_until_a_rank_ends(other_checkpoint: Path, ranks: int) -> None:
    """Of 26 rows of latents three ranks have 9, 9 and 8; of a small image they have fewer rows than there are ranks."""
    decoder = VaeDecodeConfig(patch_parallel_size=ranks)
    config = DeployConfig(checkpoint=str(other_checkpoint), device="cpu", dtype="float32", vae_decode=decoder)
    resources = StageResources.open(config)
    engine, autoencoder = build_decoder(resources), resources.load_autoencoder()
    try:
        for height, width in ((208, 48), (64, 80), (16, 32)):
            task = latents(height, width)
            z = unpack_latents(task.tokens, task.rows, task.columns, PATCH)[None]
            with torch.inference_mode():
                expected = decode(autoencoder, z)[0]
            found = decoded(engine, task)
            assert found.shape == (height, width, 3)
            assert expected.float().std() > 10
            different = (found.int() - expected.int()).abs()
            assert different.max() <= 1
            assert different.float().mean() < 1e-3
        others = [pid for pid in descendants(os.getpid()) if "bagel_triton.parallel.worker" in arguments(pid)]
        assert len(others) == ranks - 1
        os.kill(others[0], signal.SIGKILL)
        with pytest.raises(StageUnavailable):
            decoded(engine, latents(208, 48))
        assert engine.is_lost
    finally:
        engine.close()
