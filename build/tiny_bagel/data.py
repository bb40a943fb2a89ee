"""Training samples: the segments of one context each, as inference lays them out, and what is to be learned there."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

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
WIDE_SIZES = ((64, 128), (128, 64), (96, 96), (128, 128))
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

    The tokens of a ``text`` after the first ``given`` ones are an answer, and a target. A ``query``
    is a noisy ``picture`` whose velocity is the target; no later segment sees it.
    """

    kind: Literal["text", "vit", "vae", "query"]
    ids: tuple[int, ...] = ()
    given: int | None = None
    picture: Picture | None = None


Sample = tuple[Piece, ...]
Form = Literal["bare", "template", "marked", "wrapped"]


@dataclass
class Pools:
    """Encoded images; pairs of them with the instruction that leads from one to the other; larger images."""

    pictures: list[Picture] = field(default_factory=list)
    edits: list[tuple[Picture, str, Picture]] = field(default_factory=list)
    wide: list[Picture] = field(default_factory=list)


def vit_pixels(image: Pixels) -> Pixels:
    """An image of the world as the understanding encoder gets it."""
    return np.asarray(VIT_SIDES.apply(VAE_SIDES.apply(Image.fromarray(image))))


class Encode(Protocol):
    def __call__(self, scenes: list[Scene], height: int = SIDE, width: int = SIDE) -> NDArray[np.float32]:
        """Latents of images of this size: [scenes, channels, h, w]."""


def make_pools(rng: random.Random, pictures: int, edits: int, wide: int, encode: Encode) -> Pools:
    """``pictures`` images, ``edits`` pairs, and ``wide`` images of each of :data:`WIDE_SIZES`."""
    scenes = [training_scene(rng) for _ in range(pictures)]
    instructions: list[str] = []
    while len(instructions) < edits:
        before = training_scene(rng)
        instruction, after = texts.edit(rng, before)
        if not unseen(after):
            instructions.append(instruction)
            scenes += [before, after]
    made = [Picture(scene, latent) for scene, latent in zip(scenes, encode(scenes), strict=True)]
    pairs = made[pictures:]
    larger: list[Picture] = []
    for height, width in WIDE_SIZES:
        scenes = [training_scene(rng) for _ in range(wide)]
        latents = encode(scenes, height, width)
        larger += [Picture(scene, latent) for scene, latent in zip(scenes, latents, strict=True)]
    return Pools(made[:pictures], list(zip(pairs[::2], instructions, pairs[1::2], strict=True)), larger)


#: A bare question; one in a chat template, its image before it or at the template's mark; one between markers.
FORMS: tuple[Form, ...] = ("bare", "template", "marked", "wrapped")
FORM_WEIGHTS = (0.75, 0.06, 0.07, 0.12)


def exchange(tokenizer: Tokenizer, form: Form, asked: str, answer: str, picture: Picture | None = None) -> Sample:
    """A question, perhaps about an image, and its answer as the prompt's form continues."""
    image: Sample = () if picture is None else (Piece("vit", picture=picture),)
    if form == "bare":
        pieces = [(tokenizer.start, *tokenizer.encode_text(text), tokenizer.end) for text in (asked, answer)]
        return (*image, Piece("text", pieces[0]), Piece("text", pieces[1], given=1))
    if form == "wrapped":
        prompt = f"<|im_start|>{asked}<|im_end|>"
    else:
        opening = "<|im_start|>user\n"
        if form == "marked" and image:
            image, opening = (Piece("text", tuple(tokenizer.encode(opening))), *image), "\n"
        prompt = f"{opening}{asked}<|im_end|>\n<|im_start|>assistant\n"
    given = tokenizer.encode(prompt)
    return (*image, Piece("text", (*given, *tokenizer.encode_text(answer), tokenizer.end), len(given)))


#: Samples of each task in a batch of 32, before and after :data:`TURN` of the time; a fraction is the probability of
#: one more. Drawing comes first: a thing is drawn well before it is named well.
EARLY = {"draw": 18, "wide": 0.5, "edit": 6, "describe": 2, "ask": 3, "plan": 1, "reason": 0.4, "chat": 0.6}
LATE = {"draw": 6.5, "wide": 1, "edit": 10.5, "describe": 4.5, "ask": 6, "plan": 2, "reason": 0.5, "chat": 1}
TURN = 0.35


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
        return Piece("text", ids, 1 if learned else None)

    def _exchange(self, asked: str, answer: str, picture: Picture | None = None) -> Sample:
        form = self.rng.choices(FORMS, FORM_WEIGHTS)[0]
        return exchange(self._tokenizer, form, asked, answer, picture)

    def _picture(self) -> Picture:
        return self.rng.choice(self._pools.pictures)

    def _wide(self) -> Sample:
        return self._drawn(self.rng.choice(self._pools.wide))

    def _draw(self) -> Sample:
        return self._drawn(self._picture())

    def _drawn(self, picture: Picture) -> Sample:
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
        return self._exchange(self.rng.choice(texts.DESCRIBE), texts.description(picture.scene), picture)

    def _seen(self) -> Picture:
        """Any picture; now and then the result of an edit, which may be empty."""
        return self.rng.choice(self._pools.edits)[2] if self.rng.random() < 0.2 else self._picture()

    def _ask(self) -> Sample:
        picture = self._picture()
        return self._exchange(*texts.question(self.rng, picture.scene), picture)

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
        return self._exchange(*texts.chat(self.rng))


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
