"""An image's pixels as the networks take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def normalised(pixels: bytes, height: int, width: int) -> Tensor:
    """Raw pixels as float32 [height, width, 3] in [-1, 1]."""
    import torch  # resizing, all that the planner's process does, needs no torch

    array = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width, 3)
    return array.float() / 127.5 - 1.0


def patchified(pixels: Tensor, patch: int) -> Tensor:
    """pixels [height, width, 3] -> [rows * columns, patch * patch * 3], each (row, column, channel)."""
    height, width, channels = pixels.shape
    grid = pixels.view(height // patch, patch, width // patch, patch, channels)  # [h, p, w, q, c]
    return grid.permute(0, 2, 1, 3, 4).reshape(-1, patch * patch * channels)


MAX_PIXELS = 14 * 14 * 9 * 1024


@dataclass(frozen=True)
class ResizeRule:
    """Bounds of an image's sides, in pixels; both become multiples of ``stride``."""

    stride: int
    longest: int
    shortest: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) that an image of this size is resized to.

        The long side is at most ``longest``; the short one at least ``shortest``, unless
        the image is too elongated for both.
        """
        scale = min(self.longest / max(width, height), 1.0)
        scale = max(scale, self.shortest / min(width, height))
        width, height = self._scaled(width, height, scale)
        if width * height > MAX_PIXELS:
            # Linear in the area, no square root: that is how the model was trained.
            width, height = self._scaled(width, height, MAX_PIXELS / (width * height))
        if max(width, height) > self.longest:
            width, height = self._scaled(width, height, self.longest / max(width, height))
        return width, height

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        width, height = (
            max(self.stride, round(round(side * scale) / self.stride) * self.stride) for side in (width, height)
        )
        return width, height

    def apply(self, image: Image.Image) -> Image.Image:
        """``image`` (RGB) resized, bicubic."""
        size = self.size(*image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


VAE_RULE = ResizeRule(stride=16, longest=1024, shortest=512)
VIT_RULE = ResizeRule(stride=14, longest=980, shortest=224)


def flattened(image: Image.Image) -> Image.Image:
    """``image`` as RGB, transparency on white; 16 bits a channel become 8."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # PIL cut the colours to their high bytes, but not the key
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit, with alpha where one value is transparent: PIL's own conversion cuts at 255."""
    grey = np.asarray(image).astype(np.uint32)
    small = Image.fromarray(((grey * 255 + 32895) >> 16).astype(np.uint8))  # the nearest to value / 257
    if (key := image.info.get("transparency")) is not None:
        small.putalpha(Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8)))
    return small


def to_bytes(image: Image.Image) -> bytes:
    """Raw uint8 pixels, [height, width, 3] row-major."""
    return np.asarray(image, dtype=np.uint8).tobytes()
