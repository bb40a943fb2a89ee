"""What ``/metrics`` says of requests, and of stages that die."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import httpx
import pytest

from bagel_triton.telemetry.metrics import METRIC_DEFS, SECONDS, Metric
from tests.serving.test_together import image_body
from tests.support.killing import arguments, descendants, health, kill, until
from tests.support.serving import Server

METRICS = [metric for metrics in METRIC_DEFS.values() for metric in metrics]
IMAGE = image_body({"prompt": "A cute cat", "height": 64, "width": 64, "num_inference_steps": 4}, seed=1)
TEXT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "modalities": ["text"],
    "max_tokens": 5,
    "n": 2,
    "temperature": 2.0,
    "seed": 1,
}
TOLD_S, BACK_S = 10.0, 120.0


@pytest.fixture(scope="module")
def fresh(observed: Server) -> Server:
    """These tests count from zero, in this order: no other module may use this server before."""
    return observed


def scrape(server: Server) -> dict[str, float]:
    """Every series of ours, by name and labels as they stand there."""
    text = httpx.get(server.metrics, trust_env=False).text
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:6] == "bagel_"
    }


def series(metric: Metric) -> list[str]:
    """The series that a metric has from the start."""
    if metric.kind == "histogram":
        return [f"{metric.exposed}_count", f"{metric.exposed}_sum", f'{metric.exposed}_bucket{{le="+Inf"}}']
    if not metric.labels:
        return [metric.exposed]
    return [f'{metric.exposed}{{{name}="{value}"}}' for name, values in metric.labels.items() for value in values]


def told(server: Server, expected: dict[str, float]) -> dict[str, float]:
    """The metrics, once those ``expected`` have come: a stage tells of itself a little later than it answers."""
    until(lambda: expected.items() <= scrape(server).items(), f"not all of {expected}", TOLD_S)
    return scrape(server)


def test_every_metric_is_there_before_the_first_request_and_no_other(fresh: Server) -> None:
    expected = {name for metric in METRICS for name in series(metric)}
    until(lambda: expected <= scrape(fresh).keys(), "not all metrics are there", TOLD_S)
    found = scrape(fresh)
    assert {name for name in found if "_bucket" not in name or "+Inf" in name} == expected
    assert {name: value for name, value in found.items() if value} == {
        "bagel_thinker_kv_blocks": found["bagel_thinker_kv_blocks"]
    }
    text = httpx.get(fresh.metrics, trust_env=False).text
    for metric in filter(series, METRICS):  # those by address come with the first server of stage 1
        assert f"# HELP {metric.exposed} {metric.meaning}\n# TYPE {metric.exposed} {metric.kind}\n" in text


def test_an_image_and_a_text_are_counted_once_where_they_went(fresh: Server) -> None:
    usage = [fresh.chat(body).json()["usage"] for body in (IMAGE, TEXT)]
    tokens = usage[1]["completion_tokens"]
    found = told(
        fresh,
        {
            'bagel_requests_total{status="200"}': 2,
            "bagel_images_total": 1,
            "bagel_generated_tokens_total": tokens,
            "bagel_prompt_tokens_total": sum(one["prompt_tokens"] for one in usage),
            "bagel_request_seconds_count": 2,
            "bagel_requests_active": 0,
            "bagel_thinker_queue_seconds_count": 2,
            "bagel_thinker_prefill_seconds_count": 2,
            "bagel_time_to_first_token_seconds_count": 2,
            "bagel_time_per_output_token_seconds_count": 2,
            "bagel_dit_queue_seconds_count": 1,
            "bagel_dit_kv_handoff_seconds_count": 1,
            "bagel_dit_step_seconds_count": 3,
            "bagel_vae_decode_queue_seconds_count": 1,
            "bagel_vae_decode_step_seconds_count": 1,
            "bagel_thinker_kv_leases": 0,
        },
    )
    fresh.chat(IMAGE)
    assert found["bagel_thinker_prefix_hit_tokens_total"] < found["bagel_thinker_prefix_query_tokens_total"]
    again = told(fresh, {"bagel_images_total": 2})
    assert again["bagel_thinker_prefix_hit_tokens_total"] > found["bagel_thinker_prefix_hit_tokens_total"]


def test_a_histogram_has_prometheus_buckets(fresh: Server) -> None:
    found = scrape(fresh)
    counts = {
        match[1]: value
        for name, value in found.items()
        if (match := re.fullmatch(r'bagel_request_seconds_bucket\{le="([^"]+)"\}', name))
    }
    bounds = [float(bound) for bound in counts]
    assert bounds == [*SECONDS, float("inf")]
    assert list(counts.values()) == sorted(counts.values())
    assert counts["+Inf"] == found["bagel_request_seconds_count"] == 3
    assert 0 < found["bagel_request_seconds_sum"] < 300


def test_a_refused_request_is_counted_and_not_timed(fresh: Server) -> None:
    assert fresh.chat({**IMAGE, "height": 63}).status_code == 400
    found = told(fresh, {'bagel_requests_total{status="400"}': 1})
    assert found["bagel_request_seconds_count"] == 3


def test_a_reloaded_stage_counts_on_and_its_reload_is_counted(fresh: Server) -> None:
    before = scrape(fresh)
    _replace(fresh, "dit")
    assert fresh.chat(IMAGE).status_code == 200
    found = told(
        fresh,
        {
            'bagel_stage_reloads_total{stage="dit"}': 1,
            'bagel_stage_reloads_total{stage="thinker"}': 0,
            "bagel_server_restarts_total": 0,
            "bagel_images_total": before["bagel_images_total"] + 1,
            "bagel_dit_step_seconds_count": before["bagel_dit_step_seconds_count"] + 3,
            "bagel_thinker_queue_seconds_count": before["bagel_thinker_queue_seconds_count"] + 1,
            "bagel_dit_active": 0,
        },
    )
    assert found.keys() == before.keys()


@pytest.mark.long
def test_a_new_tritonserver_counts_from_zero_but_for_what_the_supervisor_counts(fresh: Server) -> None:
    before, reloads = scrape(fresh), 'bagel_stage_reloads_total{stage="dit"}'
    _replace(fresh, "dit")
    [triton] = [pid for pid in descendants(fresh.process.pid) if "--model-control-mode" in arguments(pid)]
    os.kill(triton, signal.SIGABRT)
    _until_replaced(fresh, triton)
    found = told(fresh, {"bagel_server_restarts_total": 1, reloads: before[reloads] + 1})
    assert found.keys() == before.keys()
    assert found["bagel_images_total"] == found["bagel_request_seconds_count"] == 0


def _replace(server: Server, stage: str) -> None:
    """Kill a process of ``stage`` and wait until there is another."""
    _until_replaced(server, kill(server, stage))


def _until_replaced(server: Server, killed: int) -> None:
    until(lambda: health(server) == 503, "a dead process looks healthy", TOLD_S)
    until(lambda: not arguments(killed) and health(server) == 200, "it is not back", BACK_S)
