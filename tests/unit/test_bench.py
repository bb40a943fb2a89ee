"""The benches count right, judge right, and run; what they find is for a quiet machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.model.config import VISION_TOKENS, LanguageConfig, LatentConfig, ModelConfig, VitConfig
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.weights.checkpoint import Checkpoint
from bench import __main__ as bench
from bench import (
    decode_tokens_per_s,
    dit_batch4_speedup,
    dit_step_over_floor,
    gpu,
    parallel,
    prefix_reuse_speedup,
    stage_hop,
)
from bench.arithmetic import matmul_rate, products, step_flops
from bench.figure import Figure, median, repeated, table
from bench.setting import Setting, denoise_job, image_request

SMALL = ModelConfig(
    LanguageConfig(64, 96, 2, 4, 2, 16, 600, 1e6, 1e-6),
    LatentConfig(2, 16, 8, 64),
    VitConfig(32, 64, 2, 2, 14, 1e-6, 70),
)


@pytest.fixture
def setting(checkpoint_dir: Path) -> Setting:
    return Setting(checkpoint_dir, trials=1)


def test_a_steps_arithmetic_is_what_torch_counts(
    local_stages: LocalStages, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    # Torch counts what one thread does, no product that is added in place, and none of oneDNN's.
    # Its own attention it does not know, and no other is to be among the products.
    monkeypatch.setattr("bagel_triton.model.cpu.attention.MIN_ROWS", 1 << 30)
    monkeypatch.setattr(ThreadPool, "parallel_for", lambda pool, task, items: [task(item) for item in items])
    job = denoise_job(local_stages, image_request(128, 128, 2))
    counted: list[int] = []
    real = local_stages.dit._step

    def added(into: torch.Size, x: torch.Size, weight: torch.Size, **_: object) -> int:
        return 2 * x[0] * x[1] * weight[1]

    def onednn(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
        return 2 * x[0] * x[1] * weight[0]

    others = {torch.ops.aten.addmm_: added, torch.ops.mkldnn._linear_pointwise: onednn}

    def step() -> None:
        with FlopCounterMode(display=False, custom_mapping=others) as counter:
            real()
        counted.append(counter.get_total_flops())

    local_stages.dit._step = step  # type: ignore[method-assign]
    local_stages.dit.submit(job, job.request_id, lambda event: None).done.result(60)
    config = Checkpoint(checkpoint_dir).config
    branches = [(64 + VISION_TOKENS, handle.tokens) for handle in job.handles]
    assert len(branches) == 2  # the third is the first
    language = config.language
    attention = (
        4
        * language.num_layers
        * language.num_heads
        * language.head_dim
        * sum(new * (new + past) for new, past in branches)
    )
    # Padding is counted: markers are few rows, computed as more.
    products = step_flops(config, branches) - attention
    assert products < counted[0] < 1.15 * products


def test_a_rate_is_of_the_shapes_given():
    assert products(SMALL.language) == [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    assert matmul_rate([(64, 64)], 16, torch.device("cpu"), torch.float32) > 0


@pytest.mark.parametrize(
    ("value", "goal", "better", "met"),
    [(1.3, 1.3, "lower", True), (1.31, 1.3, "lower", False), (2, 2, "higher", True), (1, 2, "higher", False)],
)
def test_a_goal_is_met_or_missed(value: float, goal: float, better: str, met: bool):
    figure = Figure("a", "b", value, "x", goal, better)  # type: ignore[arg-type]
    assert figure.met is met
    assert ("MISSED" in table([figure])) is not met


def test_without_a_goal_there_is_nothing_to_miss():
    assert Figure("a", "b", 1.0, "s").met is None
    assert "MISSED" not in table([Figure("a", "b", 1.0, "s")])


def test_the_median_keeps_its_trials():
    assert median("a", "b", [3.0, 1.0, 2.0], "s") == Figure("a", "b", 2.0, "s", trials=(3.0, 1.0, 2.0))
    calls = iter([9.0, 1.0, 2.0])
    assert repeated(2, lambda: next(calls)) == [1.0, 2.0]


def test_the_denoising_benches_run(setting: Setting):
    names = [figure.name for figure in dit_step_over_floor.run(setting, side=64)]
    assert names[0] == "step at 64x64"
    figures = dit_batch4_speedup.run(setting, mixed=((32, 32), (64, 48)))
    assert all(figure.value > 0 for figure in figures)
    assert [figure.goal for figure in figures] == [1.0, 2.0]


@pytest.mark.long
def test_the_bench_of_ranks_counts_what_the_formula_says(setting: Setting):
    figures = {figure.name: figure for figure in parallel.run(setting, side=256)}
    modes = [*parallel.MODES, parallel.PATCH]
    assert len(figures) == 3 * len(modes)
    for mode in modes:  # other programs use the interface too, so it may be more
        assert figures[f"{mode}: bytes over the formula"].value > 0.99


def test_the_thinkers_benches_run(setting: Setting):
    one, two, gain, generate, over = decode_tokens_per_s.run(setting, counts=(1, 2), tokens=3)
    assert gain.trials == (two.trials[0] / one.trials[0],)
    assert over.trials == (one.trials[0] / generate.trials[0],)
    first, second, ratio = prefix_reuse_speedup.run(setting, side=64)
    assert ratio.trials == (first.trials[0] / second.trials[0],)


def test_random_networks_of_any_shape_make_images(checkpoint_dir: Path):
    models = gpu.random_models(SMALL, (32, 32, 64, 64), torch.device("cpu"), torch.float32)
    stages = LocalStages(DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32"), models=models)
    try:
        figures = {figure.name: figure for figure in gpu.measure(stages, models, ((64, 3),), 1, peak_shape=64)}
    finally:
        stages.close()
    assert figures["image of 64x64, 3 steps"].value > 0
    assert figures["tokens/s of 1 sequence over the memory's bound"].value > 0


def test_hops_are_timed_by_every_way_to_call_a_stage(setting: Setting):
    figures = stage_hop.run(setting, loads=[(2, 100)], seconds=0.2)
    assert [figure.name.partition(",")[0] for figure in figures[::3]] == list(stage_hop.WAYS)
    assert all(figure.value > 0 for figure in figures)


def test_the_program_writes_what_it_prints(
    checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def failing(setting: Setting) -> list[Figure]:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(bench.BENCHES, "perf_analyzer", failing)
    monkeypatch.setitem(bench.BENCHES, "kv_handoff", lambda setting: [Figure("kv_handoff", "it", 1.5, "ms")])
    out = tmp_path / "new" / "results.json"
    arguments = ["--checkpoint", str(checkpoint_dir), "--out", str(out), "--only", "perf_analyzer", "kv_handoff"]
    assert bench.main(arguments) == 1
    shown = capsys.readouterr()
    assert "no such luck" in shown.err
    assert "kv_handoff  it      " in shown.out
    results = json.loads(out.read_text())
    assert [figure["value"] for figure in results["figures"]] == [1.5]
    assert results["machine"]["cores"] >= 1
