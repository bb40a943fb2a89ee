"""The synthetic world: a scene is one or two things on a background, drawn with anti-aliasing.

A sprite is drawn once per kind and size at eight times its resolution and averaged down; a scene
is a few array operations on such sprites. :func:`recognise` reads a scene back from pixels by
rules, so a drawing can be judged without a model.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 64
OVERSAMPLING = 8
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 45),
    "orange": (250, 140, 25),
    "yellow": (250, 220, 50),
    "green": (45, 155, 70),
    "blue": (45, 90, 220),
    "purple": (140, 60, 190),
    "pink": (250, 150, 195),
    "brown": (125, 75, 40),
    "black": (25, 25, 30),
    "white": (245, 245, 245),
}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CENTERS = (15, 32, 49)
DIAMETERS = {"large": 28, "small": 18}
PLAIN = ("circle", "square", "triangle")
#: The color of a thing whose caption names none; the plain shapes then have any.
USUAL_COLOR = {
    "star": "yellow",
    "heart": "red",
    "cat": "orange",
    "fox": "orange",
    "house": "red",
    "tree": "green",
    "car": "blue",
    "boat": "brown",
    "flower": "pink",
    "sun": "yellow",
}
KINDS = (*PLAIN, *USUAL_COLOR)
_DARK, _LIGHT = (30, 30, 35), (240, 240, 240)
_WHITE, _GLASS, _WOOD, _SLATE, _NOSE = (250, 250, 250), (205, 230, 245), (110, 65, 30), (95, 95, 110), (245, 130, 150)

Pixels = NDArray[np.uint8]
Mask = NDArray[np.float32]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Thing:
    """One thing of a scene, by the names of its properties."""

    kind: str
    color: str
    place: str
    size: str = "large"


@dataclass(frozen=True)
class Scene:
    """Things on a background of one color, or of two: above and below."""

    things: tuple[Thing, ...]
    background: tuple[str, ...] = ("white",)


@dataclass(frozen=True)
class Sprite:
    """``main`` takes the thing's color; each detail is painted over it in its own. Masks are [side, side] in 0..1."""

    main: Mask
    details: tuple[tuple[tuple[int, int, int], Mask], ...]

    @property
    def outline(self) -> Mask:
        """All that the sprite covers."""
        covered: Mask = np.maximum.reduce([self.main, *(mask for _, mask in self.details)])
        return covered


class _Pen:
    """Draws in unit coordinates, the origin at the top left."""

    def __init__(self, side: int) -> None:
        self._side = side
        self._image = Image.new("L", (side * OVERSAMPLING,) * 2)
        self._draw = ImageDraw.Draw(self._image)

    def disc(self, x: float, y: float, radius: float, ry: float | None = None) -> _Pen:
        ry = radius if ry is None else ry
        self._draw.ellipse(self._scaled([(x - radius, y - ry), (x + radius, y + ry)]), fill=255)
        return self

    def polygon(self, *points: tuple[float, float]) -> _Pen:
        self._draw.polygon(self._scaled(points), fill=255)
        return self

    def box(self, left: float, top: float, right: float, bottom: float) -> _Pen:
        return self.polygon((left, top), (right, top), (right, bottom), (left, bottom))

    def mask(self) -> Mask:
        small = self._image.resize((self._side,) * 2, Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32) / 255

    def _scaled(self, points: Points) -> list[tuple[float, float]]:
        scale = self._side * OVERSAMPLING - 1
        return [(x * scale, y * scale) for x, y in points]


def _ring(count: int, outer: float, inner: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners of a star around the middle, the first one at the top."""
    corners = []
    for index in range(2 * count):
        angle, radius = math.pi * index / count - math.pi / 2 + turn, (outer, inner)[index % 2]
        corners.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return corners


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * index / 60 for index in range(60)]
    return [
        (
            0.5 + 0.03 * 16 * math.sin(a) ** 3,
            0.45 - 0.03 * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in angles
    ]


@cache
def sprite(kind: str, side: int) -> Sprite:
    """The sprite of a kind, ``side`` pixels wide and high."""

    def pen() -> _Pen:
        return _Pen(side)

    def flower(pen: _Pen) -> _Pen:
        for index in range(6):
            angle = math.pi * index / 3 + math.pi / 6
            pen.disc(0.5 + 0.3 * math.cos(angle), 0.5 + 0.3 * math.sin(angle), 0.19)
        return pen.disc(0.5, 0.5, 0.25)

    def sun(pen: _Pen) -> _Pen:
        return pen.polygon(*_ring(12, 0.5, 0.34)).disc(0.5, 0.5, 0.35)

    mains: dict[str, Callable[[], _Pen]] = {
        "circle": lambda: pen().disc(0.5, 0.5, 0.48),
        "square": lambda: pen().box(0.06, 0.06, 0.94, 0.94),
        "triangle": lambda: pen().polygon((0.5, 0.03), (1.0, 0.95), (0.0, 0.95)),
        "star": lambda: pen().polygon(*_ring(5, 0.52, 0.21)),
        "heart": lambda: pen().polygon(*_heart()),
        "cat": lambda: (
            pen()
            .disc(0.5, 0.6, 0.46, 0.38)
            .polygon((0.08, 0.0), (0.06, 0.55), (0.48, 0.3))
            .polygon((0.92, 0.0), (0.94, 0.55), (0.52, 0.3))
        ),
        "fox": lambda: pen().polygon(
            (0.0, 0.0), (0.32, 0.24), (0.68, 0.24), (1.0, 0.0), (0.98, 0.5), (0.56, 1.0), (0.44, 1.0), (0.02, 0.5)
        ),
        "house": lambda: pen().box(0.12, 0.42, 0.88, 0.98),
        "tree": lambda: pen().disc(0.5, 0.28, 0.28).disc(0.27, 0.46, 0.25).disc(0.73, 0.46, 0.25),
        "car": lambda: pen().box(0.0, 0.46, 1.0, 0.76).polygon((0.2, 0.46), (0.32, 0.2), (0.7, 0.2), (0.84, 0.46)),
        "boat": lambda: (
            pen()
            .polygon((0.0, 0.66), (1.0, 0.66), (0.82, 0.96), (0.18, 0.96))
            .polygon((0.54, 0.02), (0.54, 0.58), (0.96, 0.58))
            .polygon((0.44, 0.12), (0.44, 0.58), (0.08, 0.58))
        ),
        "flower": lambda: flower(pen()),
        "sun": lambda: sun(pen()),
    }
    details: dict[str, list[tuple[tuple[int, int, int], _Pen]]] = {
        "cat": [
            (_DARK, pen().disc(0.32, 0.56, 0.07, 0.09).disc(0.68, 0.56, 0.07, 0.09)),
            (_NOSE, pen().polygon((0.42, 0.7), (0.58, 0.7), (0.5, 0.8))),
        ],
        "fox": [
            (
                _WHITE,
                pen().polygon((0.05, 0.54), (0.4, 0.62), (0.47, 0.97)).polygon((0.95, 0.54), (0.6, 0.62), (0.53, 0.97)),
            ),
            (_DARK, pen().disc(0.33, 0.46, 0.06).disc(0.67, 0.46, 0.06).disc(0.5, 0.94, 0.08)),
        ],
        "house": [
            (_SLATE, pen().polygon((0.5, 0.02), (1.0, 0.44), (0.0, 0.44))),
            (_DARK, pen().box(0.42, 0.66, 0.6, 0.98)),
        ],
        "tree": [(_WOOD, pen().box(0.42, 0.64, 0.58, 1.0))],
        "car": [
            (_GLASS, pen().polygon((0.3, 0.44), (0.38, 0.27), (0.64, 0.27), (0.72, 0.44))),
            (_DARK, pen().disc(0.25, 0.76, 0.13).disc(0.75, 0.76, 0.13)),
        ],
        "boat": [(_DARK, pen().box(0.46, 0.02, 0.51, 0.66))],
        "flower": [(_WOOD, pen().disc(0.5, 0.5, 0.15))],
    }
    return Sprite(mains[kind]().mask(), tuple((color, drawn.mask()) for color, drawn in details.get(kind, [])))


def _corner(place: str, side: int) -> tuple[int, int]:
    """Top and left of a sprite at ``place``."""
    row, column = divmod(PLACES.index(place), 3)
    return CENTERS[row] - side // 2, CENTERS[column] - side // 2


def _backdrop(background: Sequence[str], height: int = SIDE, width: int = SIDE) -> NDArray[np.float32]:
    canvas = np.empty((height, width, 3), np.float32)
    canvas[: SIDE // 2] = COLORS[background[0]]
    canvas[SIDE // 2 :] = COLORS[background[-1]]
    return canvas


def render(scene: Scene, height: int = SIDE, width: int = SIDE) -> Pixels:
    """The scene's image, [height, width, 3]; a larger one has it at the top left, and background around."""
    canvas = _backdrop(scene.background, height, width)
    for thing in scene.things:
        side = DIAMETERS[thing.size]
        top, left = _corner(thing.place, side)
        _paint(canvas[top : top + side, left : left + side], thing.kind, thing.color)
    return (canvas + 0.5).astype(np.uint8)


def _paint(window: NDArray[np.float32], kind: str, color: str) -> None:
    """Paint a thing over ``window``, [side, side, 3]."""
    drawn = sprite(kind, len(window))
    window += drawn.main[..., None] * (np.array(COLORS[color], np.float32) - window)
    for detail, mask in drawn.details:
        shown = _LIGHT if detail == _DARK and color == "black" else detail
        window += mask[..., None] * (np.array(shown, np.float32) - window)


def far_apart(one: str, other: str) -> bool:
    """Whether two small things at these places leave a gap between them."""
    (r1, c1), (r2, c2) = (divmod(PLACES.index(place), 3) for place in (one, other))
    return abs(r1 - r2) + abs(c1 - c2) >= 2


def random_scene(rng: random.Random, two_things: float = 0.2, two_tone: float = 0.25) -> Scene:
    """A scene with every property drawn evenly; two things, and two background colors, with these probabilities."""
    background = tuple(rng.sample(list(COLORS), 2 if rng.random() < two_tone else 1))
    free = [color for color in COLORS if color not in background]
    if rng.random() >= two_things:
        size = "large" if rng.random() < 0.7 else "small"
        return Scene((Thing(rng.choice(KINDS), rng.choice(free), rng.choice(PLACES), size),), background)
    first = rng.choice(PLACES)
    places = [first, rng.choice([place for place in PLACES if far_apart(first, place)])]
    kinds = rng.sample(KINDS, 2)
    things = (Thing(kind, rng.choice(free), place, "small") for kind, place in zip(kinds, places, strict=True))
    return Scene(tuple(sorted(things, key=lambda thing: PLACES.index(thing.place))), background)


_PALETTE = np.array(list(COLORS.values()), np.float32)
_NAMES = tuple(COLORS)
MIN_PIXELS = 40
MAX_SHIFT = 2


def _nearest(pixels: NDArray[np.float32]) -> NDArray[np.intp]:
    """The index of the nearest color of each pixel: [..., 3] -> [...]."""
    nearest: NDArray[np.intp] = ((pixels[..., None, :] - _PALETTE) ** 2).sum(-1).argmin(-1)
    return nearest


def background_of(pixels: Pixels) -> tuple[str, ...]:
    """The color of the image's upper and lower frame; one name if they are equal."""
    image = pixels.astype(np.float32)
    frame = np.concatenate((image[:, :1], image[:, -1:]), axis=1)
    names = tuple(
        _NAMES[np.bincount(_nearest(rows).ravel(), minlength=len(_NAMES)).argmax()]
        for rows in (frame[: SIDE // 2 - 2], frame[SIDE // 2 + 2 :])
    )
    return names[:1] if names[0] == names[1] else names


def _foreground(pixels: Pixels, background: Sequence[str]) -> Mask:
    """How much each pixel differs from the background, 0..1."""
    image, behind = pixels.astype(np.float32), _backdrop(background)
    difference = np.abs(image - behind).max(-1)
    differs: Mask = np.clip((difference - 20) / 60, 0, 1).astype(np.float32)
    return differs


def _parts(found: Mask) -> list[tuple[NDArray[np.bool_], int]]:
    """Connected areas of the foreground, largest first."""
    solid = found > 0.5
    labels = np.where(solid, np.arange(1, SIDE * SIDE + 1).reshape(SIDE, SIDE), 0)
    while True:
        padded = np.pad(labels, 2)
        spread = np.maximum.reduce(
            [
                padded[2 + dy : 2 + dy + SIDE, 2 + dx : 2 + dx + SIDE]
                for dy, dx in itertools.product((-2, -1, 0, 1, 2), repeat=2)
            ]
        )
        spread = np.where(solid, spread, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    areas = [(labels == label, int((labels == label).sum())) for label in np.unique(labels[labels > 0])]
    return sorted((area for area in areas if area[1] >= MIN_PIXELS), key=lambda area: -area[1])


def _nearest_thing(
    image: NDArray[np.float32], behind: NDArray[np.float32], place: str, color: str
) -> tuple[str, str, float]:
    """Kind and size of the thing at ``place`` whose drawing is nearest to ``image``, and how near that is: 0..1.

    The thing may be up to MAX_SHIFT pixels away. What is compared is the difference from what is
    ``behind``: 1 says that the image's is the drawing's, 0 that they have nothing in common.
    """
    best = ("", "", -1.0)
    room = MAX_SHIFT
    seen, ground = (np.pad(part, ((room, room), (room, room), (0, 0)), "edge") for part in (image, behind))
    differs = np.abs(seen - ground).sum(-1)
    total = differs.sum()
    for (size, side), kind in itertools.product(DIAMETERS.items(), KINDS):
        top, left = _corner(place, side)
        for dy, dx in itertools.product(range(2 * room + 1), repeat=2):
            window = np.s_[top + dy : top + dy + side, left + dx : left + dx + side]
            drawn = ground[window].copy()
            _paint(drawn, kind, color)
            missed = total - differs[window].sum() + np.abs(seen[window] - drawn).sum()
            near = 1 - float(missed / (total + np.abs(drawn - ground[window]).sum()))
            if near > best[2]:
                best = (kind, size, near)
    return best


def recognise(pixels: Pixels, min_nearness: float = 0.6) -> Scene:
    """The scene in an image [SIDE, SIDE, 3]: what is drawn too unlike any thing has the kind ``?``.

    The background is what the left and right edges have. Connected areas of another color are
    things: the place is the nearest to the middle of the area's box, the color the most frequent
    one, kind and size those of the thing whose drawing is nearest.
    """
    background = background_of(pixels)
    image, behind = pixels.astype(np.float32), _backdrop(background)
    areas = [area for area, _ in _parts(_foreground(pixels, background))[:2]]
    things: list[Thing] = []
    for area in areas:
        if any(_holds(thing, area) for thing in things):
            continue  # a part of it: a boat's sail, on a background of the mast's color
        rows, columns = np.flatnonzero(area.any(1)), np.flatnonzero(area.any(0))
        middle = [(edge[0] + edge[-1] + 1) / 2 for edge in (rows, columns)]
        row, column = (min(range(3), key=lambda index: abs(CENTERS[index] - at)) for at in middle)
        place = PLACES[3 * row + column]
        names = _nearest(image[area])
        color = _NAMES[np.bincount(names, minlength=len(_NAMES)).argmax()]
        others = [other for other in areas if other is not area]
        alone = np.where(_spread(others)[..., None], behind, image) if others else image
        kind, size, nearness = _nearest_thing(alone, behind, place, color)
        things.append(Thing(kind if nearness >= min_nearness else "?", color, place, size))
    return Scene(tuple(sorted(things, key=lambda thing: PLACES.index(thing.place))), background)


def _holds(thing: Thing, area: NDArray[np.bool_]) -> bool:
    side = DIAMETERS[thing.size]
    top, left = _corner(thing.place, side)
    return bool(area[top : top + side, left : left + side].sum() > 0.8 * area.sum())


def _spread(areas: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """All of ``areas``, and what is within two pixels of them."""
    padded = np.pad(np.logical_or.reduce(areas), 2)
    moved = [padded[dy : dy + SIDE, dx : dx + SIDE] for dy, dx in itertools.product(range(5), repeat=2)]
    covered: NDArray[np.bool_] = np.logical_or.reduce(moved)
    return covered
