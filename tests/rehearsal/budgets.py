"""The rehearsed steps, and how many kernels and waits each may take; prints what they would take on two GPUs.

``python -m tests.rehearsal.budgets`` prints the table of docs/benchmarks.md. Its times are calculated, not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from tests.rehearsal.fake_gpu import Tally
from tests.rehearsal.scenes import (
    Stage,
    adapted,
    at_full_depth,
    decode_of,
    edit,
    encoding_of,
    image,
    pixels_of,
    step_of,
)

# Rates a kernel reaches, not the data sheet's: products and flash-2 attention in bfloat16, and memory.
PRODUCTS, ATTENTION = 650e12, 330e12
BANDWIDTH = {"H100": 2.8e12, "H200": 4.0e12}
BETWEEN_KERNELS_S = 1e-6
LAUNCH_S = 12e-6  # of Python, torch and the driver
WAIT_S = 20e-6  # from the end of a kernel to the next launch
EVERY = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "top_logprobs": 5,
}


@dataclass(frozen=True)
class Budget:
    """A step, and the most kernels and waits that it may take."""

    name: str
    scene: Callable[[Stage], Tally]
    kernels: int
    waits: int
    cheap: bool = False  # it is rehearsed by every run of the tests
    form: str | None = None  # of quantised weights


BUDGETS = (
    Budget("guided step, 512", lambda stage: step_of(stage, image(512)), 40, 1, cheap=True),
    Budget("guided step, 1024", lambda stage: step_of(stage, image(1024)), 40, 1),
    Budget("guided step, edit, 512", lambda stage: step_of(stage, edit(512)), 50, 1),
    Budget("guided step, 4 images, 512", lambda stage: step_of(stage, image(512, n=4)), 120, 1),
    Budget("guided step, 512, no graph", lambda stage: step_of(stage, image(512), graphs=False), 699, 1, cheap=True),
    Budget("guided step, 512, adapter", lambda stage: step_of(stage, adapted(stage, image(512))), 40, 1),
    Budget("guided step, 512, fp8_w8a8", lambda stage: step_of(stage, image(512)), 40, 1, form="fp8_w8a8"),
    Budget("decode, 1 text", lambda stage: decode_of(stage, 1), 10, 1),
    Budget("decode, 8 texts", lambda stage: decode_of(stage, 8), 10, 1),
    Budget("decode, 32 texts", lambda stage: decode_of(stage, 32), 10, 1, cheap=True),
    Budget("decode, 8 sampled texts", lambda stage: decode_of(stage, 8, temperature=1.0), 20, 1),
    Budget("decode, 32 texts, every setting", lambda stage: decode_of(stage, 32, **EVERY), 60, 1, cheap=True),
    Budget("decode, 8 texts, adapter", lambda stage: decode_of(stage, 8, adapter=True), 10, 1, cheap=True),
    Budget("decode, 8 texts, int8", lambda stage: decode_of(stage, 8), 10, 1, form="int8"),
    Budget("decode, 32 texts, no graph", lambda stage: decode_of(stage, 32, graphs=False), 500, 1, cheap=True),
    Budget("an image to edit, encoded, 512", lambda stage: encoding_of(stage, 512), 900, 4),
    Budget("pixels, 1024", lambda stage: pixels_of(stage, 1024), 300, 1, cheap=True),
)


def seconds(tally: Tally, bandwidth: float) -> tuple[float, float]:
    """Calculated seconds of a step on a GPU and on its host; the longer one is the step's."""
    products = max((tally.flops / PRODUCTS + tally.attention_flops / ATTENTION), tally.weight_bytes / bandwidth)
    kernels = sum(tally.kernels.values()) + tally.graph_kernels
    gpu = products + tally.bytes / bandwidth + kernels * BETWEEN_KERNELS_S
    return gpu, tally.launches * LAUNCH_S + tally.stops * WAIT_S


def row(name: str, tally: Tally) -> str:
    """A line of the table."""
    times = [f"{1e3 * seconds(tally, bandwidth)[0]:.1f}" for bandwidth in BANDWIDTH.values()]
    host = f"{1e3 * seconds(tally, 1.0)[1]:.1f}"
    tflop = f"{tally.flops / 1e12:.2f} + {tally.attention_flops / 1e12:.2f}"
    gigabytes = f"{tally.weight_bytes / 1e9:.1f} + {tally.bytes / 1e9:.2f}"
    counts = f"{tally.launches:,} | {tally.graph_kernels:,} | {tally.stops} | {tally.uploads} / {tally.downloads}"
    return f"| {name} | {counts} | {tflop} | {gigabytes} | {times[0]} | {times[1]} | {host} |"


def main() -> None:
    """Print the table; names of steps as arguments choose among them."""
    columns = ("step", "launches", "kernels in graphs", "waits", "copies up / down", "TFLOP, products + attention")
    columns += ("GB, products + others", *(f"{name}, ms" for name in BANDWIDTH), "host, ms")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for budget in BUDGETS:
        if not sys.argv[1:] or budget.name in sys.argv[1:]:
            print(row(budget.name, at_full_depth(budget.scene, form=budget.form)), flush=True)


if __name__ == "__main__":
    main()
