"""``python -m bench.memory_plan``: what ``bagel-triton memory`` says beside what processes take.

The stages are on a checkpoint of random weights, all in one process and each in its own. They fill the KV cache pool
with texts, prefill as many tokens together as they may, edit as many images together as they may, and decode: each
alone, then all at the same time. The kernel counts, and remembers the most: the proportional set size of one process,
the resident set of each stage. The plan leaves out libraries, their buffers and the interpreter. Before weights are
loaded they are what a process with tiny weights has, and afterwards what each process keeps from small requests.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
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
from unittest.mock import patch

import msgspec
import torch
from PIL import Image

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.engine.build import StageResources, build_decoder, build_dit, build_thinker, heap_limits
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
SIDE, SMALL, STEPS = 256, 64, 6
BATCH, IMAGES = 2048, 2  # prefilled together, edited together
# 430 MB of weights in float32, 215 MB in bfloat16 and on the disk.
LARGE = TinyConfig(hidden_size=1024, layers=4, heads=8, kv_heads=2, intermediate_size=2816, vocab_size=2048)
FORMS: tuple[tuple[str, str | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("float32", "int8"),
    ("float32", "nf4"),
)
# glibc's names for what engine/build.py sets where the files of a model have 256 MiB.
HEAP = dict(zip(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), map(str, heap_limits(256 << 20)), strict=True))
HEAP["MALLOC_ARENA_MAX"] = "1"
Task = tuple[Any, str, SchedulingParams]
Run = Callable[[str, Sequence[Task]], list[Any]]


@dataclass(frozen=True)
class Taken:
    """Bytes of a process: once everything is loaded, at most while it loads, and what serving adds at most."""

    loaded: int
    loading: int
    serving: int = 0


@dataclass(frozen=True)
class Compared:
    """A plan of ``loaded`` and ``total`` bytes, and what was taken for them."""

    name: str
    loaded: int
    total: int
    taken: Taken

    def __str__(self) -> str:
        taken = self.taken
        columns = [f"{self.loaded / MIB:8.1f}", f"{taken.loaded / MIB:8.1f}", f"{taken.loading / MIB:8.1f}"]
        columns += [
            f"{self.total / MIB:8.1f}",
            f"{taken.serving / MIB:8.1f}",
            f"{taken.serving / self.total - 1:+7.1%}",
        ]
        return f"{self.name:<24}  " + "  ".join(columns)


HEADER = f"{'MiB':<24}  {'plan':>8}  {'loaded':>8}  {'loading':>8}  {'plan':>8}  {'serving':>8}"
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
        configs = [_config(folder, dtype, quantization, pipeline, batch, images) for folder in (checkpoint, tiny)]
        plans = [_planned(config) for config in configs]
        taken, base = measure(configs[0]), measure(configs[1], serve=False)
        for name, (loaded, total) in plans[0].items():
            library = base[name].loaded - plans[1][name][0]
            found = taken[name]
            yield Compared(
                f"{dtype} {quantization or ''} {name}".replace("  ", " "),
                loaded,
                total,
                Taken(found.loaded - library, found.loading - library, found.loaded - library + found.serving),
            )


def _planned(config: DeployConfig) -> dict[str, tuple[int, int]]:
    """By process, the bytes that are planned once everything is loaded, and in all."""
    checkpoint = Checkpoint(config.checkpoint, most_pixels=config.max_generated_image_size)
    need = memory_plan.plan(checkpoint, config, resolve("cpu", config.dtype), SIDE, SIDE)
    if config.topology.one_process:
        return {ALL: (need.weights + need.stages[0].kv, need.total)}  # the pool is filled with zeros
    return {str(stage.stage): (stage.weights, stage.total) for stage in need.stages}


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


def measure(config: DeployConfig, serve: bool = True) -> dict[str, Taken]:
    """What the processes of ``config`` take, by stage; or the one with all stages."""
    names = [ALL] if config.topology.one_process else list(BUILDERS)
    with SharedMemoryPrefix() as shared:
        config = msgspec.structs.replace(config, shm_prefix=shared.prefix)
        with _started(names, config) as pipes:
            for pipe, _ in pipes.values():
                _call(pipe, "load")
            loaded = {name: _sizes(name, pid) for name, (_, pid) in pipes.items()}
            if not serve:
                return {name: Taken(*sizes) for name, sizes in loaded.items()}
            locks = {name: threading.Lock() for name in names}

            def run(stage: str, tasks: Sequence[Task]) -> list[Any]:
                with locks[stage]:
                    return list(_call(pipes[stage][0], (stage, list(tasks))))

            def each(action: Callable[[DeployConfig, Run], None]) -> None:
                if ALL in pipes:
                    _call(pipes[ALL][0], (action, config))
                else:
                    action(config, run)

            each(warm_up)
            before = {}
            for name, (_, pid) in pipes.items():
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # from now on the most is of what follows
                before[name] = _sizes(name, pid)[0]
            each(exercise)
            return {name: Taken(*loaded[name], _sizes(name, pid)[1] - before[name]) for name, (_, pid) in pipes.items()}


@contextmanager
def _started(names: Sequence[str], config: DeployConfig) -> Iterator[dict[str, tuple[Connection, int]]]:
    """A process for each name, with its pipe and its id."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    try:
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, name, config), daemon=True)
            with patch.dict(os.environ, HEAP):
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


def _sizes(name: str, pid: int) -> tuple[int, int]:
    """Bytes that a process takes now, and the most so far.

    A stage's pages count whole: its plan is as if it shared no weights. But the pool that the DiT reads is the
    thinker's. All that a process of all stages shares are libraries.
    """
    memory = ProcessMemory.of(pid)
    shared = memory.resident - memory.pss if name == ALL else _pool_pages(pid) if name == "dit" else 0
    return memory.resident - shared, memory.peak - shared


def _pool_pages(pid: int) -> int:
    """Bytes of the KV cache pool that a process has mapped."""
    size, pool = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            pool = "_kv_" in line
        elif pool and name == "Rss:":
            size += int(values[0]) * 1024
    return size


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
            match pipe.recv():
                case str(stage), tasks:
                    pipe.send(_ran(engines[stage], tasks))
                case action, config:
                    action(config, lambda stage, tasks: _ran(engines[stage], tasks))
                    pipe.send("done")


def _modules(engines: Mapping[str, Any]) -> Iterator[torch.nn.Module]:
    for engine in engines.values():
        yield from (part for part in vars(engine).values() if isinstance(part, torch.nn.Module))


def _ran(engine: EngineLoop[Any, Any], tasks: Sequence[Task]) -> list[Any]:
    """The results of ``tasks``, all at the same time."""
    jobs = [engine.submit(task, request_id, lambda event: None, scheduling) for task, request_id, scheduling in tasks]
    return [job.done.result()[0] for job in jobs]


def warm_up(config: DeployConfig, run: Run) -> None:
    """Have libraries make their buffers, by small requests."""
    stages = _Stages(config, run)
    stages.decode(stages.denoise(stages.lent([_edit(0, SMALL)])))
    stages.prefill([_text(0, SMALL)])


def exercise(config: DeployConfig, run: Run) -> None:
    """Bring each stage to its peak alone, then all at the same time."""
    stages, batch = _Stages(config, run), config.thinker.max_num_batched_tokens
    seeds = itertools.count(1)  # a text that was there before would not be prefilled again

    def prefill() -> None:
        # One more than a step takes: the others wait for it, and are prefilled together.
        stages.prefill([_text(next(seeds)) for _ in range(batch // 512 + 1)])

    def lent() -> list[Task]:
        return stages.lent([_edit(seed) for seed in range(config.dit.max_num_seqs)])

    for _ in range(config.thinker.kv_tokens // batch):
        prefill()
    latents = stages.denoise(lent())
    stages.decode(latents)
    jobs = lent()
    with ThreadPoolExecutor(2) as pool:
        denoising = pool.submit(stages.denoise, jobs)

        def decode() -> None:
            while not denoising.done():
                stages.decode(latents)

        decoding = pool.submit(decode)
        while not denoising.done():
            prefill()
        denoising.result(), decoding.result()


class _Stages:
    """The stages of a server, each of which ``run`` runs."""

    def __init__(self, config: DeployConfig, run: Run) -> None:
        self._planner, self._run = RequestPlanner.open(config), run

    def prefill(self, requests: Sequence[GenerationRequest]) -> list[Any]:
        plans = [self._planner.expand(request) for request in requests]
        return self._run("thinker", [(plan, plan.request_id, plan.scheduling) for plan in plans])

    def lent(self, requests: Sequence[GenerationRequest]) -> list[Task]:
        return [(made.job, made.job.request_id, made.job.scheduling) for made in self.prefill(requests)]

    def denoise(self, jobs: Sequence[Task]) -> list[Task]:
        return [(latents, "decode", SchedulingParams()) for images in self._run("dit", jobs) for latents in images]

    def decode(self, latents: Sequence[Task]) -> None:
        self._run("vae_decode", latents)


def _letters(count: int, seed: int) -> str:
    """Letters at random, about 0.9 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(97, 123, (count,), generator=generator).tolist()).decode()


def _text(seed: int, letters: int = 600) -> GenerationRequest:
    return GenerationRequest(prompt=_letters(letters, seed), modality="text", max_tokens=2)


def _edit(seed: int, side: int = SIDE) -> GenerationRequest:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (seed, 100, 200)).save(file, "PNG")
    return GenerationRequest(
        prompt=_letters(280, seed),  # as long as the plan's
        image=(file.getvalue(),),
        height=side,
        width=side,
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
