"""The distance of another device's or dtype's numbers from the recorded ones."""

from __future__ import annotations

from torch import Tensor


def relative_rms(ours: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference over that of ``expected``."""
    assert ours.shape == expected.shape
    difference = ours.cpu().double() - expected.cpu().double()
    return float(difference.norm() / expected.cpu().double().norm())


def mean_levels(ours: Tensor, expected: Tensor) -> float:
    """The mean difference of two images, uint8 of one shape, in levels of 255."""
    assert ours.shape == expected.shape
    return float((ours.int() - expected.int()).abs().float().mean())
