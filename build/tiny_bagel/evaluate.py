"""``python -m build.tiny_bagel.evaluate``: what the checkpoint draws, edits, says and answers, judged by rules.

The scenes are held out of training: see :func:`build.tiny_bagel.data.held_out`. Everything runs
through the product's own stages in this process; drawings are read back from their pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from bagel_triton.deploy.config import DeployConfig, ThinkerConfig
from bagel_triton.pipeline import offline
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.pipeline.pipeline import GeneratedImage
from bagel_triton.protocol.errors import BagelError
from bagel_triton.protocol.events import AnswerEvent
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.weights.files import CheckpointFiles
from build.tiny_bagel import texts
from build.tiny_bagel.data import UNSEEN_PAIRS, held_out, training_scene, unseen
from build.tiny_bagel.world import COLORS, KINDS, PLACES, PLAIN, SIDE, Pixels, Scene, Thing, recognise, render

CHECKPOINT = Path(__file__).parent / "checkpoint"
STEPS = 25
LOAD_S, SILENCE_S = 120.0, 600.0
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LARGER = {128: 40, 512: 12}
"""Sides of larger images, and how many of each are drawn."""
UNCHANGED = 12.0
"""Mean difference of pixels, of 255, outside of what an edit is about."""


@dataclass(frozen=True)
class Reply:
    """The result of a request: an image, or an answer."""

    pixels: Pixels | None = None
    text: str = ""
    thought: str = ""


@contextlib.contextmanager
def opened(checkpoint: Path, dtype: str = "float32", quantization: str | None = None) -> Iterator[LocalStages]:
    """The stages of ``checkpoint`` in this process."""
    thinker = msgspec.structs.replace(ThinkerConfig(), quantization=quantization)
    config = msgspec.structs.replace(DeployConfig(str(checkpoint)), dtype=dtype, thinker=thinker)
    with contextlib.closing(offline.load(config, LOAD_S)) as stages:
        yield stages


def run(stages: LocalStages, requests: Sequence[GenerationRequest], at_once: int = 8) -> list[Reply]:
    """The reply to each request, in order.

    Raises:
        BagelError: that of the first request that failed.
    """
    replies = [Reply() for _ in requests]
    for index, item in offline.run_batch(stages, requests, SILENCE_S, at_once):
        if isinstance(item, BagelError):
            raise item
        if isinstance(item, AnswerEvent):
            replies[index] = Reply(replies[index].pixels, item.content.strip(), item.reasoning.strip())
        elif isinstance(item, GeneratedImage):
            replies[index] = Reply(np.asarray(item.pixels), replies[index].text, replies[index].thought)
    return replies


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def drawing(prompt: str, seed: int, **fields: object) -> GenerationRequest:
    given = {"num_inference_steps": STEPS, **fields}
    return GenerationRequest(prompt=prompt, modality="image", seed=seed, **given)  # type: ignore[arg-type]


def asking(prompt: str, image: Pixels | None = None, **fields: object) -> GenerationRequest:
    images = None if image is None else (png(image),)
    return GenerationRequest(prompt=prompt, modality="text", image=images, max_tokens=80, **fields)  # type: ignore[arg-type]


def held_out_scenes(rng: random.Random, count: int, pairs: bool) -> list[Scene]:
    """Scenes of one held-out thing each: never seen in that color at all (``pairs``), or never at that place."""
    things = [Thing(kind, color, place) for kind in KINDS for color in COLORS for place in PLACES]
    things = [thing for thing in things if held_out(thing) and ((thing.color, thing.kind) in UNSEEN_PAIRS) == pairs]
    chosen = rng.sample(things, min(count, len(things)))
    return [Scene((thing,), (rng.choice([color for color in COLORS if color != thing.color]),)) for thing in chosen]


def caption(scene: Scene) -> str:
    """Asks for every property of a scene of one thing."""
    thing = scene.things[0]
    article = "an" if thing.color[0] in "aeiou" else "a"
    ground = "an" if scene.background[0][0] in "aeiou" else "a"
    what = f"{article} {thing.color} {thing.kind} {texts.located(thing.place)}"
    return f"{what} on {ground} {scene.background[0]} background"


Scores = dict[str, float]


def judge(wanted: Sequence[Scene], found: Sequence[Scene | None]) -> Scores:
    """Shares of scenes of one thing whose properties are right."""
    hits: dict[str, list[bool]] = {name: [] for name in ("color", "shape", "place", "background", "all three")}
    for scene, seen in zip(wanted, found, strict=True):
        thing = scene.things[0]
        other = seen.things[0] if seen and len(seen.things) == 1 else None
        right = [
            other is not None and getattr(other, name) == getattr(thing, name) for name in ("color", "kind", "place")
        ]
        for name, hit in zip(("color", "shape", "place"), right, strict=True):
            hits[name].append(hit)
        hits["background"].append(seen is not None and seen.background == scene.background)
        hits["all three"].append(all(right))
    return {name: sum(found) / len(found) for name, found in hits.items()}


def draw_row(stages: LocalStages, scenes: Sequence[Scene], seed: int, **fields: object) -> tuple[Scores, list[Reply]]:
    replies = run(stages, [drawing(caption(scene), seed + index, **fields) for index, scene in enumerate(scenes)])
    return judge(scenes, [seen(reply) for reply in replies]), replies


def seen(reply: Reply) -> Scene:
    """What is drawn; of a larger image, in its upper left part, where the scene is."""
    assert reply.pixels is not None
    return recognise(reply.pixels[:SIDE, :SIDE])


def loose_row(stages: LocalStages, count: int, seed: int, **fields: object) -> Scores:
    """How often all that is drawn has the color of a prompt that is a color and leaves all else open."""
    colors = [list(COLORS)[at % len(COLORS)] for at in range(count)]
    replies = run(stages, [drawing(color, seed + at, **fields) for at, color in enumerate(colors)])
    drawn = [{thing.color for thing in seen(reply).things} for reply in replies]
    return {"color": sum(found == {color} for found, color in zip(drawn, colors, strict=True)) / count}


def negative_row(stages: LocalStages, rng: random.Random, count: int, seed: int) -> Scores:
    """How often a plain shape of no named color keeps its color when a negative prompt names that.

    The negative prompt is the color alone, or "a red circle".
    """
    prompts = [f"a {rng.choice(PLAIN)}" for _ in range(count)]
    plain = [seen(reply) for reply in run(stages, [drawing(prompt, seed + at) for at, prompt in enumerate(prompts)])]
    drawn = [(at, scene.things[0]) for at, scene in enumerate(plain) if len(scene.things) == 1]
    scores: Scores = {}
    for name, phrase in (("color alone", "{color}"), ("color and shape", "a {color} {kind}")):
        asked = [
            drawing(prompts[at], seed + at, negative_prompt=phrase.format(color=thing.color, kind=thing.kind))
            for at, thing in drawn
        ]
        again = [(thing, seen(reply)) for (_, thing), reply in zip(drawn, run(stages, asked), strict=True)]
        kept = [any(one.color == thing.color for one in scene.things) for thing, scene in again]
        shape = [[one.kind for one in scene.things] == [thing.kind] for thing, scene in again]
        scores[f"{name}: color kept"] = sum(kept) / len(kept)
        scores[f"{name}: shape right"] = sum(shape) / len(shape)
    return scores


def edit_row(stages: LocalStages, rng: random.Random, count: int, seed: int, **fields: object) -> Scores:
    """Edits of one thing whose result, or whose source, is held out."""
    cases: list[tuple[Scene, str, Scene]] = []
    while len(cases) < count:
        before = training_scene(rng)
        if len(before.things) != 1 or len(before.background) != 1:
            continue
        instruction, after = texts.edit(rng, before)
        if unseen(after) or (not after.things and rng.random() < 0.2):
            cases.append((before, instruction, after))
    requests = [
        drawing(instruction, seed + at, image=(png(render(before)),), **fields)
        for at, (before, instruction, _) in enumerate(cases)
    ]
    replies = run(stages, requests)
    right, unchanged = [], []
    for (_, _, after), reply in zip(cases, replies, strict=True):
        found = seen(reply)
        looks = [(t.kind, t.color, t.place) for t in found.things] == [(t.kind, t.color, t.place) for t in after.things]
        right.append(looks and found.background == after.background)
        assert reply.pixels is not None
        difference = np.abs(reply.pixels.astype(float) - render(after)).mean()
        unchanged.append(difference < UNCHANGED)
    return {"right": sum(right) / count, "pixels as expected": sum(unchanged) / count}


def say_rows(stages: LocalStages, rng: random.Random, scenes: Sequence[Scene]) -> dict[str, Scores]:
    """Answers about held-out scenes, and descriptions of them."""
    asked = [texts.question(rng, scene) for scene in scenes]
    replies = run(stages, [asking(q, render(scene)) for (q, _), scene in zip(asked, scenes, strict=True)])
    answers = [reply.text == answer for (_, answer), reply in zip(asked, replies, strict=True)]
    thinking = run(stages, [asking(q, render(scene), think=True) for (q, _), scene in zip(asked, scenes, strict=True)])
    thought = [reply.text == answer for (_, answer), reply in zip(asked, thinking, strict=True)]
    described = run(stages, [asking(rng.choice(texts.DESCRIBE), render(scene)) for scene in scenes])
    chats = [(question, answer) for question, answer in texts.CHAT.items()]
    talked = run(stages, [asking(question) for question, _ in chats])
    wrapped = run(stages, [asking(f"<|im_start|>{question}<|im_end|>") for question, _ in chats])
    templated = run(stages, [asking(TEMPLATE.format(question)) for question, _ in chats])
    conversation = {
        name: sum(reply.text == answer for (_, answer), reply in zip(chats, replies, strict=True)) / len(chats)
        for name, replies in (("bare", talked), ("wrapped", wrapped), ("chat template", templated))
    }
    return {
        "answers": {"right": sum(answers) / len(answers)},
        "answers, think": {"right": sum(thought) / len(thought)},
        "descriptions": judge(scenes, [texts.parse(reply.text) for reply in described]),
        "chat": conversation,
    }


def round_trip(stages: LocalStages, scenes: Sequence[Scene], drawn: Sequence[Reply]) -> Scores:
    """The scene that was asked for against the description of what was drawn."""
    said = run(stages, [asking("Describe this image.", reply.pixels) for reply in drawn])
    return judge(scenes, [texts.parse(reply.text) for reply in said])


def evaluate(
    checkpoint: Path, count: int, seed: int, report: Callable[[str, Scores], None], quick: bool = False
) -> None:
    """Report every row, each as soon as it is known."""
    rng = random.Random(seed)
    scenes, pairs = held_out_scenes(rng, count, pairs=False), held_out_scenes(rng, count, pairs=True)
    with opened(checkpoint) as stages:
        scores, drawn = draw_row(stages, scenes, seed)
        report("draw", scores)
        report("draw, round trip", round_trip(stages, scenes, drawn))
        report("draw, without guidance", draw_row(stages, scenes, seed, cfg_text_scale=1.0)[0])
        report("draw, a color alone", loose_row(stages, count, seed))
        report("draw, a color alone, without guidance", loose_row(stages, count, seed, cfg_text_scale=1.0))
        report("draw, never seen in that color", draw_row(stages, pairs, seed)[0])
        if not quick:
            report("draw, think", draw_row(stages, scenes, seed, think=True, max_think_tokens=80)[0])
            report("draw, TaylorSeer", draw_row(stages, scenes, seed, cache="taylorseer")[0])
            for steps in (10, 50):
                report(f"draw, {steps} steps", draw_row(stages, scenes, seed, num_inference_steps=steps)[0])
            for side, few in LARGER.items():
                if side <= CheckpointFiles(checkpoint).config.latent.max_side:
                    row = draw_row(stages, scenes[:few], seed, height=side, width=side)[0]
                    report(f"draw, {side}x{side}, {few} scenes", row)
            report("negative color", negative_row(stages, rng, count, seed))
        report("edit", edit_row(stages, rng, count, seed))
        for name, row in say_rows(stages, rng, scenes).items():
            report(name, row)
    if not quick:
        with opened(checkpoint, "bfloat16") as stages:
            report("draw, bfloat16", draw_row(stages, scenes, seed)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=100, help="scenes a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes and of the noise (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the main rows")
    args = parser.parse_args()
    began = time.monotonic()
    print(f"{args.count} scenes a row, seed {args.seed}, {STEPS} steps\n\n| row | right |\n|---|---|")

    def report(name: str, scores: Scores) -> None:
        print(f"| {name} | {', '.join(f'{what} {100 * share:.0f} %' for what, share in scores.items())} |", flush=True)

    evaluate(args.checkpoint, args.count, args.seed, report, args.quick)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
