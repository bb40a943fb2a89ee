"""``python -m bench.weight_sharing CHECKPOINT``: what the stages' weights cost together.

Three processes build the thinker, the DiT and the decoder, one after the other, and read
every weight once. What they then hold together, less what they do with a tiny checkpoint, over
the bytes of the weights is 1 where each weight is in memory once. On a CPU they hold the sum
of their proportional set sizes; on a GPU, what more of it is in use than before, by whomever,
with the KV cache in it: a few per cent.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bagel_triton.deploy.config import DeployConfig, ThinkerConfig
from bagel_triton.engine.build import StageResources, build_decoder, build_dit, build_thinker
from bagel_triton.engine.dit.engine import DitEngine
from bagel_triton.engine.thinker.engine import ThinkerEngine
from bagel_triton.engine.vae import DecoderEngine
from bagel_triton.ipc.shm import SharedMemoryPrefix
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.device import DTYPES, resolve
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from bench.process_memory import ProcessMemory

BUILDERS: dict[str, Callable[[StageResources], ThinkerEngine | DitEngine | DecoderEngine]] = {
    "thinker": build_thinker,
    "dit": build_dit,
    "vae_decode": build_decoder,
}
MIB = 1 << 20
# Random weights of 430 MB in float32.
LARGE = TinyConfig(hidden_size=1024, layers=4, heads=8, kv_heads=2, intermediate_size=2816, vocab_size=2048)


@dataclass(frozen=True)
class StageCost:
    """One stage's process.

    ``build_s`` is the time from its configuration to an engine that takes requests, ``again_s``
    that of loading all weights once more, as a stage does that is not the first.
    """

    stage: str
    build_s: float
    again_s: float
    memory: ProcessMemory


@dataclass(frozen=True)
class Together:
    """All stages, and the bytes of the device's memory that they hold."""

    stages: tuple[StageCost, ...]
    held: int


@dataclass(frozen=True)
class Sharing:
    """The stages with a checkpoint whose weights take ``weight_bytes``, and with a tiny one."""

    weight_bytes: int
    large: Together
    tiny: Together

    @property
    def copies(self) -> float:
        """Copies of the weights in memory."""
        return (self.large.held - self.tiny.held) / self.weight_bytes


def run(device: str = "cpu") -> Iterator[tuple[str, Sharing]]:
    """Measure a checkpoint of random weights in the dtype that has to be converted, and in its own."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "large"
        tiny_checkpoint.write(checkpoint, LARGE)
        for dtype in DTYPES:
            yield dtype, measure(checkpoint, dtype, device)


def measure(checkpoint: Path, dtype: str = "float32", device: str = "cpu") -> Sharing:
    """Build the stages on ``checkpoint``, then on a tiny one, on ``device`` ("cpu", "cuda:0")."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        tiny_checkpoint.write(tiny, TinyConfig())
        without = _built(tiny, dtype, device)
    return Sharing(weight_bytes(checkpoint, dtype), _built(checkpoint, dtype, device), without)


def weight_bytes(checkpoint: Path, dtype: str) -> int:
    """Bytes of all weights when loaded; the autoencoder's are float32 always."""
    opened, meta = Checkpoint(checkpoint), torch.device("meta")
    modules = opened.load_bagel(meta, DTYPES[dtype]), opened.load_autoencoder(meta, torch.float32)
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def _built(checkpoint: Path, dtype: str, device: str) -> Together:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by each process
    pipes: list[Connection] = []
    before = _in_use(device)
    with SharedMemoryPrefix() as shared, ExitStack() as running:
        config = DeployConfig(
            checkpoint=str(checkpoint),
            shm_prefix=shared.prefix,
            device=device,
            dtype=dtype,  # type: ignore[arg-type]
            thinker=ThinkerConfig(kv_tokens=1024),
        )
        times: list[tuple[float, float]] = []
        for stage in BUILDERS:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, stage, config), daemon=True)
            process.start()
            theirs.close()
            running.callback(process.join)
            running.callback(ours.close)  # which ends the process
            times.append(ours.recv())
            pipes.append(ours)
        for pipe in pipes:  # a page's share is known once all have mapped it
            pipe.send("measure")
        costs = tuple(
            StageCost(stage, *seconds, pipe.recv()) for stage, seconds, pipe in zip(BUILDERS, times, pipes, strict=True)
        )
        on_cpu = device == "cpu"
        return Together(costs, sum(cost.memory.pss for cost in costs) if on_cpu else _in_use(device) - before)


def _in_use(device: str) -> int:
    """Bytes of a GPU that are in use, this process's own among them; 0 for the CPU."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _serve(pipe: Connection, stage: str, config: DeployConfig) -> None:
    started = time.perf_counter()
    resources = StageResources.open(config)
    engine, weights = BUILDERS[stage](resources), resources.weights
    build_s = time.perf_counter() - started
    started = time.perf_counter()
    anew = replace(resources, _loaded={})
    anew.load_bagel(None), anew.load_autoencoder()
    again_s = time.perf_counter() - started
    del anew, resources  # and with it the mapped checkpoint
    for candidate in gc.get_objects():
        if type(candidate) in (Bagel, Autoencoder):
            for tensor in candidate.state_dict().values():
                tensor.sum()
    pipe.send((build_s, again_s))
    try:
        pipe.recv()
        pipe.send(ProcessMemory.own())
        pipe.recv()
    except EOFError:
        engine.close()
        if weights is not None:
            weights.close()


def report(sharing: Sharing) -> str:
    """A table for a person."""
    lines = [f"{'':<15}  {'build s':>8}  {'again s':>8}  {'PSS MiB':>8}  {'anonymous MiB':>13}"]
    for name, together in (("", sharing.large), (" tiny", sharing.tiny)):
        for cost in together.stages:
            lines.append(
                f"{cost.stage + name:<15}  {cost.build_s:>8.2f}  {cost.again_s:>8.3f}  "
                f"{cost.memory.pss / MIB:>8.1f}  {cost.memory.anonymous / MIB:>13.1f}"
            )
    lines.append(f"weights: {sharing.weight_bytes / MIB:.1f} MiB, in memory {sharing.copies:.3f} times")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the measurement of one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    args = parser.parse_args(argv)
    device = resolve(args.device, args.dtype).device
    print(report(measure(args.checkpoint, args.dtype, device)))


if __name__ == "__main__":
    main()
