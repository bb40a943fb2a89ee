"""``decode_tokens_per_s``: greedy text for 1, 8 and 32 concurrent requests, with the prefill of their short prompts.

Beside one request, in the same trial, the ``generate`` of ``transformers`` decodes as many tokens
with a Qwen2 of the understanding expert's weights. Qwen2 has no norms of queries and keys, so its
text is another one; its work is a little less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.messages import ThinkerOutput
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.weights.checkpoint import Checkpoint
from bench.figure import Figure, median
from bench.setting import Setting, answer, plan_of

NAME = "decode_tokens_per_s"
COUNTS = (1, 8, 32)
TOKENS = 64
GOAL = 4.0  # of the most sequences over one
GENERATE_GOAL = 1.5  # of one sequence over transformers' generate
PROMPT_TOKENS = 12


def run(setting: Setting, counts: Sequence[int] = COUNTS, tokens: int = TOKENS) -> list[Figure]:
    """Tokens per second for each number of sequences, and the gain of the most over one."""
    generate = qwen2_of(Checkpoint(setting.checkpoint)) if setting.device == "cpu" else None
    with setting.stages() as stages:
        return measure(stages, counts, tokens, setting.trials, generate)


def measure(
    stages: LocalStages,
    counts: Sequence[int],
    tokens: int,
    trials: int,
    generate: Callable[[int], None] | None = None,
) -> list[Figure]:
    """The figures of ``stages``, and of ``generate`` where there is one."""
    rates: dict[int, list[float]] = {count: [] for count in counts}
    generated: list[float] = []
    prompts = _long_prompts(stages, max(counts), tokens)
    for trial in range(1 + trials):
        if generate is not None:
            started = time.perf_counter()
            generate(tokens)
            if trial:
                generated.append(tokens / (time.perf_counter() - started))
        for count in counts:
            started = time.perf_counter()
            outputs = _together(stages, prompts[:count], tokens)
            seconds = time.perf_counter() - started
            if trial:  # the first warms up
                rates[count].append(sum(one.answers[0].tokens for one in outputs) / seconds)
    gains = [most / one for most, one in zip(rates[counts[-1]], rates[counts[0]], strict=True)]
    figures = [median(NAME, f"{count} sequences", found, "tokens/s") for count, found in rates.items()]
    figures.append(median(NAME, f"{counts[-1]} over {counts[0]}", gains, "x", GOAL, "higher"))
    if generated:
        over = [ours / theirs for ours, theirs in zip(rates[counts[0]], generated, strict=True)]
        figures.append(median(NAME, "transformers' generate", generated, "tokens/s"))
        figures.append(median(NAME, f"{counts[0]} over generate", over, "x", GENERATE_GOAL, "higher"))
    return figures


def qwen2_of(checkpoint: Checkpoint) -> Callable[[int], None]:
    """A function that decodes so many tokens with ``generate``, in float32 with torch's usual threads."""
    language = checkpoint.config.language
    config = Qwen2Config(
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        num_key_value_heads=language.num_kv_heads,
        vocab_size=language.vocab_size,
        rms_norm_eps=language.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        tie_word_embeddings=False,
    )
    ours: Any = checkpoint.load_bagel(torch.device("cpu"), torch.float32).language_model
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config)
    weights = {"model.embed_tokens.weight": ours.model.embed_tokens.weight, "lm_head.weight": ours.lm_head.weight}
    weights["model.norm.weight"] = ours.model.norm.weight
    for number, layer in enumerate(ours.model.layers):
        expert, prefix = layer.und, f"model.layers.{number}"
        sizes = [heads * language.head_dim for heads in (language.num_heads, *[language.num_kv_heads] * 2)]
        for name, weight, bias in zip(
            "qkv", expert.qkv_proj.weight.split(sizes), expert.qkv_proj.bias.split(sizes), strict=True
        ):
            weights |= {f"{prefix}.self_attn.{name}_proj.weight": weight, f"{prefix}.self_attn.{name}_proj.bias": bias}
        gate, up = expert.mlp.gate_up_proj.weight.chunk(2)
        weights |= {
            f"{prefix}.self_attn.o_proj.weight": expert.o_proj.weight,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": expert.mlp.down_proj.weight,
            f"{prefix}.input_layernorm.weight": expert.input_layernorm.weight,
            f"{prefix}.post_attention_layernorm.weight": expert.post_attention_layernorm.weight,
        }
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no checkpoint
    model.eval()
    prompt = torch.arange(1, 1 + PROMPT_TOKENS)[None]

    def generate(tokens: int) -> None:
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return generate


def _long_prompts(stages: LocalStages, count: int, tokens: int) -> list[str]:
    """Prompts whose answers have ``tokens`` tokens or more, so that no text leaves the batch early."""
    found: list[str] = []
    for start in range(0, 8 * count, count):
        prompts = [f"Count the cats of image {start + number}." for number in range(count)]
        for prompt, one in zip(prompts, _together(stages, prompts, tokens), strict=True):
            if one.answers[0].finish_reason == "length":
                found.append(prompt)
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"this checkpoint ends its texts early: only {len(found)} of {8 * count} prompts are of use")


def _together(stages: LocalStages, prompts: Sequence[str], tokens: int) -> list[ThinkerOutput]:
    plans = [
        plan_of(stages, GenerationRequest(prompt=prompt, modality="text", max_tokens=tokens)) for prompt in prompts
    ]
    calls = [stages.think(plan) for plan in plans]
    return [answer(call)[0] for call in calls]
