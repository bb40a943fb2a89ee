"""Previews and log-probabilities through the server, where they pass between processes."""

from __future__ import annotations

import numpy as np

from bagel_triton.protocol.request import GenerationRequest
from tests.support.serving import Server, Streamed, generate


def _images(answer: Streamed) -> list[tuple[dict[str, object], np.ndarray]]:
    """Every event that came with pixels."""
    return [
        (event, arrays["generated_image"])
        for event, arrays in zip(answer.events, answer.arrays, strict=False)
        if "generated_image" in arrays
    ]


def test_previews_come_before_an_image_that_they_do_not_change(server: Server) -> None:
    fields = {"height": 128, "width": 128, "num_inference_steps": 200, "seed": 9}
    (_, plain), *_ = _images(generate(server.grpc, "bagel", GenerationRequest("A cat", **fields)))  # type: ignore[arg-type]
    request = GenerationRequest("A cat", partial_images=2, **fields)  # type: ignore[arg-type]
    *previews, (event, image) = _images(generate(server.grpc, "bagel", request))
    # A preview that is not decoded before the image is left out, which the last one may be.
    assert [(preview["type"], preview["partial_index"]) for preview, _ in previews] in (
        [("partial_image", 0)],
        [("partial_image", 0), ("partial_image", 1)],
    )
    assert all(pixels.shape == (128, 128, 3) for _, pixels in previews)
    assert event["type"] == "image"
    assert (image == plain).all()
    assert any((pixels != image).any() for _, pixels in previews)


def test_log_probabilities_come_with_text_and_answer(server: Server) -> None:
    request = GenerationRequest("Where is it?", modality="text", max_tokens=6, top_logprobs=2, logit_bias={5: -100.0})
    answer = generate(server.grpc, "bagel", request)
    streamed = [entry for event in answer.events if event["type"] == "text" for entry in event.get("logprobs", ())]
    (whole,) = [event for event in answer.events if event["type"] == "answer"]
    assert streamed == whole["logprobs"]
    assert len(whole["logprobs"]) == 6
    assert all(len(entry["top"]) == 2 for entry in whole["logprobs"])
    assert b"".join(bytes(entry["bytes"]) for entry in whole["logprobs"]).decode(errors="replace") == whole["content"]
