"""Triton's rim of the autoregressive stage: a plan in, leases on its contexts out."""

from collections.abc import Callable

from bagel_triton.engine.build import Parts, build_thinker
from bagel_triton.engine.thinker import ThinkerEngine
from bagel_triton.messages import Plan
from bagel_triton.request import Arrays
from bagel_triton.stage_model import StageModel
from bagel_triton.triton_io import Reply, message_array, message_of


class TritonPythonModel(StageModel):
    """``plan`` -> ``contexts``."""

    def build(self, parts: Parts, gauge: Callable[[str, float], None]) -> ThinkerEngine:
        """The engine and its arena."""
        return build_thinker(parts, gauge)

    def accept(self, inputs: Arrays, reply: Reply) -> None:
        """Queue a plan's branches for prefill."""
        plan = message_of(inputs, "plan", Plan)
        job = self.engine.submit(plan, plan.request_id, reply.progress)
        reply.settle(job.done, lambda contexts: {"contexts": message_array(contexts)})
