"""Training samples: the segments of one context each, as inference lays them out, and what is to be learned there."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bagel_triton.engine.preprocess.planner import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from bagel_triton.model.image import ResizeRule
from bagel_triton.model.tokenizer import Tokenizer
from build.tiny_bagel import texts
from build.tiny_bagel.world import (
    COLORS,
    KINDS,
    PLACES,
    SIDE,
    USUAL_COLOR,
    Pixels,
    Scene,
    Thing,
    random_scene,
)

VAE_SIDES = ResizeRule(stride=16, longest=SIDE, shortest=SIDE)
VIT_SIDES = ResizeRule(stride=14, longest=56, shortest=56)
#: A thing of this kind and color is in no training image.
UNSEEN_PAIRS = (
    ("orange", "square"),
    ("purple", "car"),
    ("blue", "heart"),
    ("green", "cat"),
    ("white", "tree"),
    ("red", "boat"),
)


def held_out(thing: Thing) -> bool:
    """Whether no training image shows a thing of this kind, color and place together.

    Every kind in every color lacks one of the nine places, and the :data:`UNSEEN_PAIRS` all of them.
    """
    if (thing.color, thing.kind) in UNSEEN_PAIRS:
        return True
    usual = thing.color == USUAL_COLOR.get(thing.kind, "red")
    if usual and thing.place == "center":
        return False  # what a caption means that names neither
    kind, color, place = KINDS.index(thing.kind), list(COLORS).index(thing.color), PLACES.index(thing.place)
    return (4 * kind + 7 * color + place) % 9 == 6


def unseen(scene: Scene) -> bool:
    return any(held_out(thing) for thing in scene.things)


def training_scene(rng: random.Random) -> Scene:
    """A scene that is not held out; the usual values of what captions leave out are more frequent."""
    while True:
        scene = random_scene(rng, two_things=0.12, two_tone=0.12)
        if len(scene.things) == 1:
            thing, background = scene.things[0], scene.background
            place = "center" if rng.random() < 0.15 else thing.place
            if rng.random() < 0.25:
                background = ("white",)
            color = USUAL_COLOR.get(thing.kind, thing.color) if rng.random() < 0.15 else thing.color
            if color in background:
                continue
            scene = Scene((Thing(thing.kind, color, place, thing.size),), background)
        elif rng.random() < 0.2:
            one, other = (
                Thing(t.kind, t.color, p, t.size) for t, p in zip(scene.things, ("left", "right"), strict=True)
            )
            scene = Scene((one, other), scene.background)
        if not unseen(scene):
            return scene


@dataclass(frozen=True)
class Picture:
    """An image of the pools: its scene and its normalised latent, [channels, h, w]."""

    scene: Scene
    latent: NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """One segment of a context.

    A ``text`` with ``learned`` set is an answer, whose next tokens are a target. A ``query`` is a
    noisy ``picture`` whose velocity is the target; no later segment sees it.
    """

    kind: Literal["text", "vit", "vae", "query"]
    ids: tuple[int, ...] = ()
    learned: bool = False
    picture: Picture | None = None


Sample = tuple[Piece, ...]


@dataclass
class Pools:
    """Encoded images, and pairs of them with the instruction that leads from one to the other."""

    pictures: list[Picture] = field(default_factory=list)
    edits: list[tuple[Picture, str, Picture]] = field(default_factory=list)


def vit_pixels(image: Pixels) -> Pixels:
    """An image of the world as the understanding encoder gets it."""
    return np.asarray(VIT_SIDES.apply(VAE_SIDES.apply(Image.fromarray(image))))


def make_pools(
    rng: random.Random, pictures: int, edits: int, encode: Callable[[list[Scene]], NDArray[np.float32]]
) -> Pools:
    """``pictures`` images and ``edits`` pairs; ``encode`` makes latents [n, channels, h, w] of scenes."""
    scenes = [training_scene(rng) for _ in range(pictures)]
    instructions: list[str] = []
    while len(instructions) < edits:
        before = training_scene(rng)
        instruction, after = texts.edit(rng, before)
        if not unseen(after):
            instructions.append(instruction)
            scenes += [before, after]
    latents = encode(scenes)
    made = [Picture(scene, latent) for scene, latent in zip(scenes, latents, strict=True)]
    pairs = made[pictures:]
    return Pools(made[:pictures], list(zip(pairs[::2], instructions, pairs[1::2], strict=True)))


#: Samples of each task in a batch of 32, before and after :data:`TURN` of the time; a fraction is the probability of
#: one more. Drawing comes first: a thing is drawn well before it is named well.
EARLY = {"draw": 21, "edit": 4, "describe": 2, "ask": 3, "plan": 1, "reason": 0.4, "chat": 0.6}
LATE = {"draw": 9, "edit": 6, "describe": 8, "ask": 7, "plan": 1, "reason": 0.5, "chat": 0.5}
TURN = 0.4


class Sampler:
    """Draws samples from pools."""

    def __init__(self, pools: Pools, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = random.Random(seed)
        self._pools, self._tokenizer = pools, tokenizer
        self._encoded = cache(tokenizer.encode_text)

    def batch(self, time_share: float) -> list[Sample]:
        """One batch, when this share of the training's time is over."""
        mix = EARLY if time_share < TURN else LATE
        counts = {task: int(number) + (self.rng.random() < number % 1) for task, number in mix.items()}
        return [getattr(self, f"_{task}")() for task, count in counts.items() for _ in range(count)]

    def _text(self, text: str, learned: bool = False) -> Piece:
        ids = (self._tokenizer.start, *self._encoded(text), self._tokenizer.end)
        return Piece("text", ids, learned)

    def _picture(self) -> Picture:
        return self.rng.choice(self._pools.pictures)

    def _draw(self) -> Sample:
        picture = self._picture()
        query = Piece("query", picture=picture)
        if self.rng.random() < 0.1:
            return (query,)
        return (self._text(texts.caption(self.rng, picture.scene)), query)

    def _edit(self) -> Sample:
        before, instruction, after = self.rng.choice(self._pools.edits)
        queries = (Piece("query", picture=after), Piece("query", picture=after))
        prompt = self._text(instruction)
        images = (Piece("vae", picture=before), Piece("vit", picture=before))
        dropped = self.rng.random()
        if dropped < 0.1:
            return (*images, *queries)
        if dropped < 0.17:
            return (prompt, queries[0])
        if dropped < 0.25:
            opening = self._text(THINK_BEFORE_IMAGE)
            return (opening, *images, prompt, self._text(texts.thought(after.scene), learned=True), *queries)
        return (*images, prompt, *queries)

    def _plan(self) -> Sample:
        picture = self._picture()
        query, opening = Piece("query", picture=picture), self._text(THINK_BEFORE_IMAGE)
        prompt = self._text(texts.caption(self.rng, picture.scene))
        dropped = self.rng.random()
        if dropped < 0.1:
            return (opening, query)
        if dropped < 0.2:
            return (opening, prompt, query)
        return (opening, prompt, self._text(texts.thought(picture.scene), learned=True), query)

    def _describe(self) -> Sample:
        picture = self._seen()
        prompt = self._text(self.rng.choice(texts.DESCRIBE))
        return (Piece("vit", picture=picture), prompt, self._text(texts.description(picture.scene), learned=True))

    def _seen(self) -> Picture:
        """Any picture; now and then the result of an edit, which may be empty."""
        return self.rng.choice(self._pools.edits)[2] if self.rng.random() < 0.2 else self._picture()

    def _ask(self) -> Sample:
        asked, answer = texts.question(self.rng, (picture := self._picture()).scene)
        return (Piece("vit", picture=picture), self._text(asked), self._text(answer, learned=True))

    def _reason(self) -> Sample:
        opening = self._text(THINK_BEFORE_ANSWER)
        if self.rng.random() < 0.3:
            asked, answer = texts.chat(self.rng)
            thought = "<think>This is a question without an image.</think>"
            return (opening, self._text(asked), self._text(f"{thought} {answer}", learned=True))
        asked, answer = texts.question(self.rng, (picture := self._picture()).scene)
        answer = texts.reasoned(picture.scene, answer)
        return (opening, Piece("vit", picture=picture), self._text(asked), self._text(answer, learned=True))

    def _chat(self) -> Sample:
        asked, answer = texts.chat(self.rng)
        return (self._text(asked), self._text(answer, learned=True))


def corpus(seed: int, count: int) -> list[str]:
    """Texts of all tasks, for the tokenizer."""
    rng = random.Random(seed)
    lines = [THINK_BEFORE_IMAGE, THINK_BEFORE_ANSWER, "<think>This is a question without an image.</think>"] * 3
    lines += [*texts.DESCRIBE, *texts.CHAT, *texts.CHAT.values()] * 3
    for _ in range(count):
        scene = random_scene(rng, 0.2, 0.2)
        asked, answer = texts.question(rng, scene)
        instruction, after = texts.edit(rng, scene)
        said, reply = texts.chat(rng)
        lines += [texts.caption(rng, scene), asked, answer, instruction, texts.thought(after), texts.description(scene)]
        lines += [said, reply]
    return lines
