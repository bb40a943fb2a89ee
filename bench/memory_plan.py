"""``python -m bench.memory_plan``: what ``bagel-triton memory`` says beside what processes take.

The stages are on a checkpoint of random weights, all in one process and each in its own. They fill the KV cache pool
with texts, prefill as many tokens together as they may, edit as many images together as they may, and decode: each
alone, then all at the same time. The kernel's count is read all the while, from outside: the proportional set size of
one process, the resident set of each stage. Libraries, their buffers and the interpreter are left out of the plan;
they are what processes with tiny weights take for the same requests, beyond their own plan.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch
from PIL import Image

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.engine.build import StageResources, build_decoder, build_dit, build_thinker
from bagel_triton.engine.loop import EngineLoop
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.ipc.shm import SharedMemoryPrefix
from bagel_triton.model.device import resolve
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.messages import SchedulingParams
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.serving import memory_plan
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from bench.process_memory import ProcessMemory

MIB = 1 << 20
SIDE, STEPS = 256, 2
BATCH, IMAGES = 2048, 2  # prefilled together, edited together
# 430 MB of weights in float32, 215 MB in bfloat16 and on the disk.
LARGE = TinyConfig(hidden_size=1024, layers=4, heads=8, kv_heads=2, intermediate_size=2816, vocab_size=2048)
FORMS: tuple[tuple[str, str | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("float32", "int8"),
    ("float32", "nf4"),
)
Task = tuple[Any, str, SchedulingParams]
Run = Callable[[str, Sequence[Task]], list[Any]]


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
        return f"{self.name:<24}  " + "  ".join(columns)


HEADER = f"{'MiB':<24}  {'weights':>8}  {'loaded':>8}  {'loading':>8}  {'plan':>8}  {'serving':>8}"
ALL = "all in one process"
BUILDERS: Mapping[str, Callable[[StageResources], EngineLoop[Any, Any]]] = {
    "thinker": build_thinker,
    "dit": build_dit,
    "vae_decode": build_decoder,
}


def compare(
    checkpoint: Path, tiny: Path, dtype: str, quantization: str | None, batch: int = BATCH, images: int = IMAGES
) -> Iterator[Compared]:
    """The plan of ``checkpoint``, and what its processes take beyond those of the ``tiny`` one."""
    for pipeline in ("bagel_single_stage", "bagel"):
        planned, taken = [], []
        for folder in (checkpoint, tiny):
            config = _config(folder, dtype, quantization, pipeline, batch, images)
            opened = Checkpoint(folder, most_pixels=config.max_generated_image_size)
            need = memory_plan.plan(opened, config, resolve("cpu", dtype), SIDE, SIDE)
            stages = {str(stage.stage): (stage.weights, stage.total) for stage in need.stages}
            planned.append({ALL: (need.weights, need.total)} if pipeline != "bagel" else stages)
            taken.append(measure(config))
        for name, (weights, total) in planned[0].items():
            (small_weights, small_total), large, base = planned[1][name], taken[0][name], taken[1][name]
            yield Compared(
                f"{dtype} {quantization or ''} {name}".replace("  ", " "),
                weights,
                total,
                Taken(
                    loaded=large.loaded - base.loaded + small_weights,
                    loading=large.loading - base.loaded + small_weights,
                    serving=large.serving - base.serving + small_total,
                ),
            )


def _config(
    checkpoint: Path, dtype: str, quantization: str | None, pipeline: str, batch: int, images: int
) -> DeployConfig:
    form: Any = quantization
    return DeployConfig(
        str(checkpoint),
        pipeline=pipeline,
        device="cpu",
        dtype=dtype,  # type: ignore[arg-type]
        max_generated_image_size=SIDE * SIDE,
        thinker=ThinkerConfig(
            kv_tokens=2 * batch, max_num_batched_tokens=batch, quantization=form, lease_ttl_s=600, encoder_cache_mb=0
        ),
        dit=DitConfig(max_num_seqs=images, quantization=form),
        vae_decode=VaeDecodeConfig(),
    )


def measure(config: DeployConfig) -> dict[str, Taken]:
    """What the processes of ``config`` take, by stage; or the one with all stages."""
    names = [ALL] if config.topology.one_process else list(BUILDERS)
    with SharedMemoryPrefix() as shared:
        config = msgspec.structs.replace(config, shm_prefix=shared.prefix)
        with _started(names, config) as pipes, _watched(pipes) as most:
            for pipe, _ in pipes.values():
                _call(pipe, "load")
            loaded, loading = {name: _size(name, pid) for name, (_, pid) in pipes.items()}, dict(most)
            locks = {name: threading.Lock() for name in names}

            def run(stage: str, tasks: Sequence[Task]) -> list[Any]:
                with locks[stage]:
                    return list(_call(pipes[stage][0], (stage, list(tasks))))

            if ALL in pipes:
                _call(pipes[ALL][0], config)
            else:
                exercise(config, run)
        return {name: Taken(loaded[name], loading[name], most[name]) for name in names}


@contextmanager
def _started(names: Sequence[str], config: DeployConfig) -> Iterator[dict[str, tuple[Connection, int]]]:
    """A process for each name, with its pipe and its id."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    try:
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, name, config), daemon=True)
            process.start()
            theirs.close()
            assert process.pid is not None, "it is running"
            processes.append(process)
            pipes[name] = ours, process.pid
            ours.recv()  # it has its libraries
        yield pipes
    finally:
        for pipe, _ in pipes.values():
            pipe.close()
        for process in processes:
            process.join()


@contextmanager
def _watched(pipes: Mapping[str, tuple[Connection, int]]) -> Iterator[dict[str, int]]:
    """The most that each process has taken so far."""
    most, ended = dict.fromkeys(pipes, 0), threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            for name, (_, pid) in pipes.items():
                most[name] = max(most[name], _size(name, pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def _size(name: str, pid: int) -> int:
    """A stage's pages count whole: its plan is as if it shared no weights."""
    memory = ProcessMemory.of(pid)
    return memory.pss if name == ALL else memory.resident


def _call(pipe: Connection, message: Any) -> Any:
    pipe.send(message)
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(pipe: Connection, name: str, config: DeployConfig) -> None:
    """Load when told to, then run what comes, until the pipe ends."""
    pipe.send("started")
    engines: dict[str, EngineLoop[Any, Any]] = {}
    with ExitStack() as running, suppress(EOFError):
        pipe.recv()
        if name == ALL:
            stages = LocalStages(config)
            running.callback(stages.close)
            engines = {"thinker": stages.thinker, "dit": stages.dit, "vae_decode": stages.decoder}
        else:
            engines[name] = BUILDERS[name](StageResources.open(config, name))
            running.callback(engines[name].close)
        for module in _modules(engines):
            for tensor in module.state_dict().values():
                tensor.view(torch.uint8).amax()  # a mapped page counts once it is read
        pipe.send("loaded")
        while True:
            message = pipe.recv()
            if isinstance(message, DeployConfig):
                exercise(message, lambda stage, tasks: _ran(engines[stage], tasks))
                pipe.send("served")
            else:
                stage, tasks = message
                pipe.send(_ran(engines[stage], tasks))


def _modules(engines: Mapping[str, Any]) -> Iterator[torch.nn.Module]:
    for engine in engines.values():
        yield from (part for part in vars(engine).values() if isinstance(part, torch.nn.Module))


def _ran(engine: EngineLoop[Any, Any], tasks: Sequence[Task]) -> list[Any]:
    """The results of ``tasks``, all at the same time."""
    jobs = [engine.submit(task, request_id, lambda event: None, scheduling) for task, request_id, scheduling in tasks]
    return [job.done.result()[0] for job in jobs]


def exercise(config: DeployConfig, run: Run) -> None:
    """Bring each stage to its peak alone, then all at the same time."""
    planner, batch = RequestPlanner.open(config), config.thinker.max_num_batched_tokens

    def planned(request: GenerationRequest) -> Task:
        plan = planner.expand(request)
        return plan, plan.request_id, plan.scheduling

    def lent() -> list[Task]:
        results = run("thinker", [planned(_edit(seed)) for seed in range(config.dit.max_num_seqs)])
        return [(result.job, result.job.request_id, result.job.scheduling) for result in results]

    def prefilled() -> None:
        run("thinker", [planned(_text(seed)) for seed in range(batch // 512)])

    for first in range(config.thinker.kv_tokens // batch):
        run("thinker", [planned(_text(seed)) for seed in range(first, first + batch // 512)])
    latents = [(latents, "decode", SchedulingParams()) for images in run("dit", lent()) for latents in images]
    run("vae_decode", latents)
    jobs = lent()
    with ThreadPoolExecutor(2) as pool:
        denoising = pool.submit(run, "dit", jobs)

        def decode() -> None:
            while not denoising.done():
                run("vae_decode", latents)

        decoding = pool.submit(decode)
        while not denoising.done():
            prefilled()
        denoising.result(), decoding.result()


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
        num_inference_steps=STEPS,
        cfg_interval=(0.0, 1.0),
        seed=seed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rows of each form of weights."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory_plan", description=__doc__)
    parser.add_argument("--layers", type=int, default=LARGE.layers, help="of the random weights (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=LARGE.hidden_size, help="width (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, help="tokens prefilled together (default: %(default)s)")
    parser.add_argument("--images", type=int, default=IMAGES, help="edited together (default: %(default)s)")
    parser.add_argument("--forms", nargs="+", metavar="DTYPE[/FORM]", help="of weights (default: all four)")
    args = parser.parse_args(arguments)
    names = [f"{dtype}/{form or ''}" for dtype, form in FORMS] if args.forms is None else args.forms
    wide = replace(LARGE, layers=args.layers, hidden_size=args.hidden_size, heads=args.hidden_size // 128)
    large = replace(wide, intermediate_size=args.hidden_size * 11 // 4)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, tiny = Path(folder) / "large", Path(folder) / "tiny"
        tiny_checkpoint.write(checkpoint, large)
        tiny_checkpoint.write(tiny, TinyConfig())
        print(HEADER)
        for dtype, _, form in (name.partition("/") for name in names):
            for row in compare(checkpoint, tiny, dtype, form or None, args.batch, args.images):
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
