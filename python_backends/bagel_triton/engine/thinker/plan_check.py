"""What of a plan this checkpoint cannot work on: found before it shares a step with others."""

from __future__ import annotations

from collections.abc import Sequence

from bagel_triton.model.config import ModelConfig
from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.messages import Plan, Segment, TextSegment, VaeSegment, VitSegment


def check_plan(plan: Plan, config: ModelConfig) -> None:
    """Refuse tokens and images that the model does not have a place for.

    Raises:
        InvalidRequest: names what it is and what is allowed.
    """
    if plan.decoding is not None:
        _check_token(plan.decoding.first_token, config)
    expected = _sizes(plan.branches[0].segments)
    if expected and plan.flow is None:
        raise InvalidRequest.value("plan", "an image for generation", "one only where flow says what to generate")
    for branch in plan.branches:
        for segment in branch.segments:
            if isinstance(segment, TextSegment):
                _check_token(max(segment.token_ids), config)
            else:
                _check_image(segment, config)
        sizes = _sizes(branch.segments)
        if sizes != expected[: len(sizes)]:  # a draw belongs to an image by its number
            raise InvalidRequest.value("plan", f"images of {sizes} in {branch.branch}", f"those of gen, {expected}")


def _sizes(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    return [(segment.height, segment.width) for segment in segments if isinstance(segment, VaeSegment)]


def _check_token(token_id: int, config: ModelConfig) -> None:
    size = config.language.vocab_size
    if token_id >= size:
        raise InvalidRequest.value("plan", token_id, f"token ids below {size}")


def _check_image(segment: VitSegment | VaeSegment, config: ModelConfig) -> None:
    generated = isinstance(segment, VaeSegment)
    patch = config.latent.stride if generated else config.vit.patch_size
    longest = config.latent.max_side if generated else config.vit.max_side
    for side in (segment.height, segment.width):
        if side % patch or side > longest:
            what = f"{type(segment).__name__} of {segment.height}x{segment.width}"
            raise InvalidRequest.value("plan", what, f"sides that are multiples of {patch} up to {longest}")
