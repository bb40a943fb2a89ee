"""The FLUX autoencoder; its widths are in no configuration file, only in its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_triton.model.config import CheckpointError

GROUPS, EPS = 32, 1e-6
SCALE, SHIFT = 0.3611, 0.1159
Shapes = Mapping[str, tuple[int, ...]]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


class ResnetBlock(nn.Module):
    """Two normed 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels_in), _norm(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in, height, width] -> [batch, out, height, width]."""
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """Single-head attention over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, channels, height, width], same shape out."""
        h = self.norm(x)
        return self.attend(h, h).add_(x)

    def attend(self, rows: Tensor, whole: Tensor) -> Tensor:
        """Attend from normed ``rows`` [batch, channels, rows, width] to the ``whole`` map; shaped as ``rows``."""
        # With other strides torch falls back to an attention that holds the scores of all pixels.
        q, k, v = (
            conv(h).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
            for conv, h in ((self.q, rows), (self.k, whole), (self.v, whole))
        )
        found = F.scaled_dot_product_attention(q, k, v)  # [batch, 1, pixels, channels]
        out: Tensor = self.proj_out(found.squeeze(1).transpose(1, 2).unflatten(2, rows.shape[2:]))
        return out


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return self.block_2(self.attn_1(self.block_1(x)))  # type: ignore[no-any-return]


class Resample(nn.Module):
    """A factor of two: ``up`` by nearest neighbour, down by a stride padded right and bottom."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, channels, height, width] -> height and width times or over two."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1))
        return self.conv(x)  # type: ignore[no-any-return]


class Level(nn.Module):
    """The blocks of one resolution and the change to the next."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels_in if index == 0 else channels_out, channels_out) for index in range(blocks)
        )
        self.upsample: Resample | None = None
        self.downsample: Resample | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in, height, width] -> the next level's input."""
        for block in self.block:
            x = block(x)
        for resample in (self.upsample, self.downsample):
            x = x if resample is None else resample(x)
        return x


class Encoder(nn.Module):
    """Pixels to posterior moments."""

    def __init__(self, widths: list[int], blocks: int, pixel_channels: int, latent_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(pixel_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level(widths[max(index - 1, 0)], width, blocks)
            if index + 1 < len(widths):
                level.downsample = Resample(width, up=False)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, 3, height, width] -> [batch, 2 * latent_channels, height / 8, width / 8]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, widths: list[int], blocks: int, pixel_channels: int, latent_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level(widths[min(index + 1, len(widths) - 1)], width, blocks)
            if index > 0:
                level.upsample = Resample(width, up=True)
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], pixel_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z [batch, latent_channels, height, width] -> [batch, 3, 8 * height, 8 * width]."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))  # type: ignore[no-any-return]


def _count(shapes: Shapes, pattern: str) -> int:
    index = 0
    while pattern.format(index) in shapes:
        index += 1
    return index


class Autoencoder(nn.Module):
    """Encoder and decoder, built from the ``shapes`` of a checkpoint's tensors.

    Raises:
        CheckpointError: a tensor that determines a width is missing.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        try:
            levels = _count(shapes, "decoder.up.{}.block.0.conv1.weight")
            widths = [shapes[f"decoder.up.{index}.block.0.conv1.weight"][0] for index in range(levels)]
            pixels, latents = shapes["decoder.conv_out.weight"][0], shapes["decoder.conv_in.weight"][1]
            encoder_blocks = _count(shapes, "encoder.down.0.block.{}.conv1.weight")
            decoder_blocks = _count(shapes, "decoder.up.0.block.{}.conv1.weight")
            if not levels:
                raise KeyError("decoder.up.0.block.0.conv1.weight")
        except KeyError as error:
            raise CheckpointError(f"the autoencoder has no tensor {error}") from error
        except IndexError as error:
            raise CheckpointError("the autoencoder's convolutions have not four dimensions") from error
        if wrong := [width for width in widths if width <= 0 or width % GROUPS]:
            raise CheckpointError(f"the autoencoder has {wrong[0]} channels; allowed: a multiple of {GROUPS}")
        self.latent_channels, self.downsample = latents, 2 ** (levels - 1)
        self.encoder = Encoder(widths, encoder_blocks, pixels, latents)
        self.decoder = Decoder(widths, decoder_blocks, pixels, latents)


def unpack_latents(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Tokens back to a latent image.

    tokens [rows * columns, patch * patch * channels] -> [channels, rows * patch, columns * patch].
    """
    grid = tokens.view(rows, columns, patch, patch, -1)  # [h, w, p, q, c]
    return grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)


def pack_latents(latent: Tensor, patch: int) -> Tensor:
    """A latent image as tokens, the inverse of :func:`unpack_latents`.

    latent [channels, rows * patch, columns * patch] -> [rows * columns, patch * patch * channels].
    """
    channels, height, width = latent.shape
    grid = latent.view(channels, height // patch, patch, width // patch, patch)  # [c, h, p, w, q]
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def encode(autoencoder: Autoencoder, pixels: Tensor, encoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """An image's posterior: [height, width, 3] in [-1, 1] -> means, log variances [1, 2 * channels, h, w] float32.

    ``encoder`` runs instead of the autoencoder's plain one.
    """
    weight = autoencoder.encoder.conv_in.weight
    image = pixels.permute(2, 0, 1).unsqueeze(0).to(device=weight.device, dtype=weight.dtype)  # [1, 3, H, W]
    moments: Tensor = (encoder or autoencoder.encoder)(image)
    return moments.float()


def sample(moments: Tensor, noise: Tensor) -> Tensor:
    """A sample of the posterior with these ``moments``, scaled and shifted.

    ``noise`` is a standard normal draw, [1, channels, h, w], as is the latent returned.
    """
    mean, logvar = moments.chunk(2, dim=1)
    drawn: Tensor = mean + torch.exp(0.5 * logvar) * noise.to(mean.device)
    return SCALE * (drawn - SHIFT)


def decode(autoencoder: Autoencoder, latent: Tensor, decoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Pixels of latent images: [batch, channels, h, w] -> uint8 [batch, 8h, 8w, 3].

    ``decoder`` runs instead of the autoencoder's plain one.
    """
    weight = autoencoder.decoder.conv_in.weight
    z = (latent / SCALE + SHIFT).to(device=weight.device, dtype=weight.dtype)
    pixels: Tensor = (decoder or autoencoder.decoder)(z).float()
    scaled = (pixels * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
