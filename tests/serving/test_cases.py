"""The recorded cases through a real Triton: the stages one by one, both chains, and the proxy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bagel_triton.protocol.messages import Plan, ThinkerOutput, decode
from bagel_triton.protocol.request import REQUEST_FIELDS
from bagel_triton.protocol.tensors import to_tensors
from tests.support.cases import Case, load_cases
from tests.support.serving import Server, chat_body, generate, infer, reply_images

CASES = load_cases(Path(__file__).parents[1] / "data" / "cases-a")
PLAIN = [case for case in CASES if case.plain]
IMAGES = [case for case in CASES if case.height]
TEXTS = [case for case in CASES if not case.height]
TOLERANCE = 2e-5


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def assert_recorded(pixels: np.ndarray, case: Case) -> None:
    expected = case.image().numpy()
    assert pixels.shape == expected.shape
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= 2
    assert (difference == 0).mean() >= 0.99


@named(PLAIN)
def test_stage_by_stage(server: Server, case: Case) -> None:
    types = {name: spec.datatype for name, spec in REQUEST_FIELDS.items()}
    planned = infer(server.grpc, "cfg_expand", to_tensors(case.request), types).last("plan")
    plan = decode(planned[0], Plan)
    assert plan.branches[0].segments[0].token_ids == case.prompt_ids
    output = infer(server.grpc, "thinker", {"plan": planned}, {"plan": "BYTES"})
    job = decode(output.last("thinker_output")[0], ThinkerOutput).job
    assert job is not None
    assert len(output.last("denoise_job")[0]) < 2048, "a denoise job has KV handles, never KV"
    flow = infer(server.grpc, "dit", {"denoise_job": output.last("denoise_job")}, {"denoise_job": "BYTES"})
    expected = case.tensors()["latent"]
    ours = torch.from_numpy(flow.last("latents").copy())
    assert float((ours - expected).abs().max() / expected.abs().max()) < TOLERANCE
    latents = {"latents": flow.last("latents"), "latent_grid": flow.last("latent_grid")}
    pixels = infer(server.grpc, "vae_decode", latents, {"latents": "FP32", "latent_grid": "INT32"})
    assert_recorded(pixels.last("generated_image"), case)


@named(PLAIN)
def test_ensemble(server: Server, case: Case) -> None:
    answer = generate(server.grpc, "bagel_text2img", case.request)
    assert_recorded(answer.last("generated_image"), case)
    assert answer.last("used_seed").tolist() == [case.request.seed]


@named(IMAGES)
def test_bagel_images(server: Server, case: Case) -> None:
    answer = generate(server.grpc, "bagel", case.request)
    assert_recorded(answer.last("generated_image"), case)
    steps = [event["step"] for event in answer.events if event["type"] == "progress"]
    assert steps == list(range(1, case.request.num_inference_steps or 0))
    reasoning = [event["reasoning"] for event in answer.events if event["type"] == "answer"]
    assert reasoning == ([] if case.text is None else [case.text])
    assert answer.events[-1]["type"] == "done"


@named(TEXTS)
def test_bagel_texts(server: Server, case: Case) -> None:
    answer = generate(server.grpc, "bagel", case.request)
    assert [event["content"] for event in answer.events if event["type"] == "answer"] == [case.text]
    assert "".join(event["text"] for event in answer.events if event["type"] == "text") == case.text


@named(IMAGES)
def test_proxy_images(server: Server, case: Case) -> None:
    reply = server.chat(chat_body(case.request)).json()
    (pixels,) = reply_images(reply)
    assert_recorded(pixels, case)
    assert reply["seed"] == case.request.seed
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["message"].get("reasoning_content") == case.text
    if case.plain:
        assert reply["usage"]["prompt_tokens"] == len(case.prompt_ids)
    assert reply["usage"]["completion_tokens_details"]["image_tokens"] == case.height * case.width // 256


@named(TEXTS)
def test_proxy_texts(server: Server, case: Case) -> None:
    reply = server.chat(chat_body(case.request)).json()
    assert reply["choices"][0]["message"]["content"] == case.text
    limit = case.request.max_tokens
    ended_early = reply["usage"]["completion_tokens"] < (limit or 0)
    assert reply["choices"][0]["finish_reason"] == ("stop" if ended_early else "length")
