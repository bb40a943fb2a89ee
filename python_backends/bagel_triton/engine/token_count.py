"""How many tokens the parts of a context take."""

from __future__ import annotations

from bagel_triton.model.config import ModelConfig
from bagel_triton.protocol.messages import Segment, TextSegment, VaeSegment

VISION_TOKENS = 2  # <|vision_start|> and <|vision_end|> around an image's tokens


def segment_tokens(segment: Segment, config: ModelConfig) -> int:
    """Tokens that ``segment`` adds to a context."""
    if isinstance(segment, TextSegment):
        return len(segment.token_ids)
    stride = config.latent.stride if isinstance(segment, VaeSegment) else config.vit.patch_size
    return (segment.height // stride) * (segment.width // stride) + VISION_TOKENS
