"""Every metric, and the interface by which engines report them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from bagel_triton.deploy.topology import DECODER, DIT, EXPANDER, ORCHESTRATOR, THINKER
from bagel_triton.protocol.errors import STATUSES

SUPERVISOR: Final = "supervisor"
Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric. ``name`` is the engines' name for it; ``labels`` maps each label to its known values."""

    kind: Kind
    name: str
    meaning: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def exposed(self) -> str:
        """Its name at ``/metrics``."""
        return f"bagel_{self.name}" + ("_total" if self.kind == "counter" else "")


def _of_engine(stage: str) -> tuple[Metric, ...]:
    """The metrics of every engine's queue and loop."""
    return (
        Metric("gauge", f"{stage}_active", f"requests active in {stage}"),
        Metric("gauge", f"{stage}_waiting", f"requests waiting for {stage}"),
        Metric("histogram", f"{stage}_queue_seconds", f"time a request waited for {stage}"),
        Metric("histogram", f"{stage}_step_seconds", f"time of one step of {stage}, for all active requests together"),
        Metric("counter", f"{stage}_refused", f"requests refused because {stage} or its queue was full"),
        Metric("counter", f"{stage}_cancelled", f"requests aborted in {stage}, most often because the client left"),
    )


_ORCHESTRATOR = (
    Metric("counter", "requests", "requests that ended, by HTTP status", {"status": STATUSES}),
    Metric("gauge", "requests_active", "requests in flight, in any stage"),
    Metric("gauge", "asleep", "1 while the server sleeps: its weights and KV cache are freed"),
    Metric("histogram", "request_seconds", "time of a whole request, of those that succeeded"),
    Metric("gauge", "replica_ready", "1 where a server of stage 1 takes requests, by its address", {"address": ()}),
    Metric("gauge", "replica_draining", "1 where a server of stage 1 only finishes what it has", {"address": ()}),
    Metric("gauge", "replica_requests", "requests of this server that a server of stage 1 denoises", {"address": ()}),
    Metric("counter", "stage_retries", "requests tried at another server of stage 1, as the first one failed"),
)
_SUPERVISOR = (
    Metric(
        "counter",
        "stage_reloads",
        "reloads of a stage after one of its processes died",
        {"stage": (EXPANDER, THINKER, DIT, DECODER)},
    ),
    Metric("counter", "server_restarts", "restarts of tritonserver after a crash or a hang"),
)
_THINKER = (
    Metric("histogram", "thinker_prefill_seconds", "time from a request's admission to the end of its prefill"),
    Metric("histogram", "time_to_first_token_seconds", "time to first token, from arrival at the thinker"),
    Metric("histogram", "time_per_output_token_seconds", "mean time between the tokens of one text"),
    Metric("counter", "prompt_tokens", "context tokens of requests, images included"),
    Metric("counter", "generated_tokens", "text tokens decoded"),
    Metric("counter", "thinker_prefix_query_tokens", "context tokens looked up in the prefix cache"),
    Metric("counter", "thinker_prefix_hit_tokens", "context tokens found in the prefix cache"),
    Metric("counter", "thinker_encoding_queries", "image encodings looked up in the cache, up to two an image"),
    Metric("counter", "thinker_encoding_hits", "image encodings found in the cache"),
    Metric("counter", "thinker_kv_waits", "requests that had to wait for KV blocks"),
    Metric("gauge", "thinker_kv_blocks", "blocks of the KV cache"),
    Metric("gauge", "thinker_kv_blocks_used", "blocks that requests or leases hold"),
    Metric("gauge", "thinker_kv_blocks_leased", "blocks that leases hold"),
    Metric("gauge", "thinker_kv_blocks_cached", "blocks held by the prefix cache alone"),
    Metric("gauge", "thinker_kv_leases", "contexts lent to the DiT"),
)
_DIT = (
    Metric("histogram", "dit_kv_handoff_seconds", "time to copy a request's contexts from the thinker's KV cache"),
    Metric("counter", "images", "images denoised"),
)
# By the model that reports them; the orchestrator reports all if every engine runs in its process.
METRIC_DEFS: Mapping[str, tuple[Metric, ...]] = {
    ORCHESTRATOR: _ORCHESTRATOR,
    SUPERVISOR: _SUPERVISOR,
    THINKER: _of_engine(THINKER) + _THINKER,
    DIT: _of_engine(DIT) + _DIT,
    DECODER: _of_engine(DECODER),
}


# Upper bounds of the histograms' buckets, in seconds: from a decoded token to a large image on a CPU.
SECONDS: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics(Protocol):
    """A sink for measurements. Names lack the server's prefix; calls must not block."""

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set ``name`` to ``value``."""

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add ``amount`` to ``name``."""

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to the histogram ``name``."""


class NoMetrics:
    """Ignores everything."""

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Do nothing."""

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Do nothing."""

    def observe(self, name: str, seconds: float) -> None:
        """Do nothing."""


class ChangedGauges:
    """Gauges that are set only when they change; engines update them at every step."""

    def __init__(self, metrics: Metrics, prefix: str) -> None:
        self._metrics, self._prefix, self._values = metrics, prefix, dict[str, float]()

    def __call__(self, name: str, value: float) -> None:
        """Set ``name``, behind the prefix, to ``value``."""
        if self._values.get(name) != value:
            self._values[name] = value
            self._metrics.gauge(f"{self._prefix}{name}", value)
