"""Requests that share the server get exactly what each would get alone."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.cases import load_cases
from tests.support.exact import same_image
from tests.support.serving import Server, chat_body, reply_images

CASES = load_cases(Path(__file__).parents[1] / "data" / "cases-a")
SIXTEEN = [case for case in CASES if case.name not in ("edit_alpha_two_pictures", "edit_default")]  # of every kind
# Sizes, prompts, seeds, steps, guidance and renorms all differ; the first takes by far the longest.
EIGHT: list[dict[str, Any]] = [
    {"prompt": "A beautiful sunset over mountains", "height": 256, "width": 256, "num_inference_steps": 120},
    {"prompt": "A cute cat", "height": 64, "width": 64, "num_inference_steps": 4},
    {"prompt": "A cute cat", "height": 64, "width": 64, "num_inference_steps": 4, "negative_prompt": "blurry"},
    {"prompt": "A futuristic city", "height": 16, "width": 128, "num_inference_steps": 9, "cfg_text_scale": 1},
    {"prompt": "A futuristic city", "height": 96, "width": 48, "num_inference_steps": 12, "cfg_interval": [0, 1]},
    {"prompt": "x", "height": 80, "width": 80, "num_inference_steps": 7, "cfg_renorm_type": "channel"},
    {"prompt": "a blue dress", "height": 48, "width": 160, "num_inference_steps": 5, "cfg_renorm_type": "text_channel"},
    {"prompt": "<|im_start|>the lighthouse<|im_end|>", "height": 112, "width": 64, "num_inference_steps": 20},
]


def image_body(fields: dict[str, Any], seed: int) -> dict[str, Any]:
    fields = dict(fields)
    messages = [{"role": "user", "content": fields.pop("prompt")}]
    return {"messages": messages, "modalities": ["image"], "seed": seed, **fields}


def essence(reply: dict[str, Any]) -> list[Any]:
    """What a reply says, without images, ids and timings: texts, reasons, counts."""
    contents: list[Any] = []
    for choice in reply["choices"]:
        content = choice["message"]["content"]
        contents.append(content if isinstance(content, str) else None)
        contents.append((choice["message"].get("reasoning_content"), choice["finish_reason"]))
    return [contents, reply["usage"], reply["seed"]]


def assert_same_reply(one: dict[str, Any], other: dict[str, Any], what: object = None) -> None:
    """Both say the same and show the same."""
    assert essence(one) == essence(other), what
    if isinstance(one["choices"][0]["message"]["content"], list):
        for ours, theirs in zip(reply_images(one), reply_images(other), strict=True):
            assert same_image(ours, theirs), what


def test_eight_images_at_once_are_those_made_alone(server: Server) -> None:
    bodies = [image_body(fields, seed) for seed, fields in enumerate(EIGHT)]
    alone = [server.images(body)[0] for body in bodies]
    finished: list[int] = []

    def ask(index: int) -> np.ndarray:
        image = server.images(bodies[index])[0]
        finished.append(index)
        return image

    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(ask, range(len(bodies))))
    for index, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert same_image(one, other), f"request {index} differs from itself alone"
    assert finished[0] != 0, "short requests wait for the long one"
    assert finished != sorted(finished)


def test_a_mixed_load_twice_is_what_each_gets_alone(server: Server) -> None:
    bodies = [chat_body(case.request) for case in SIXTEEN]
    alone = [server.chat(body).json() for body in bodies]
    order = list(range(len(bodies)))
    for turn in range(2):
        random.Random(turn).shuffle(order)
        with ThreadPoolExecutor(len(bodies)) as pool:
            replies = list(pool.map(lambda index: server.chat(bodies[index]).json(), order))
        for index, reply in zip(order, replies, strict=True):
            assert_same_reply(reply, alone[index], f"{SIXTEEN[index].name} differs from itself alone")
    until_idle(server)


def test_n_images_are_those_of_their_seeds(server: Server) -> None:
    body = image_body(EIGHT[1], seed=40)
    singles = [server.images({**body, "seed": seed})[0] for seed in (40, 41, 42)]
    three = server.images({**body, "n": 3})
    assert len(three) == 3
    for one, other in zip(singles, three, strict=True):
        assert same_image(one, other)
    assert not np.array_equal(three[0], three[1])


def until_idle(server: Server) -> None:
    """Wait for the last lease to end."""
    deadline = time.monotonic() + 10
    while server.gauge("bagel_thinker_kv_leases") or server.gauge("bagel_thinker_kv_blocks_used"):
        assert time.monotonic() < deadline, "a lease is left"
        time.sleep(0.1)
