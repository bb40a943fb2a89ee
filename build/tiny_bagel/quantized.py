"""``python -m build.tiny_bagel.quantized``: what each form of quantised weights costs, by the toy's own evaluation.

Each form draws the same scenes with the same noise, and answers and describes the same pictures, as float32 does.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bagel_triton.deploy.vocabulary import QUANTIZATIONS
from build.tiny_bagel import evaluate, texts
from build.tiny_bagel.evaluate import CHECKPOINT, Reply, asking, caption, drawing, held_out_scenes, judge, run, seen
from build.tiny_bagel.world import Scene, render

FORMS = QUANTIZATIONS[1:]


def replies(
    checkpoint: Path, form: str | None, scenes: Sequence[Scene], questions: Sequence[str], seed: int, dtype: str
) -> tuple[list[Reply], list[Reply]]:
    """Drawings of ``scenes``, and what is said to ``questions`` and to "Describe this image." about them."""
    with evaluate.opened(checkpoint, dtype, form) as stages:
        drawn = run(stages, [drawing(caption(scene), seed + at) for at, scene in enumerate(scenes)])
        asked = [asking(question, render(scene)) for question, scene in zip(questions, scenes, strict=True)]
        asked += [asking("Describe this image.", render(scene)) for scene in scenes]
        return drawn, run(stages, asked)


def psnr(one: Reply, other: Reply) -> float:
    """Decibels of an image against another of 8 bits; 99 where they are equal."""
    assert one.pixels is not None
    assert other.pixels is not None
    error = np.square(one.pixels.astype(float) - other.pixels).mean()
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS, help="forms to measure (default: all)")
    parser.add_argument("--count", type=int, default=40, help="scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes and of the noise (default: %(default)s)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    scenes = held_out_scenes(rng, args.count, pairs=False)
    asked = [texts.question(rng, scene) for scene in scenes]
    questions = [question for question, _ in asked]
    print(
        "| form | drawings right | PSNR, mean and least | answers right | texts as in float32 |\n|---|---|---|---|---|"
    )
    reference: tuple[list[Reply], list[Reply]] | None = None
    for form, dtype in ((None, "float32"), (None, "bfloat16"), *((form, "float32") for form in args.form)):
        drawn, said = replies(args.checkpoint, form, scenes, questions, args.seed, dtype)
        reference = reference or (drawn, said)
        right = judge(scenes, [seen(reply) for reply in drawn])["all three"]
        noise = [psnr(*pair) for pair in zip(drawn, reference[0], strict=True)]
        answers = [reply.text == answer for reply, (_, answer) in zip(said, asked, strict=False)]
        same = [reply.text == other.text for reply, other in zip(said, reference[1], strict=True)]
        print(
            f"| {form or dtype} | {100 * right:.0f} % | {np.mean(noise):.1f} dB, {min(noise):.1f} dB "
            f"| {100 * np.mean(answers):.0f} % | {100 * np.mean(same):.0f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
