"""The decoder that a CPU runs gives the plain module's results."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bagel_triton.model.autoencoder import GROUPS, Autoencoder
from bagel_triton.model.cpu import row_decoder
from bagel_triton.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["checkpoint_dir", "other_checkpoint"])
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    directory: Path = request.getfixturevalue(request.param)
    return Checkpoint(directory).load_autoencoder(CPU, torch.float32)


def noise(*shape: int) -> Tensor:
    """Top and bottom are unlike, so that statistics of a part would show."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return drawn * torch.linspace(0.1, 2, shape[2])[:, None] + torch.linspace(-1, 1, shape[2])[:, None]


@pytest.mark.parametrize(("height", "width", "rows"), [(272, 256, 32), (512, 512, 32), (80, 32, 3), (16, 16, 2)])
@torch.inference_mode()
def test_rows_at_a_time_are_the_whole(
    autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch, height: int, width: int, rows: int
) -> None:
    monkeypatch.setattr(row_decoder, "ROWS", rows)
    if rows < 32:
        monkeypatch.setattr(row_decoder, "NUMBERS", 1)
    decoder, z = autoencoder.decoder, noise(1, 16, height // 8, width // 8)
    before, plain = z.clone(), decoder(z)
    assert (row_decoder.decode_by_rows(decoder, z) - plain).abs().max() < 2e-5 * plain.abs().max()
    assert torch.equal(z, before)


@torch.inference_mode()
def test_images_of_a_batch_have_statistics_of_their_own(autoencoder: Autoencoder) -> None:
    z = noise(3, 16, 8, 4)
    z[1] *= 5
    found = row_decoder.decode_by_rows(autoencoder.decoder, z)
    torch.testing.assert_close(found, autoencoder.decoder(z), rtol=1e-4, atol=2e-5)


@torch.inference_mode()
def test_a_norm_of_large_means_is_exact() -> None:
    norm = nn.GroupNorm(GROUPS, 64, eps=1e-6)
    x = torch.randn(2, 64, 70, 9) * torch.linspace(0, 4, 70)[:, None] + 100 * torch.randn(64, 1, 1)
    activated = row_decoder._activation(norm, x.contiguous(memory_format=torch.channels_last))(x)
    group_norm = partial(nn.functional.group_norm, num_groups=GROUPS, eps=1e-6)
    torch.testing.assert_close(activated.double(), nn.functional.silu(group_norm(x.double())), rtol=1e-4, atol=1e-4)
