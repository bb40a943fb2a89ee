"""``python -m build.tiny_bagel.sheet CHECKPOINT IMAGE``: drawings of some captions, and curves of the losses."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from build.tiny_bagel import evaluate
from build.tiny_bagel.world import Pixels, Scene, Thing, render

CAPTIONS = (
    "A cute cat",
    "a red circle on a blue background",
    "an orange cat on a blue background, bottom left",
    "A big yellow star",
    "a purple heart on a yellow background",
    "a fox in the top right on a green background",
    "A small house on the left",
    "a tree on a background that is blue at the top and green at the bottom",
    "a red car at the bottom on a white background",
    "A boat on blue",
    "a pink flower in the center on a black background",
    "the sun on a blue background, top left",
    "a green square on the right on an orange background",
    "a blue triangle on a pink background",
    "a red circle on the left and a blue star on the right",
    "a white cat at the top and a brown fox at the bottom on a purple background",
)
EDITS = ("make it red", "move it to the left", "make the background green", "replace it with a star", "remove it")
SCALE, COLUMNS = 3, 4
CURVE = (900, 360)
LINES = ((210, 60, 60), (50, 100, 210), (60, 150, 80))


def grid(images: Sequence[Pixels], titles: Sequence[str], columns: int) -> Image.Image:
    """Images of one size in rows, each with its title below."""
    side, band = images[0].shape[0] * SCALE, 30
    sheet = Image.new("RGB", (columns * (side + 8), -(-len(images) // columns) * (side + band)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (pixels, title) in enumerate(zip(images, titles, strict=True)):
        x, y = index % columns * (side + 8) + 4, index // columns * (side + band) + 2
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        half = title.rfind(" ", 0, 34) if len(title) > 34 else len(title)
        draw.text((x, y + side), f"{title[:half]}\n{title[half:].strip()}", fill="black", spacing=0)
    return sheet


def draw(checkpoint: Path, seed: int = 0) -> Image.Image:
    """The sheet of a checkpoint: drawings of :data:`CAPTIONS`, then :data:`EDITS` of one image."""
    image = render(Scene((Thing("circle", "blue", "center"),), ("yellow",)))
    requests = [evaluate.drawing(caption, seed + at) for at, caption in enumerate(CAPTIONS)]
    requests += [evaluate.drawing(edit, seed, image=(evaluate.png(image),)) for edit in EDITS]
    with evaluate.opened(checkpoint) as stages:
        replies = evaluate.run(stages, requests)
        said = evaluate.run(stages, [evaluate.asking("Describe this image.", image)])[0].text
    drawn = [reply.pixels for reply in replies if reply.pixels is not None]
    titles = [*CAPTIONS, *(f"(edit) {edit}" for edit in EDITS), said]
    return grid([*drawn, image], titles, COLUMNS)


def curves(path: Path) -> Image.Image:
    """The columns of a run's CSV file but for the rate, each on its own logarithmic scale over the steps."""
    rows = np.array([[float(cell) for cell in row] for row in csv.reader(path.open())])
    picture = Image.new("RGB", CURVE, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((8, 4), f"{path.stem}: {int(rows[-1, 0])} steps", fill="black")
    for column, color in zip(range(2, rows.shape[1] - 1), LINES, strict=False):
        values = np.log(np.maximum(rows[:, column], 1e-6))
        low, high = values.min(), values.max()
        across = 10 + (CURVE[0] - 20) * rows[:, 0] / rows[-1, 0]
        down = CURVE[1] - 10 - (CURVE[1] - 50) * (values - low) / max(high - low, 1e-6)
        pen.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=color, width=2)
        text = f"{np.exp(values[0]):.3g} to {np.exp(values[-1]):.3g}"
        pen.text((180 + 160 * (column - 2), 4), text, fill=color)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw(args.checkpoint, args.seed).save(args.image)


if __name__ == "__main__":
    main()
