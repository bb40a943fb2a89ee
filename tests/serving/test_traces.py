"""Every request is a trace: a span a stage under its own, under the client's."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.serving.test_together import EIGHT, image_body
from tests.support.collector import Collector, Span, collecting
from tests.support.killing import until
from tests.support.serving import ANSWER_S, Server

STAGES = ["cfg_expand", "thinker", "dit", "vae_decode"]
IMAGE = image_body(EIGHT[1], seed=1)
LONG = image_body({**EIGHT[0], "num_inference_steps": 1000}, seed=1)
TEXT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "modalities": ["text"],
    "max_tokens": 4,
    "n": 2,
    "temperature": 1.0,
}


@pytest.fixture(scope="module")
def traced(observed: Server) -> Server:
    """A server that sends its spans to ``collector`` at once."""
    return observed


def _ids() -> tuple[str, str]:
    return secrets.token_hex(16), secrets.token_hex(8)


def _traceparent(trace: str, parent: str, flags: str = "01") -> str:
    return f"00-{trace}-{parent}-{flags}"


def _whole(collector: Collector, trace: str) -> tuple[Span, list[Span]]:
    """The request's span in ``trace`` and those of its stages, once all have come."""
    collector.until(lambda come: any(span.name == "bagel" for span in come.of(trace)))
    spans = collector.of(trace)
    [request] = [span for span in spans if span.name == "bagel"]
    return request, [span for span in spans if span is not request]


def test_an_image_is_a_span_a_stage_under_the_clients(traced: Server, collector: Collector) -> None:
    trace, parent = _ids()
    reply = traced.chat(IMAGE, {"traceparent": _traceparent(trace, parent)})
    assert reply.status_code == 200
    request, stages = _whole(collector, trace)
    assert request.parent == parent
    assert request.service == "bagel-triton"
    assert not request.failed
    attributes = request.attributes
    assert attributes["bagel.request_id"] == reply.json()["id"]
    assert (attributes["bagel.modality"], attributes["bagel.status"]) == ("image", 200)
    assert (attributes["bagel.height"], attributes["bagel.width"], attributes["bagel.num_inference_steps"]) == (
        64,
        64,
        4,
    )
    assert attributes["bagel.prompt_tokens"] == reply.json()["usage"]["prompt_tokens"]
    assert [span.name for span in stages] == STAGES
    assert {span.parent for span in stages} == {request.id}
    timings = reply.json()["metrics"]["stages"]
    for before, after in zip([None, *stages], stages, strict=False):
        assert request.start <= after.start <= after.end <= request.end
        assert before is None or before.end <= after.start
        assert after.attributes["bagel.run_s"] == timings[after.name]["run_s"]
    assert stages[2].attributes["bagel.num_inference_steps"] == 4


def test_a_text_has_its_tokens_and_no_span_of_an_image(traced: Server, collector: Collector) -> None:
    trace, parent = _ids()
    reply = traced.chat(TEXT, {"traceparent": _traceparent(trace, parent)}).json()
    request, stages = _whole(collector, trace)
    assert [span.name for span in stages] == STAGES[:2]
    assert request.attributes["bagel.modality"] == "text"
    assert request.attributes["bagel.text_tokens"] == reply["usage"]["completion_tokens"]
    assert stages[1].attributes["bagel.text_tokens"] == reply["usage"]["completion_tokens"]


def test_each_of_several_images_is_decoded_in_a_span(traced: Server, collector: Collector) -> None:
    trace, parent = _ids()
    traced.chat({**IMAGE, "n": 3}, {"traceparent": _traceparent(trace, parent)})
    request, stages = _whole(collector, trace)
    assert request.attributes["bagel.images"] == 3
    assert [span.name for span in stages] == [*STAGES[:3], "vae_decode", "vae_decode", "vae_decode"]


def test_a_refused_request_says_why_and_is_no_error_of_the_servers(traced: Server, collector: Collector) -> None:
    trace, parent = _ids()
    assert traced.chat({**IMAGE, "height": 63}, {"traceparent": _traceparent(trace, parent)}).status_code == 400
    request, [stage] = _whole(collector, trace)
    assert stage.name == "cfg_expand"
    assert request.attributes["error.type"] == stage.attributes["error.type"] == "InvalidRequest"
    assert request.attributes["bagel.status"] == 400
    assert not request.failed


@pytest.mark.parametrize(
    "header", ["", "nonsense", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff-" + "1" * 32 + "-" + "1" * 16 + "-01"]
)
def test_a_malformed_traceparent_starts_a_trace_of_its_own(traced: Server, collector: Collector, header: str) -> None:
    reply = traced.chat(TEXT, {"traceparent": header})
    assert reply.status_code == 200
    name = reply.json()["id"]
    collector.until(lambda come: any(span.attributes.get("bagel.request_id") == name for span in come.spans))
    [request] = [span for span in collector.spans if span.attributes.get("bagel.request_id") == name]
    assert request.parent == ""
    assert {span.parent for span in collector.of(request.trace)} == {"", request.id}


def test_a_client_that_does_not_sample_gets_no_spans(traced: Server, collector: Collector) -> None:
    (unsampled, parent), (sampled, other) = _ids(), _ids()
    traced.chat(TEXT, {"traceparent": _traceparent(unsampled, parent, "00")})
    traced.chat(TEXT, {"traceparent": _traceparent(sampled, other)})
    _whole(collector, sampled)
    assert collector.of(unsampled) == []


def test_tritons_own_clients_are_heard_too(traced: Server, collector: Collector) -> None:
    trace, parent = _ids()
    # Triton forwards no headers at this address: the body names the parent.
    body = {"prompt": "Hello", "modality": "text", "max_tokens": 4, "traceparent": _traceparent(trace, parent)}
    url = f"http://{traced.http}/v2/models/bagel/generate_stream"
    reply = httpx.post(url, json=body, timeout=ANSWER_S, trust_env=False)
    assert "done" in reply.text
    assert _whole(collector, trace)[0].parent == parent


@pytest.mark.parametrize("header", ["traceparent", "tracestate"])
def test_a_stage_that_is_called_directly_takes_the_headers_too(traced: Server, header: str) -> None:
    prompt = triton.InferInput("prompt", [1], "BYTES").set_data_from_numpy(np.array([b"Hello"], dtype=np.object_))
    with triton.InferenceServerClient(traced.grpc) as client:
        answer = client.infer("cfg_expand", [prompt], headers={header: _traceparent(*_ids())})
    assert answer.as_numpy("plan") is not None


@pytest.mark.long
def test_no_span_is_lost_at_a_shutdown(checkpoint_dir: Path) -> None:
    trace, parent = _ids()
    with collecting() as collector:
        collector.delay_s = 0.5
        environment = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.url}/v1/traces"}  # sent every 5 s
        with Server(checkpoint_dir, environment=environment) as server, ThreadPoolExecutor(1) as client:
            server.chat(IMAGE, {"traceparent": _traceparent(trace, parent)})
            (cut_off, other) = _ids()
            long = client.submit(server.chat, LONG, {"traceparent": _traceparent(cut_off, other)})
            until(lambda: bool(server.gauge("bagel_dit_active")), "dit is not at work", ANSWER_S)
            server.stop()
            assert long.result().status_code == 503
            assert long.result().json()["error"]["message"] == "bagel is being stopped"
        assert [span.name for span in _whole(collector, trace)[1]] == STAGES
        request, stages = _whole(collector, cut_off)
        assert [span.name for span in stages] == STAGES[:3]
        assert request.attributes["error.type"] == "Cancelled"
