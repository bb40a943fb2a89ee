"""Every metric there is: what it measures, and whose work it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from bagel_triton.deploy.topology import DECODER, DIT, EXPANDER, ORCHESTRATOR, THINKER
from bagel_triton.protocol.errors import STATUSES

SUPERVISOR: Final = "supervisor"
Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric. ``name`` is what engines call it; ``labels`` are those known beforehand, by name."""

    kind: Kind
    name: str
    meaning: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def exposed(self) -> str:
        """Its name at ``/metrics``."""
        return f"bagel_{self.name}" + ("_total" if self.kind == "counter" else "")


def _of_engine(stage: str) -> tuple[Metric, ...]:
    """What every engine tells of its line and its loop."""
    return (
        Metric("gauge", f"{stage}_active", f"requests that {stage} works on"),
        Metric("gauge", f"{stage}_waiting", f"requests that wait in line for {stage}"),
        Metric("histogram", f"{stage}_queue_seconds", f"time a request waited in line for {stage}"),
        Metric("histogram", f"{stage}_step_seconds", f"time of one step of {stage}, of all requests in it"),
        Metric(
            "counter", f"{stage}_refused", f"requests refused because the line for {stage}, or {stage} itself, was full"
        ),
        Metric("counter", f"{stage}_cancelled", f"requests dropped at {stage} because their client had gone"),
    )


_ORCHESTRATOR = (
    Metric("counter", "requests", "requests that ended, by HTTP status", {"status": STATUSES}),
    Metric("gauge", "requests_active", "requests in flight, whatever stage they are at"),
    Metric("histogram", "request_seconds", "time of a whole request that succeeded"),
)
_SUPERVISOR = (
    Metric(
        "counter",
        "stage_reloads",
        "times a stage was loaded anew because a process of it had died",
        {"stage": (EXPANDER, THINKER, DIT, DECODER)},
    ),
    Metric("counter", "server_restarts", "times tritonserver was started again because it had crashed or hung"),
)
_THINKER = (
    Metric("histogram", "thinker_prefill_seconds", "time from a request's admission to its contexts being complete"),
    Metric(
        "histogram", "time_to_first_token_seconds", "time from a request's coming to the thinker to its first token"
    ),
    Metric("histogram", "time_per_output_token_seconds", "mean time between the tokens of one text"),
    Metric("counter", "prompt_tokens", "tokens of context that requests brought, images included"),
    Metric("counter", "generated_tokens", "tokens of text that were decoded"),
    Metric(
        "counter", "thinker_prefix_query_tokens", "tokens of context that could have been kept from earlier requests"
    ),
    Metric("counter", "thinker_prefix_hit_tokens", "tokens of context that were kept from earlier requests"),
    Metric("counter", "thinker_encoding_queries", "encodings of images that were wanted, up to two an image"),
    Metric("counter", "thinker_encoding_hits", "encodings of images that were kept from an earlier time"),
    Metric("counter", "thinker_kv_waits", "requests that found the KV cache full and waited for room"),
    Metric("gauge", "thinker_kv_blocks", "blocks of the KV cache"),
    Metric("gauge", "thinker_kv_blocks_used", "blocks that requests or leases hold"),
    Metric("gauge", "thinker_kv_blocks_leased", "blocks that leases hold"),
    Metric("gauge", "thinker_kv_blocks_cached", "blocks that are only kept for requests that begin alike"),
    Metric("gauge", "thinker_kv_leases", "contexts that are lent"),
)
_DIT = (
    Metric("histogram", "dit_kv_handoff_seconds", "time to copy a request's contexts from the KV cache"),
    Metric("counter", "images", "images that were denoised"),
)
# By who measures them; the orchestrator has all of them where it has every engine.
CATALOGUE: Mapping[str, tuple[Metric, ...]] = {
    ORCHESTRATOR: _ORCHESTRATOR,
    SUPERVISOR: _SUPERVISOR,
    THINKER: _of_engine(THINKER) + _THINKER,
    DIT: _of_engine(DIT) + _DIT,
    DECODER: _of_engine(DECODER),
}
