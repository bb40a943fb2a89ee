"""The flow's arithmetic against its formulas, written out with numpy."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from bagel_triton.model.flow import combine, denoise, get_timesteps, guidance_branches, initial_noise
from bagel_triton.protocol.messages import Branch, FlowSettings

SETTINGS = FlowSettings(
    height=64,
    width=64,
    num_inference_steps=5,
    seed=0,
    timestep_shift=3.0,
    cfg_text_scale=4.0,
    cfg_img_scale=1.5,
    cfg_interval=(0.4, 1.0),
    cfg_renorm_type="global",
    cfg_renorm_min=0.0,
)
GEN, TEXT, IMAGE = Branch.GEN, Branch.CFG_TEXT, Branch.CFG_IMG


def _with(**changes: object) -> FlowSettings:
    return msgspec.structs.replace(SETTINGS, **changes)


def _velocities(*branches: Branch) -> dict[Branch, Tensor]:
    return {
        branch: torch.randn(12, 8, generator=torch.Generator().manual_seed(number))
        for number, branch in enumerate(branches)
    }


@pytest.mark.parametrize("steps", [2, 3, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 10.0])
def test_times_run_from_one_to_zero_with_the_shift(steps: int, shift: float) -> None:
    t = np.linspace(1, 0, steps)
    times = get_timesteps(steps, shift)
    np.testing.assert_allclose(times.numpy(), shift * t / (1 + (shift - 1) * t), rtol=1e-6, atol=1e-7)
    assert times.dtype == torch.float32
    assert (times[0], times[-1]) == (1, 0)
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize(
    ("t", "acts"), [(1.0, True), (0.7, True), (0.401, True), (0.4, False), (0.399, False), (0.0, False)]
)
def test_guidance_acts_above_the_lower_edge_up_to_the_upper(t: float, acts: bool) -> None:
    expected = (GEN, TEXT, IMAGE) if acts else (GEN,)
    assert guidance_branches(torch.tensor(t, dtype=torch.float64), _with(cfg_interval=(0.4, 1.0))) == expected


@pytest.mark.parametrize(("t", "acts"), [(0.8, False), (0.75, True), (0.5, True), (0.25, False)])
def test_guidance_acts_at_the_upper_edge_itself(t: float, acts: bool) -> None:
    branches = guidance_branches(torch.tensor(t), _with(cfg_interval=(0.25, 0.75)))
    assert (TEXT in branches) == acts


@pytest.mark.parametrize(
    ("text_scale", "image_scale", "expected"),
    [
        (4.0, 1.5, (GEN, TEXT, IMAGE)),
        (1.001, 1.001, (GEN, TEXT, IMAGE)),
        (4.0, 1.0, (GEN, TEXT)),
        (4.0, 0.0, (GEN, TEXT)),
        (1.0, 1.5, (GEN,)),
        (0.0, 2.0, (GEN,)),
        (1.0, 1.0, (GEN,)),
    ],
)
def test_a_scale_of_one_or_less_switches_guidance_off(
    text_scale: float, image_scale: float, expected: tuple[Branch, ...]
) -> None:
    settings = _with(cfg_text_scale=text_scale, cfg_img_scale=image_scale)
    assert guidance_branches(torch.tensor(0.9), settings) == expected


def _formula(v: dict[Branch, Tensor], settings: FlowSettings) -> np.ndarray:
    """The guided velocity, number by number, in float64."""
    gen, text, image = (v[branch].double().numpy() if branch in v else None for branch in (GEN, TEXT, IMAGE))
    kind, floor = settings.cfg_renorm_type, settings.cfg_renorm_min

    def per_token(w: np.ndarray) -> np.ndarray:
        out = w.copy()
        for token in range(len(w)):
            ratio = np.sqrt((gen[token] ** 2).sum()) / (np.sqrt((w[token] ** 2).sum()) + 1e-8)
            out[token] *= min(max(ratio, floor), 1.0)
        return out

    w = text + settings.cfg_text_scale * (gen - text)
    if kind == "text_channel":
        w = per_token(w)
    if image is not None:
        w = image + settings.cfg_img_scale * (w - image)
    if kind == "channel":
        w = per_token(w)
    if kind == "global":
        w = w * min(max(np.sqrt((gen**2).sum()) / (np.sqrt((w**2).sum()) + 1e-8), floor), 1.0)
    return w


@pytest.mark.parametrize("kind", ["global", "channel", "text_channel"])
@pytest.mark.parametrize("floor", [0.0, 0.45, 1.0])
@pytest.mark.parametrize("branches", [(GEN, TEXT, IMAGE), (GEN, TEXT)], ids=["image", "no-image"])
def test_guidance_is_its_formula(kind: str, floor: float, branches: tuple[Branch, ...]) -> None:
    velocities = _velocities(*branches)
    settings = _with(cfg_renorm_type=kind, cfg_renorm_min=floor, cfg_text_scale=2.5, cfg_img_scale=1.7)
    guided = combine(velocities, settings)
    np.testing.assert_allclose(guided.numpy(), _formula(velocities, settings), rtol=2e-5, atol=1e-6)


def test_renorm_never_scales_up() -> None:
    velocities = _velocities(GEN, TEXT)
    velocities[TEXT] = velocities[GEN] * 1.5  # guidance at 1.5 leaves a quarter of the velocity
    guided = combine(velocities, _with(cfg_text_scale=1.5, cfg_renorm_type="global"))
    torch.testing.assert_close(guided, velocities[GEN] * 0.75)


def test_without_guidance_the_velocity_is_the_prompts_alone() -> None:
    velocities = _velocities(GEN)
    assert torch.equal(combine(velocities, SETTINGS), velocities[GEN])


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
def test_noise_is_torchs_cpu_draw_of_the_seed(seed: int) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    assert torch.equal(initial_noise(seed, 24, 64), torch.randn(24, 64, generator=generator))


def test_n_points_are_n_minus_one_updates_along_the_velocity() -> None:
    seen: list[tuple[float, Branch]] = []

    def velocity(x: Tensor, t: Tensor, branch: Branch) -> Tensor:
        seen.append((float(t), branch))
        return torch.full_like(x, 2.0)

    settings = _with(num_inference_steps=6, cfg_text_scale=1.0)
    x = denoise(torch.zeros(4, 8), velocity, settings)
    assert seen == [(float(t), GEN) for t in get_timesteps(6, 3.0)[:-1]]
    torch.testing.assert_close(x, torch.full((4, 8), -2.0))  # over a time of one, whatever the steps


def test_branches_are_evaluated_only_where_guidance_acts() -> None:
    seen: list[tuple[float, Branch]] = []

    def velocity(x: Tensor, t: Tensor, branch: Branch) -> Tensor:
        seen.append((float(t), branch))
        return x * 0.1

    settings = _with(num_inference_steps=5, timestep_shift=1.0, cfg_interval=(0.4, 0.8))
    denoise(torch.ones(4, 8), velocity, settings)
    guided = [(t, branch) for t in (0.75, 0.5) for branch in (GEN, TEXT, IMAGE)]
    assert seen == [(1.0, GEN), *guided, (0.25, GEN)]
