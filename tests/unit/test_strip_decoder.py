"""Decoding in strips gives the whole decoder's image, without a seam."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bagel_triton.deploy.config import ConfigError, DeployConfig, VaeDecodeConfig
from bagel_triton.deploy.yaml import load
from bagel_triton.engine.dit.run import Latents
from bagel_triton.engine.vae import DecoderEngine
from bagel_triton.model.autoencoder import GROUPS, Autoencoder, decode
from bagel_triton.model.cpu import strip_decoder as strips
from bagel_triton.model.cpu.strip_decoder import Strips, decode_in_strips
from bagel_triton.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")
PSNR_DB = 80.0  # of uint8 pixels: one value in 1,500 may be off by one


@pytest.fixture(scope="module", params=["checkpoint_dir", "other_checkpoint"])
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    directory: Path = request.getfixturevalue(request.param)
    return Checkpoint(directory).load_autoencoder(CPU, torch.float32)


def latent(height: int, width: int, batch: int = 1) -> Tensor:
    """Of ``height`` x ``width`` pixels; top and bottom are unlike, so that statistics of a part would show."""
    noise = torch.randn(batch, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(height + width))
    return noise * torch.linspace(0.1, 3, height // 8)[:, None] + torch.linspace(-1, 2, height // 8)[:, None]


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a.double() - b.double()).square().mean().clamp(min=1e-20)
    return float(10 * torch.log10(255**2 / error))


@pytest.mark.parametrize(("height", "width", "rows"), [(272, 256, 32), (64, 48, 32), (80, 32, 3), (16, 16, 1)])
@torch.inference_mode()
def test_strips_are_the_whole(
    autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch, height: int, width: int, rows: int
) -> None:
    monkeypatch.setattr(strips, "ROWS", rows)
    z = latent(height, width)
    whole = autoencoder.decoder(z)
    pieces = decode_in_strips(autoencoder.decoder, z)
    assert (pieces - whole).abs().max() < 2e-5 * whole.abs().max()
    plain, tiled = decode(autoencoder, z, lambda z: whole), decode(autoencoder, z, lambda z: pieces)
    assert psnr(plain, tiled) > PSNR_DB
    assert (plain.int() - tiled.int()).abs().max() <= 1


@torch.inference_mode()
def test_images_of_a_batch_have_statistics_of_their_own(autoencoder: Autoencoder) -> None:
    z = latent(64, 32, batch=3)
    z[1] *= 5
    torch.testing.assert_close(decode_in_strips(autoencoder.decoder, z), autoencoder.decoder(z), rtol=1e-4, atol=2e-5)


def test_statistics_are_those_of_the_whole_map() -> None:
    norm = nn.GroupNorm(GROUPS, 64, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.randn(64))
    norm.bias.copy_(torch.randn(64))
    whole = torch.randn(2, 64, 70, 9) * torch.linspace(0, 4, 70)[:, None] + 100 * torch.randn(64, 1, 1)
    activated = Strips.of(whole).activation(norm)(whole)
    exact = nn.functional.silu(
        nn.functional.group_norm(whole.double(), GROUPS, norm.weight.double(), norm.bias.double(), 1e-6)
    )
    torch.testing.assert_close(activated.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_strip_is_dropped_once_it_is_of_no_more_use() -> None:
    rows = Strips.of(torch.arange(70.0).view(1, 1, 70, 1).expand(1, 32, 70, 2))
    seen = [(framed[0, 0, :, 0].tolist(), above, below) for framed, above, below in rows.take_framed()]
    assert seen == [
        ([*range(33)], 0, 1),
        ([*range(31, 65)], 1, 1),
        ([*range(63, 70)], 1, 0),
    ]
    assert not list(rows.take())


@pytest.mark.parametrize(
    ("side", "tiling", "in_strips"), [(512, True, False), (528, True, True), (528, None, True), (528, False, False)]
)
def test_the_stage_tiles_above_a_size(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, side: int, tiling: bool | None, in_strips: bool
) -> None:
    calls: list[int] = []
    real = strips.decode_in_strips
    monkeypatch.setattr(strips, "decode_in_strips", lambda *given: (calls.append(1), real(*given))[1])
    checkpoint = Checkpoint(checkpoint_dir)
    engine = DecoderEngine(
        checkpoint.load_autoencoder(CPU, torch.float32), checkpoint.config.latent, VaeDecodeConfig(use_tiling=tiling)
    )
    try:
        tokens = (side // 16) ** 2
        latents = Latents(torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)), side // 16, side // 16)
        image, _ = engine.submit(latents, "a", lambda event: None).done.result(60)
    finally:
        engine.close()
    assert image.shape == (side, side, 3)
    assert bool(calls) == in_strips


def test_the_deploy_yaml_says_whether(tmp_path: Path) -> None:
    def config(text: str) -> DeployConfig:
        path = tmp_path / "deploy.yaml"
        path.write_text(text)
        return load(path, "checkpoint")

    assert config("pipeline: bagel").vae_decode.use_tiling is None
    assert config("stages: [{stage_id: 1, vae_use_tiling: true}]").vae_decode.use_tiling
    assert not config("stages: [{stage_id: 1, vae_use_tiling: false}]").vae_decode.use_tiling
    single = "pipeline: bagel_single_stage\nstages: [{stage_id: 0, vae_use_tiling: false}]"
    assert not config(single).vae_decode.use_tiling
    with pytest.raises(ConfigError, match=r"stages\[stage_id=0\].vae_use_tiling belongs to the DiT"):
        config("stages: [{stage_id: 0, vae_use_tiling: true}]")
