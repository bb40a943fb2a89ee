"""Encoded images from outside: opened warily, then resized for the two encoders."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from bagel_triton.model.image import VAE_RULE, VIT_RULE, ResizeRule, flattened, to_bytes
from bagel_triton.protocol.errors import InvalidRequest, format_value, truncate
from bagel_triton.protocol.messages import Segment, VaeSegment, VitSegment
from bagel_triton.protocol.request import MAX_INPUT_IMAGES, Modality
from bagel_triton.protocol.validation import MAX_IMAGE_BYTES

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO")  # an MPO opens as a JPEG
MAX_PIXELS = 64 * 2**20
# Larger images are reduced by whole factors while they are converted, so the full size never
# exists in RGB. Up to here every pixel enters the resize, as in training.
EXACT_PIXELS = 16 * 2**20
REDUCING_GAP = 3  # an image is reduced to no less than this many times its final sides
STRIP_PIXELS = 2**20  # converted at a time
DECODE_BYTES = 512 * 2**20  # memory of all decodes that run at once in a process
SMALL_BYTES = 32 * 2**20  # decodes that need less never wait
_DECODER_COPIES = {"WEBP": 3, "AVIF": 3, "JPEG2000": 5}  # buffers of the codec, beside Pillow's own
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SRGB = ImageCms.createProfile("sRGB")
_PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's mode, and ICC's name of it


class ByteBudget:
    """Lets operations run at once as long as their memory fits; one that never fits runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._free = limit, limit
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Hold ``amount`` bytes of the budget, or all of it if that is less."""
        amount = min(amount, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


_BUDGET = ByteBudget(DECODE_BYTES)
# Pillow allocates 16 MiB blocks, which glibc soon keeps in each thread's own heap after they are
# freed: six decodes on six threads then held 890 MiB, of a budget of 512. Blocks above 32 MiB
# always go back to the system.
Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]


def open_image(data: bytes, param: str, resize: ResizeRule | None = None) -> Image.Image:
    """The image in ``data``: first frame, upright, sRGB, transparency on white; resized by ``resize``.

    One of more than ``EXACT_PIXELS`` is reduced to about the size that ``VAE_RULE`` needs.

    Raises:
        InvalidRequest: too many bytes or pixels, not an image, an unknown format, damaged.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidRequest(f"{param} has {len(data)} bytes; allowed: at most {MAX_IMAGE_BYTES}", param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DecompressionBombWarning: the limit below is ours; and broken metadata
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise InvalidRequest(
                    f"{param} has {image.width}x{image.height} pixels; allowed: at most {MAX_PIXELS} in all", param
                )
            cost = _decoding_bytes(image)
            with _BUDGET.take(cost) if cost > SMALL_BYTES else contextlib.nullcontext():
                rgb = _decoded(image)
                return rgb if resize is None else resize.apply(rgb)
    except InvalidRequest:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidRequest(f"{param} has too many pixels; allowed: at most {MAX_PIXELS} in all", param) from error
    except UnidentifiedImageError as error:
        raise InvalidRequest(
            f"{param}={format_value(data)} is not an image; allowed: one in {', '.join(FORMATS)} format", param
        ) from error
    except Exception as error:  # codecs raise all kinds of errors for a damaged file
        raise InvalidRequest(f"{param} is damaged: {truncate(str(error) or type(error).__name__)}", param) from error


def is_heavy(encoded: Sequence[bytes]) -> bool:
    """Whether decoding takes long enough to hold up other requests; only headers are read."""
    pixels = 0
    for data in encoded:
        with contextlib.suppress(Exception), warnings.catch_warnings():  # refused later, by name
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels += image.width * image.height
    return pixels > EXACT_PIXELS


def _decoding_bytes(image: Image.Image) -> int:
    """Memory that decoding ``image`` takes at most, but for its encoded bytes."""
    pixels = image.width * image.height
    depth = 1 if image.mode in ("1", "L", "P") else 4
    decoded = pixels * depth * _DECODER_COPIES.get(image.format or "", 1)
    return decoded + 4 * min(pixels, EXACT_PIXELS) + 16 * STRIP_PIXELS


def _decoded(image: Image.Image) -> Image.Image:
    factors = _reducing_factors(*image.size)
    if factors != (1, 1) and image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // min(factors), image.height // min(factors)))  # decodes a smaller image
    image.load()
    to_rgb = _to_rgb(image)
    factors = _reducing_factors(*image.size)
    rgb = to_rgb(image) if factors == (1, 1) else _reduced(image, factors, to_rgb)
    turn = _TURNS.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _reducing_factors(width: int, height: int) -> tuple[int, int]:
    """The whole factors by which an image's (width, height) are reduced before the resize."""
    if width * height <= EXACT_PIXELS:
        return 1, 1
    wanted = VAE_RULE.size(width, height)
    across, down = (
        max(1, side // (REDUCING_GAP * target)) for side, target in zip((width, height), wanted, strict=True)
    )
    return across, down


def _reduced(image: Image.Image, factors: tuple[int, int], to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """``image`` as RGB, each block of ``factors`` (width, height) pixels averaged; converted in strips."""
    across, down = factors
    small = Image.new("RGB", (-(-image.width // across), -(-image.height // down)))
    rows = max(1, STRIP_PIXELS // image.width // down) * down
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip.info = image.info
        small.paste(to_rgb(strip).reduce(factors), (0, top // down))
    return small


def _orientation(image: Image.Image) -> int:
    """The orientation in ``image``'s EXIF data; 1, upright, if there is none that can be read.

    Only that tag is decoded: phones and editors write others wrong.
    """
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The conversion of ``image``, or of a strip of it, to sRGB on white."""
    profile = _profile(image)
    if profile is None:
        return flattened

    def convert(strip: Image.Image) -> Image.Image:
        try:
            return flattened(_with_profile(strip, profile))
        except ImageCms.PyCMSError:  # the profile is of another kind of pixels
            return flattened(strip)

    return convert


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The colour profile in ``image`` if it can be read and is not sRGB, which needs no conversion."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        known = "srgb" in ImageCms.getProfileDescription(profile).lower()
    except Exception:  # a broken profile says nothing about the pixels
        return None
    return None if known else profile


def _with_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """``image`` in sRGB, its transparency kept; unchanged if ``profile`` is for another kind of pixels."""
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert(f"{image.mode}A")
    mode = image.mode.removesuffix("A")
    if _PROFILE_SPACES.get(mode) != profile.profile.xcolor_space.strip():
        return image
    alpha = image.getchannel("A") if mode != image.mode else None
    colours = ImageCms.profileToProfile(image.convert(mode), profile, _SRGB, outputMode="RGB")
    assert colours is not None
    colours.info = {}
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def image_segments(
    encoded: Sequence[bytes],
    wanted: Modality,
    max_side: int,
    vae_resize: ResizeRule = VAE_RULE,
    vit_resize: ResizeRule = VIT_RULE,
) -> tuple[list[tuple[Segment, ...]], tuple[int, int] | None]:
    """Each image's segments, and the last one's (height, width) as an output size.

    An image for editing enters twice, for generation and for understanding; the ViT sees
    the image as it was resized for the autoencoder.

    Raises:
        InvalidRequest: too many images, or one that cannot be used.
    """
    if len(encoded) > MAX_INPUT_IMAGES:
        raise InvalidRequest.value("image", f"{len(encoded)} images", f"at most {MAX_INPUT_IMAGES}")
    segments: list[tuple[Segment, ...]] = []
    size = None
    for index, data in enumerate(encoded):
        vae = open_image(data, f"image[{index}]", vae_resize)
        vit = vit_resize.apply(vae)
        understood = VitSegment(vit.height, vit.width, to_bytes(vit))
        if wanted == "text":
            segments.append((understood,))
            continue
        if max(vae.size) > max_side:
            raise InvalidRequest(
                f"image[{index}] is {vae.width}x{vae.height} pixels once resized; "
                f"this checkpoint's position table allows sides up to {max_side}",
                f"image[{index}]",
            )
        segments.append((VaeSegment(vae.height, vae.width, to_bytes(vae)), understood))
        size = (vae.height, vae.width)
    return segments, size
