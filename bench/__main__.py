"""``python -m bench``: every measurement in one run, as a table and as JSON."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

import bagel_triton
from bagel_triton.model.device import resolve
from bench import (
    decode_tokens_per_s,
    dit_batch4_speedup,
    dit_step_over_floor,
    gpu,
    parallel,
    perf_analyzer,
    prefix_reuse_speedup,
    proxy_stall,
    serve_overhead,
    shared_memory,
    stage_hop,
)
from bench.figure import Figure, table
from bench.setting import CHECKPOINT, Setting, ensure_checkpoint

BENCHES: dict[str, Callable[[Setting], list[Figure]]] = {
    "dit_step_over_floor": dit_step_over_floor.run,
    "dit_batch4_speedup": dit_batch4_speedup.run,
    "decode_tokens_per_s": decode_tokens_per_s.run,
    "prefix_reuse_speedup": prefix_reuse_speedup.run,
    "serve_overhead": serve_overhead.run,
    "proxy_stall": proxy_stall.run,
    "perf_analyzer": perf_analyzer.run,
    "stage_hop": stage_hop.run,
    "parallel": parallel.run,
    "kv_handoff": shared_memory.run_kv_handoff,
    "weight_sharing": shared_memory.run_weight_sharing,
}
ON_A_GPU: dict[str, Callable[[Setting], list[Figure]]] = {"published_on_gpu": gpu.run}


class Machine(msgspec.Struct, frozen=True):
    """The machine of the figures."""

    processor: str
    cores: int
    threads: int
    device: str
    torch: str
    load_before: float
    load_after: float


class Results(msgspec.Struct, frozen=True):
    """The JSON file: one run."""

    version: str
    checkpoint: str
    trials: int
    seconds: float
    machine: Machine
    figures: list[Figure]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON; the exit status is 1 where a bench failed, whatever the figures."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench", description=summary)
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help=f"default: a random one, made as {CHECKPOINT}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*BENCHES, *ON_A_GPU], help="some of the benches")
    parser.add_argument("--trials", type=int, default=5, metavar="N", help="of each measurement (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results.json"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    checkpoint = ensure_checkpoint() if args.checkpoint is None else args.checkpoint
    setting = Setting(checkpoint, resolve(args.device, "auto").device, args.trials)
    on_gpu = setting.device.startswith("cuda")
    wanted = args.only or [*BENCHES, *(ON_A_GPU if on_gpu else ())]
    load_before, started = os.getloadavg()[0], time.monotonic()
    figures: list[Figure] = []
    failed = False
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            figures += (BENCHES | ON_A_GPU)[name](setting)
        except Exception:  # the other benches' figures are still worth having
            traceback.print_exc()
            failed = True
    seconds = time.monotonic() - started
    machine = _machine(setting.device, load_before)
    results = Results(bagel_triton.__version__, str(checkpoint), args.trials, seconds, machine, figures)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    print(table(figures))
    print(f"{seconds:.0f} s; written to {args.out}")
    return int(failed)


def _machine(device: str, load_before: float) -> Machine:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return Machine(
        processor=processor or platform.processor(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        device=name,
        torch=str(torch.__version__),
        load_before=load_before,
        load_after=os.getloadavg()[0],
    )


if __name__ == "__main__":
    sys.exit(main())
