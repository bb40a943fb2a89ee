"""``python -m build.tiny_bagel.train FOLDER``: trains the autoencoder, the encoder for understanding and the
transformer, one after the other, on CPU cores.

The learning rates follow the share of the wall-clock time that is over, so a slower machine makes
fewer steps in the same time. ``FOLDER`` then holds ``checkpoint/`` in the published layout, the
losses as CSV files and a PNG. A run that was interrupted goes on from its last saved state.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import pickle
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.tokenizer import Tokenizer
from build.tiny_bagel import autoencoder as ae
from build.tiny_bagel import checkpoint, data, forward, parallel, sheet, vision
from build.tiny_bagel.optimizer import Muon
from build.tiny_bagel.world import CENTERS, PLACES, SIDE, Pixels, Scene, random_scene, render

PICTURES, EDIT_SHARE, WIDE_SHARE = 4_000, 1.0, 0.02
"""Encoded images of each process; pairs of them, and larger images of each size, to each of these."""
ADAM_RATE, MUON_RATE = 2e-3, 1e-2
WARM_UP = 0.015
"""Share of the time."""
TEXT_WEIGHT = 0.3
"""Twice as much from ``data.TURN`` on."""
TIME_SHIFT = 3.0
"""As inference's default: the noisy times, at which a drawing's composition is decided, are more frequent."""
AVERAGING = 0.996
MINUTES = {
    "new": (12.0, "of the autoencoder, half of it on crops"),
    "refine": (18.0, "of the autoencoder on whole images"),
    "vision": (6.0, "of the understanding encoder on labels"),
    "model": (70.0, "of the transformer"),
    "decoder": (8.0, "of the autoencoder's decoder alone"),
}
SAVE_EVERY_S = 120.0
BUFFER = 6_000_000

Report = Callable[[float, int, dict[str, float]], None]


class Progress:
    """The progress bar and the CSV file of a run; does nothing but in the first process."""

    def __init__(self, path: Path, title: str, shown: bool) -> None:
        self._bar = tqdm(
            total=100, desc=title, unit="%", disable=not shown, bar_format="{l_bar}{bar}| {elapsed}{postfix}"
        )
        self._file = path.open("a", newline="") if shown else None
        self._sums: dict[str, float] = {}
        self._count = 0

    def __call__(self, share: float, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if self._count == 25:
            means = {name: value / self._count for name, value in self._sums.items()}
            csv.writer(self._file).writerow([step, f"{share:.4f}", *(f"{value:.6g}" for value in means.values())])
            self._file.flush()
            self._bar.n = round(100 * share, 1)
            self._bar.set_postfix(step=step, **{name: f"{value:.4g}" for name, value in means.items()})
            self._sums, self._count = {}, 0


def train_autoencoder(ranks: parallel.Ranks, folder: Path, minutes: float, seed: int, stage: ae.Stage) -> None:
    """Train the autoencoder and write ``autoencoder.pt``; but for the first stage, go on with the one there.

    The latents are fixed by the encoder, which is good early. The decoder takes most of the work.
    """
    number = ae.STAGES.index(stage)
    torch.manual_seed(seed)
    rng = random.Random(1000 * seed + 10 * number + ranks.rank)

    def image(side: int) -> Pixels:
        scene = random_scene(rng)
        row, column = divmod(PLACES.index(rng.choice(scene.things).place), 3)
        top, left = (min(max(CENTERS[at] - side // 2 + rng.randint(-8, 8), 0), SIDE - side) for at in (row, column))
        return render(scene)[top : top + side, left : left + side]

    def images(count: int, side: int) -> Pixels:
        return np.stack([image(side) for _ in range(count)])

    model = ae.new() if stage == "new" else load_autoencoder(folder).requires_grad_(True)
    torch.manual_seed(1000 * seed + 10 * number + ranks.rank)
    report = Progress(folder / f"autoencoder-{stage}.csv", f"autoencoder, {stage}", ranks.rank == 0)
    steps = ae.train(model, images, minutes, report, ranks, stage)
    if ranks.rank == 0:
        if stage != "decoder":
            ae.normalise(model, ae.as_input(images(256, SIDE)))
        _save(folder / "autoencoder.pt", {"model": model.state_dict(), "steps": steps, "stage": stage})


def train_vision(ranks: parallel.Ranks, folder: Path, minutes: float, seed: int) -> None:
    """Train the understanding encoder and write ``vision.pt``."""
    torch.manual_seed(seed)
    model = checkpoint.new()
    report = Progress(folder / "vision.csv", "vision", ranks.rank == 0)
    vision.train(model, random.Random(1000 * seed + 20 + ranks.rank), minutes, report, ranks)
    if ranks.rank == 0:
        _save(folder / "vision.pt", {name: getattr(model, name).state_dict() for name in vision.MODULES})


def load_autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder of ``autoencoder.pt``."""
    model = ae.new()
    model.load_state_dict(torch.load(folder / "autoencoder.pt")["model"])
    return model.eval().requires_grad_(False)


def encode(
    model: Autoencoder, scenes: list[Scene], height: int = SIDE, width: int = SIDE, shown: bool = False
) -> NDArray[np.float32]:
    """Normalised latents of the scenes' images of this size, [scenes, channels, h, w]."""
    parts = []
    for first in tqdm(range(0, len(scenes), 64), desc="latents", disable=not shown):
        pixels = np.stack([render(scene, height, width) for scene in scenes[first : first + 64]])
        images = ae.as_input(pixels).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            parts.append(ae.means(model, images).contiguous().numpy())
    return np.concatenate(parts)


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _pools(path: Path, autoencoder: Autoencoder, pictures: int, seed: int, shown: bool) -> data.Pools:
    """The encoded images of one process, from ``path`` where an interrupted run left them."""
    if not path.exists():
        encoder = partial(encode, autoencoder, shown=shown)
        edits, wide = (int(share * pictures) for share in (EDIT_SHARE, WIDE_SHARE))
        made = data.make_pools(random.Random(seed), pictures, edits, wide, encoder)
        path.write_bytes(pickle.dumps(made))
    pools = pickle.loads(path.read_bytes())
    assert isinstance(pools, data.Pools)
    return pools


class Optimizer:
    """Muon for the layers' matrices, AdamW for embeddings, the ends of the network, norms and biases."""

    def __init__(self, model: Bagel, ranks: parallel.Ranks) -> None:
        matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
        rest = [p for name, p in model.named_parameters() if name not in matrices]
        self._muon = Muon(matrices.values(), ranks)
        self._adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0, fused=True)

    def step(self, share: float) -> float:
        """Step with the rates of this share of the time; the factor that they have then."""
        factor = share / WARM_UP if share < WARM_UP else max(0.01, 0.5 * (1 + math.cos(math.pi * share)))
        for group in self._adam.param_groups:
            group["lr"] = ADAM_RATE * factor
        self._adam.step()
        self._muon.step(MUON_RATE * factor)
        return factor

    def state(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "muon": self._muon.state()}

    def load(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        self._muon.load(state["muon"])


def train_model(ranks: parallel.Ranks, folder: Path, minutes: float, seed: int, pictures: int = PICTURES) -> None:
    """Train the transformer; write ``model.pt`` while at it."""
    first = ranks.rank == 0
    autoencoder = load_autoencoder(folder)
    tokenizer = Tokenizer(folder / "tokenizer", checkpoint.VOCABULARY)
    pools = _pools(folder / f"pools-{ranks.rank}.pickle", autoencoder, pictures, 1000 * seed + ranks.rank, first)
    torch.manual_seed(seed)
    model = checkpoint.new()
    for name, state in torch.load(folder / "vision.pt").items():
        getattr(model, name).load_state_dict(state)
    averaged = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = Optimizer(model, ranks)
    step, before = 0, 0.0
    if (folder / "model.pt").exists():
        saved = torch.load(folder / "model.pt")
        model.load_state_dict(saved["model"])
        optimizer.load(saved["optimizer"])
        averaged, step, before = saved["averaged"], saved["step"], saved["seconds"]
    draws = 1_000_000 * seed + 100 * step + ranks.rank
    sampler = data.Sampler(pools, tokenizer, draws)
    collate = forward.Collator(tokenizer, ae.deviation(autoencoder).numpy(), TIME_SHIFT, draws)
    report = Progress(folder / "model.csv", "model", first)
    began = saved_at = time.monotonic()
    bf16 = torch.cpu._is_avx512_bf16_supported()
    share = before / (60 * minutes)
    while share < 1:
        batch = collate(sampler.batch(share))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            flow, text = forward.losses(model, batch)
        model.zero_grad(set_to_none=True)
        weight = TEXT_WEIGHT if share < data.TURN else 2 * TEXT_WEIGHT
        (flow + weight * text).backward()
        now = time.monotonic()
        clock = (before + now - began) / (60 * minutes)
        share, *shown = ranks.average(model.parameters(), [clock, flow.item(), text.item()])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = optimizer.step(share)
        step += 1
        _average(averaged, model, min(AVERAGING, step / (step + 20)))
        report(share, step, {"flow": shown[0], "text": shown[1], "rate": factor})
        if first and (now - saved_at > SAVE_EVERY_S or share >= 1):
            saved_at = now
            state = {"model": model.state_dict(), "averaged": averaged, "optimizer": optimizer.state()}
            _save(folder / "model.pt", {**state, "step": step, "seconds": before + now - began})


@torch.no_grad()
def _average(averaged: dict[str, Tensor], model: Bagel, decay: float) -> None:
    values = dict(model.named_parameters())
    torch._foreach_lerp_(list(averaged.values()), [values[name] for name in averaged], 1 - decay)


def export(folder: Path) -> None:
    """Write ``checkpoint/`` from the averaged weights of ``model.pt``."""
    model = checkpoint.new()
    model.load_state_dict(torch.load(folder / "model.pt")["averaged"])
    checkpoint.write(folder / "checkpoint", model, load_autoencoder(folder), folder / "tokenizer")


def train_all(folder: Path, minutes: Mapping[str, float], pictures: int, seed: int, processes: int) -> None:
    """Every stage that is not over yet; the autoencoder's last one comes after the transformer."""

    def run(work: Callable[..., None], name: str, *more: object) -> None:
        parallel.run(processes, BUFFER, work, folder, minutes[name], seed, *more)

    def autoencoder(stage: ae.Stage) -> None:
        path = folder / "autoencoder.pt"
        over = ae.STAGES.index(torch.load(path)["stage"]) if path.exists() else -1
        if over < ae.STAGES.index(stage):
            run(train_autoencoder, stage, stage)

    autoencoder("new")
    autoencoder("refine")
    if not (folder / "vision.pt").exists():
        run(train_vision, "vision")
    run(train_model, "model", pictures)
    autoencoder("decoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, (usual, of) in MINUTES.items():
        parser.add_argument(f"--{name}-minutes", type=float, default=usual, help=f"{of} (default: %(default)s)")
    parser.add_argument(
        "--pictures",
        type=int,
        default=PICTURES,
        help="encoded for the transformer, by each process (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "tokenizer").exists():
        checkpoint.write_tokenizer(args.folder / "tokenizer")
    minutes = {name: getattr(args, f"{name}_minutes") for name in MINUTES}
    train_all(args.folder, minutes, args.pictures, args.seed, args.processes)
    export(args.folder)
    for losses in args.folder.glob("*.csv"):
        if losses.stat().st_size:
            sheet.curves(losses).save(losses.with_suffix(".png"))
    sheet.draw(args.folder / "checkpoint").save(args.folder / "sheet.png")
    print(f"wrote {args.folder / 'checkpoint'}")


if __name__ == "__main__":
    main()
