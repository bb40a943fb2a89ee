"""The planning stage: a request becomes the segments of each branch."""

from __future__ import annotations

import secrets

from bagel_triton.messages import Branch, BranchPlan, Plan, Usage
from bagel_triton.model.config import ModelConfig
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.request import TEXT2IMG_DEFAULTS, GenerationRequest, resolve_flow


class Expander:
    """Validates requests against one checkpoint and plans their branches. Thread-safe."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer

    def expand(self, request: GenerationRequest, client_id: str = "") -> Plan:
        """The plan of a text2img request.

        ``client_id`` is the caller's name for it; the plan's is unique whatever it is.

        Raises:
            InvalidRequest: names the field, its value and what is allowed.
        """
        flow = resolve_flow(request, self._config.latent.max_side, TEXT2IMG_DEFAULTS)
        prompt = self._tokenizer.segment(request.prompt, "prompt")
        # Without a picture, the context without pictures is the full one.
        branches = [BranchPlan(Branch.GEN, (prompt,)), BranchPlan(Branch.CFG_IMG, same_as=Branch.GEN)]
        prompt_tokens = len(prompt.token_ids)
        if request.negative_prompt:
            negative = self._tokenizer.segment(request.negative_prompt, "negative_prompt")
            branches.append(BranchPlan(Branch.CFG_TEXT, (negative,)))
            prompt_tokens += len(negative.token_ids)
        else:
            branches.append(BranchPlan(Branch.CFG_TEXT))
        stride = self._config.latent.stride
        latents = (flow.height // stride) * (flow.width // stride)
        return Plan(
            request_id=f"{client_id or 'request'}-{secrets.token_hex(6)}",
            branches=tuple(branches),
            flow=flow,
            usage=Usage(prompt_tokens=prompt_tokens, image_tokens=latents),
        )
