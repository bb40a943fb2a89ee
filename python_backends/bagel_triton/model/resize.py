"""A conditioning picture on its way in: flattened, and resized as the model was trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_PIXELS = 14 * 14 * 9 * 1024


@dataclass(frozen=True)
class ResizeRule:
    """Bounds of a picture's sides, in pixels; both become multiples of ``stride``."""

    stride: int
    longest: int
    shortest: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) that a picture of this size is resized to.

        The long side is at most ``longest``; the short one at least ``shortest``, unless
        the picture is too elongated for both.
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

    def apply(self, picture: Image.Image) -> Image.Image:
        """``picture`` (RGB) resized, bicubic."""
        size = self.size(*picture.size)
        return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


VAE_RULE = ResizeRule(stride=16, longest=1024, shortest=512)
VIT_RULE = ResizeRule(stride=14, longest=980, shortest=224)


def flattened(picture: Image.Image) -> Image.Image:
    """``picture`` as RGB, transparency on white; 16 bits a channel become 8."""
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    key = picture.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # PIL cut the colours to their high bytes, but not the key
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit, with alpha where one value is transparent: PIL's own conversion cuts at 255."""
    grey = np.asarray(picture).astype(np.uint32)
    small = Image.fromarray(((grey * 255 + 32895) >> 16).astype(np.uint8))  # the nearest to value / 257
    if (key := picture.info.get("transparency")) is not None:
        small.putalpha(Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8)))
    return small


def to_bytes(picture: Image.Image) -> bytes:
    """Raw uint8 pixels, [height, width, 3] row-major."""
    return np.asarray(picture, dtype=np.uint8).tobytes()
