"""``python -m bench.memory_plan``: what ``bagel-triton memory`` says beside what a process takes.

A process has all stages on a checkpoint of random weights. It fills its KV cache pool with texts, prefills as many
tokens together as it may, and edits as many images together as it may. Its proportional set size is read all the
while, from outside. Libraries, their buffers and the interpreter are left out of the plan; they are what a process
with tiny weights takes for the same requests, beyond its own plan.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from PIL import Image

from bagel_triton.deploy.config import DeployConfig, DitConfig, Quantization, ThinkerConfig, VaeDecodeConfig
from bagel_triton.model.device import resolve
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving import memory_plan
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from bench.process_memory import ProcessMemory
from bench.setting import answer, plan_of

MIB = 1 << 20
SIDE, IMAGES, POOL, BATCH = 256, 2, 4096, 2048
# 430 MB of weights in float32, 215 MB in bfloat16 and on the disk.
LARGE = TinyConfig(hidden_size=1024, layers=4, heads=8, kv_heads=2, intermediate_size=2816, vocab_size=2048)
FORMS: tuple[tuple[str, Quantization | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("float32", "int8"),
    ("float32", "nf4"),
)


@dataclass(frozen=True)
class Taken:
    """Bytes of a process: once everything is loaded, at most while it loads, and at most while it serves."""

    loaded: int
    loading: int
    serving: int


@dataclass(frozen=True)
class Compared:
    """A plan of ``weights`` and ``total`` bytes, and what was taken for them."""

    name: str
    weights: int
    total: int
    taken: Taken

    def __str__(self) -> str:
        taken = self.taken
        columns = [f"{self.weights / MIB:8.1f}", f"{taken.loaded / MIB:8.1f}", f"{taken.loading / MIB:8.1f}"]
        columns += [
            f"{self.total / MIB:8.1f}",
            f"{taken.serving / MIB:8.1f}",
            f"{taken.serving / self.total - 1:+7.1%}",
        ]
        return f"{self.name:<15}  " + "  ".join(columns)


HEADER = f"{'MiB':<15}  {'weights':>8}  {'loaded':>8}  {'loading':>8}  {'plan':>8}  {'serving':>8}"


def compare(checkpoint: Path, tiny: Path, dtype: str, quantization: Quantization | None) -> Compared:
    """The plan of ``checkpoint``, and what its process takes beyond that of the ``tiny`` one."""
    plans, taken = [], []
    for folder in (checkpoint, tiny):
        config = _config(folder, dtype, quantization)
        opened = Checkpoint(folder, most_pixels=config.max_generated_image_size)
        plans.append(memory_plan.plan(opened, config, resolve("cpu", dtype), SIDE, SIDE))
        taken.append(measure(config))
    (need, small), (large, base) = plans, taken
    return Compared(
        f"{dtype} {quantization or ''}",
        need.weights,
        need.total,
        Taken(
            loaded=large.loaded - base.loaded + small.weights,
            loading=large.loading - base.loaded + small.weights,
            serving=large.serving - base.serving + small.total,
        ),
    )


def _config(checkpoint: Path, dtype: str, quantization: Quantization | None) -> DeployConfig:
    return DeployConfig(
        str(checkpoint),
        pipeline="bagel_single_stage",
        device="cpu",
        dtype=dtype,  # type: ignore[arg-type]
        max_generated_image_size=SIDE * SIDE,
        thinker=ThinkerConfig(
            kv_tokens=POOL, max_num_batched_tokens=BATCH, quantization=quantization, lease_ttl_s=600, encoder_cache_mb=0
        ),
        dit=DitConfig(max_num_seqs=IMAGES, quantization=quantization),
        vae_decode=VaeDecodeConfig(),
    )


def measure(config: DeployConfig) -> Taken:
    """What a process with the stages of ``config`` takes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, config))
    process.start()
    theirs.close()
    assert process.pid is not None, "it is running"
    try:
        ours.recv()  # it has its libraries
        ours.send("load")
        loading = _most_until(ours, process.pid)
        loaded = ProcessMemory.of(process.pid).pss
        ours.send("serve")
        return Taken(loaded, loading, _most_until(ours, process.pid))
    finally:
        ours.close()
        process.join()


def _most_until(pipe: Connection, pid: int) -> int:
    """The most that a process takes until it has said something."""
    most = 0
    while not pipe.poll(0.01):
        most = max(most, ProcessMemory.of(pid).pss)
    pipe.recv()
    return most


def _serve(pipe: Connection, config: DeployConfig) -> None:
    pipe.send("started")
    pipe.recv()
    stages = LocalStages(config)
    try:
        for parameters in (stages.thinker._model.state_dict(), stages.decoder._autoencoder.state_dict()):
            for tensor in parameters.values():
                tensor.view(torch.uint8).amax()  # a mapped page counts once it is read
        pipe.send("loaded")
        pipe.recv()
        texts = [_text(seed) for seed in range(POOL // 512)]
        edits = [_edit(seed) for seed in range(IMAGES)]
        with ThreadPoolExecutor(len(texts)) as pool:
            list(pool.map(lambda request: _answered(stages, request), texts))
            list(pool.map(lambda request: _drawn(stages, request), edits))
        pipe.send("served")
    finally:
        stages.close()


def _text(seed: int) -> GenerationRequest:
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (600,), generator=generator).tolist()
    return GenerationRequest(prompt=bytes(letters).decode(), modality="text", max_tokens=2)


def _edit(seed: int) -> GenerationRequest:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (seed, 100, 200)).save(file, "PNG")
    return GenerationRequest(
        prompt="Make it blue",
        image=(file.getvalue(),),
        height=SIDE,
        width=SIDE,
        num_inference_steps=4,
        cfg_interval=(0.0, 1.0),
        seed=seed,
    )


def _answered(stages: LocalStages, request: GenerationRequest) -> None:
    answer(stages.think(plan_of(stages, request)))


def _drawn(stages: LocalStages, request: GenerationRequest) -> None:
    plan = plan_of(stages, request)
    job = answer(stages.think(plan))[0].job
    assert job is not None, "the request is for an image"
    for latents in answer(stages.denoise(job))[0]:
        answer(stages.decode(latents, plan.request_id, plan.scheduling))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each form of weights."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory_plan", description=__doc__)
    parser.add_argument("--layers", type=int, default=LARGE.layers, help="of the random weights (default: %(default)s)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        large, tiny = Path(folder) / "large", Path(folder) / "tiny"
        tiny_checkpoint.write(large, replace(LARGE, layers=args.layers))
        tiny_checkpoint.write(tiny, TinyConfig())
        print(HEADER)
        for dtype, quantization in FORMS:
            print(compare(large, tiny, dtype, quantization), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
