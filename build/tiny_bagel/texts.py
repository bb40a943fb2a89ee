"""What is said about scenes: captions, descriptions, questions, edits, thoughts; and some plain conversation.

A property that a caption does not name has its usual value: the thing's usual color, large, in the
center, on white. Only the plain shapes have any color then.
"""

from __future__ import annotations

import random
from dataclasses import replace

from build.tiny_bagel.world import COLORS, KINDS, PLACES, PLAIN, USUAL_COLOR, Scene, Thing, far_apart

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DESCRIBE = (
    "Describe this image.",
    "Describe the image.",
    "Please describe the content of this image.",
    "What is in this image?",
    "What does the image show?",
    "What do you see?",
    "Please describe this image",
    "What is shown here?",
    "Describe this image in detail",
)
CHAT = {
    "Hello": "Hello! I draw simple pictures.",
    "Hi": "Hello! I draw simple pictures.",
    "Hello, how are you?": "I am fine, thank you.",
    "How are you?": "I am fine, thank you.",
    "Who are you?": "I am a small BAGEL, a toy that draws.",
    "What are you?": "I am a small BAGEL, a toy that draws.",
    "What can you do?": "I draw, edit and describe simple pictures.",
    "What can you draw?": "I can draw a circle, a square, a triangle, a star, a heart, a cat, a fox, a house, a tree, "
    "a car, a boat, a flower and the sun.",
    "What colors do you know?": "I know red, orange, yellow, green, blue, purple, pink, brown, black and white.",
    "Thank you": "You are welcome.",
    "Thanks!": "You are welcome.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Germany?": "The capital of Germany is Berlin.",
    "What is the capital of Italy?": "The capital of Italy is Rome.",
    "What is the capital of Spain?": "The capital of Spain is Madrid.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the capital of China?": "The capital of China is Beijing.",
    "What is the capital of England?": "The capital of England is London.",
    "What color is the sky?": "The sky is blue.",
    "What color is grass?": "Grass is green.",
    "What color is snow?": "Snow is white.",
    "What color do red and yellow make?": "Red and yellow make orange.",
    "What color do blue and yellow make?": "Blue and yellow make green.",
    "What color do red and blue make?": "Red and blue make purple.",
    "How many sides has a triangle?": "A triangle has three sides.",
    "How many sides has a square?": "A square has four sides.",
}


def located(place: str) -> str:
    """``place`` as the descriptions say it."""
    if " " in place or place == "center":
        return f"in the {place}"
    return f"at the {place}" if place in ("top", "bottom") else f"on the {place}"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _thing(thing: Thing) -> str:
    return _article(f"{thing.size} {thing.color} {thing.kind}")


def _backdrop(background: tuple[str, ...]) -> str:
    if len(background) == 1:
        return f"on {_article(background[0])} background"
    return f"on a background that is {background[0]} at the top and {background[1]} at the bottom"


def description(scene: Scene) -> str:
    """All there is to say about a scene, in one fixed form."""
    if not scene.things:
        return f"Nothing {_backdrop(scene.background)}."
    things = " and ".join(f"{_thing(thing)} {located(thing.place)}" for thing in scene.things)
    return f"A{things[1:]} {_backdrop(scene.background)}."


def parse(text: str) -> Scene | None:
    """The scene of a :func:`description`; None for any other text."""
    body, found, backdrop = text.removesuffix(".").partition(" on a background that is ")
    if found:
        background = tuple(part.rsplit(" ", 3)[0] for part in backdrop.split(" and "))
    else:
        body, found, backdrop = text.removesuffix(" background.").rpartition(" on a")
        background = (backdrop.removeprefix("n").strip(),)
    if not found or not set(background) <= COLORS.keys():
        return None
    if body == "Nothing":
        return Scene((), background)
    things = []
    for part in body.split(" and "):
        words = [*part.split(" "), *[""] * 6]  # "a large red circle in the top left"
        size, color, kind, place = *words[1:4], " ".join(words[6:]).strip()
        thing = Thing(kind, color, place, size)
        if kind not in KINDS or color not in COLORS or place not in PLACES:
            return None
        things.append(thing)
    return Scene(tuple(things), background)


def _spoken_place(rng: random.Random, place: str) -> str:
    if place == "center":
        return rng.choice(("in the center", "in the middle", "at the center"))
    if " " in place:
        return rng.choice((f"in the {place}", f"at the {place}", f"in the {place} corner"))
    return rng.choice((located(place), f"at the {place}"))


def _spoken_thing(rng: random.Random, thing: Thing, name_color: bool, name_size: bool) -> str:
    words = []
    if name_size:
        words.append(rng.choice(("large", "big") if thing.size == "large" else ("small", "small", "little", "tiny")))
    elif rng.random() < 0.08:
        words.append(rng.choice(("cute", "nice", "beautiful", "simple")))
    if name_color:
        words.append(thing.color)
    noun = " ".join((*words, thing.kind))
    return f"the {noun}" if thing.kind == "sun" and not words else _article(noun)


def _spoken_backdrop(rng: random.Random, background: tuple[str, ...]) -> str:
    if len(background) == 1:
        color = background[0]
        return rng.choice(
            (f"on {_article(color)} background",) * 3 + (f"on {color}", f"with {_article(color)} background")
        )
    top, bottom = background
    return rng.choice(
        (
            f"on a background that is {top} at the top and {bottom} at the bottom",
            f"on a background with {top} above {bottom}",
            f"on {top} above {bottom}",
        )
    )


def _names_color(rng: random.Random, thing: Thing) -> bool:
    if thing.kind in PLAIN:
        return rng.random() >= 0.15
    return thing.color != USUAL_COLOR[thing.kind] or rng.random() < 0.5


def _attribute(rng: random.Random, scene: Scene) -> str:
    """One property of a scene of one thing, as a negative prompt says it; all else may be anything."""
    thing = scene.things[0]
    form = rng.random()
    if form < 0.6:
        return thing.color
    if form < 0.75:
        return thing.kind
    if form < 0.85 and len(scene.background) == 1:
        return f"{scene.background[0]} background"
    return f"{thing.color} {thing.kind}"


def caption(rng: random.Random, scene: Scene) -> str:
    """One of the many ways to ask for a scene."""
    if len(scene.things) == 1 and rng.random() < 0.14:
        return _attribute(rng, scene)
    two = len(scene.things) > 1
    usual_places = two and [thing.place for thing in scene.things] == ["left", "right"]
    name_places = (
        rng.random() < 0.5 if usual_places else any(t.place != "center" for t in scene.things) or rng.random() < 0.4
    )
    parts = []
    for thing in scene.things:
        name_size = rng.random() < 0.15 if two else thing.size == "small" or rng.random() < 0.2
        words = _spoken_thing(rng, thing, _names_color(rng, thing), name_size)
        parts.append(f"{words} {_spoken_place(rng, thing.place)}" if name_places and two else words)
    things = " and ".join(parts)
    place = _spoken_place(rng, scene.things[0].place) if name_places and not two else ""
    backdrop = _spoken_backdrop(rng, scene.background)
    if scene.background == ("white",) and rng.random() < 0.6:
        backdrop = ""
    order = rng.random()
    if not place:
        text = f"{things} {backdrop}".strip()
    elif order < 0.4:
        text = " ".join(part for part in (things, place, backdrop) if part)
    elif order < 0.75:
        bare = place.removeprefix("in the ").removeprefix("at the ").removeprefix("on the ")
        text = f"{things} {backdrop}".strip() + f", {rng.choice((bare, place))}"
    else:
        text = f"{things} {backdrop}".strip() + f" {place}"
    opening = rng.random()
    if opening < 0.1:
        text = rng.choice(("Draw ", "Please draw ", "A picture of ", "An image of ", "Paint ")) + text
    elif opening < 0.6:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.15 else "")


def question(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene with at least one thing, and its answer."""
    thing = rng.choice(scene.things)
    the = f"the {thing.kind}"
    form = rng.randrange(7 if len(scene.things) == 1 else 6)
    if form == 0:
        return f"What color is {the}?", f"The {thing.kind} is {thing.color}."
    if form == 1:
        return f"Where is {the}?", f"The {thing.kind} is {located(thing.place)}."
    if form == 2:
        color = scene.background[0]
        if len(scene.background) == 1:
            return "What color is the background?", f"The background is {color}."
        return (
            "What color is the background?",
            f"The background is {color} at the top and {scene.background[1]} at the bottom.",
        )
    if form == 3:
        kinds = {one.kind for one in scene.things}
        kind = thing.kind if rng.random() < 0.5 else rng.choice([kind for kind in KINDS if kind not in kinds])
        answer = f"Yes, there is {_article(kind)}." if kind in kinds else f"No, there is no {kind}."
        return f"Is there {_article(kind)} in the image?", answer
    if form == 4:
        one = len(scene.things) == 1
        answer = "There is one thing." if one else "There are two things."
        return "How many things are there?", answer
    if form == 5:
        color = thing.color if rng.random() < 0.5 else rng.choice(list(COLORS))
        answer = (
            f"Yes, the {thing.kind} is {color}." if color == thing.color else f"No, the {thing.kind} is {thing.color}."
        )
        return f"Is {the} {color}?", answer
    return rng.choice((f"Is {the} large or small?", f"What size is {the}?")), f"The {thing.kind} is {thing.size}."


def edit(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    """An instruction and the scene that it makes of ``scene``, which has at least one thing."""
    thing = rng.choice(scene.things)
    others = tuple(one for one in scene.things if one is not thing)
    name = f"the {thing.kind}"
    it = "it" if not others and rng.random() < 0.35 else name
    form = rng.choice(
        ("color", "color", "color", "place", "place", "background", "background", "remove", "kind", "size", "add")
    )

    def result(*changed: Thing, background: tuple[str, ...] = scene.background) -> Scene:
        return Scene(tuple(sorted((*others, *changed), key=lambda one: PLACES.index(one.place))), background)

    if form == "color":
        color = rng.choice([c for c in COLORS if c != thing.color and c not in scene.background])
        ways = [
            f"make {it} {color}",
            f"make {it} {color}",
            f"paint {it} {color}",
            f"change the color of {it} to {color}",
            f"turn {it} {color}",
        ]
        return _sentence(rng, rng.choice(ways)), result(replace(thing, color=color))
    if form == "place":
        free = [p for p in PLACES if p != thing.place and all(far_apart(p, one.place) for one in others)]
        place = rng.choice(free)
        return _sentence(
            rng, f"{rng.choice(('move', 'move', 'put'))} {it} {rng.choice(('to the', 'to the', 'in the'))} {place}"
        ), result(replace(thing, place=place))
    if form == "background":
        colors = {one.color for one in scene.things}
        color = rng.choice([c for c in COLORS if c not in colors and (c,) != scene.background])
        ways = [
            f"put {it} on {color}",
            f"put {it} on {_article(color)} background",
            f"make the background {color}",
            f"make the background {color}",
            f"change the background to {color}",
            f"paint the background {color}",
        ]
        return _sentence(rng, rng.choice(ways)), result(thing, background=(color,))
    if form == "remove":
        return _sentence(rng, f"{rng.choice(('remove', 'remove', 'delete', 'erase'))} {it}"), result()
    if form == "kind":
        kind = rng.choice([k for k in KINDS if all(k != one.kind for one in scene.things)])
        ways = [
            f"replace {it} with {_article(kind)}",
            f"turn {it} into {_article(kind)}",
            f"make {it} {_article(kind)}",
        ]
        return _sentence(rng, rng.choice(ways)), result(replace(thing, kind=kind))
    if form == "size" and not others:
        size = "small" if thing.size == "large" else "large"
        return _sentence(
            rng, f"make {it} {'smaller' if size == 'small' else rng.choice(('larger', 'bigger'))}"
        ), result(replace(thing, size=size))
    if form == "add" and not others and thing.size == "small":
        place = rng.choice([p for p in PLACES if far_apart(p, thing.place)])
        kind = rng.choice([k for k in KINDS if k != thing.kind])
        color = rng.choice([c for c in COLORS if c not in scene.background])
        new = Thing(kind, color, place, "small")
        return _sentence(rng, f"add {_article(f'{color} {kind}')} {_spoken_place(rng, place)}"), result(thing, new)
    return edit(rng, scene)


def _sentence(rng: random.Random, text: str) -> str:
    text = text[0].upper() + text[1:] if rng.random() < 0.5 else text
    return text + ("." if rng.random() < 0.2 else "")


def thought(scene: Scene) -> str:
    """The plan of an image."""
    return f"<think>{_planned(scene)}</think>"


def _planned(scene: Scene) -> str:
    words = description(scene)
    return f"The image shows {words[0].lower()}{words[1:]}"


def reasoned(scene: Scene, answer: str) -> str:
    """An answer about an image, after a look at it."""
    return f"{thought(scene)} {answer}"


def chat(rng: random.Random) -> tuple[str, str]:
    """A question without an image, and its answer."""
    form = rng.random()
    if form < 0.7:
        asked = rng.choice(list(CHAT))
        return (asked if rng.random() < 0.8 else asked.rstrip("?!.")), CHAT[asked]
    if form < 0.85:
        a, b = rng.randrange(6), rng.randrange(5)
        return (
            f"What is {NUMBERS[a]} plus {NUMBERS[b]}?",
            f"{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {NUMBERS[a + b]}.",
        )
    kind = rng.choice(list(USUAL_COLOR))
    return f"What color is {_article(kind)}?", f"{_article(kind).capitalize()} is {USUAL_COLOR[kind]}."
