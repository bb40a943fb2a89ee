"""Triton's rim of the autoregressive stage: a plan in, texts and leases on contexts out."""

from bagel_triton.engine.build import StageResources, build_thinker
from bagel_triton.engine.thinker.engine import ThinkerEngine
from bagel_triton.protocol.messages import Plan, ThinkerOutput, encode_handle
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.triton.io import Reply, bytes_array, message_array, message_of
from bagel_triton.triton.stage_model import StageModel


def outputs(thoughts: ThinkerOutput) -> Arrays:
    """``thoughts``, and of them the ``contexts`` alone where an image is to follow."""
    contexts = {} if thoughts.job is None else {"contexts": message_array(thoughts.job)}
    return {"thoughts": message_array(thoughts), **contexts}


class TritonPythonModel(StageModel):
    """``plan`` -> ``thoughts``, ``contexts``; events in between where ``progress`` is true."""

    def build(self, parts: StageResources) -> ThinkerEngine:
        """The engine and its arena."""
        return build_thinker(parts, self.metrics)

    def accept(self, inputs: Arrays, reply: Reply) -> None:
        """Queue a plan's branches, or lend a pattern for the self-test."""
        if "selftest" in inputs:
            reply.answer(self.engine.lend_pattern(), lambda handle: {"selftest": bytes_array(encode_handle(handle))})
            return
        plan = message_of(inputs, "plan", Plan)
        job = self.work(plan, plan.request_id, inputs, reply, plan.schedule)
        reply.settle(job.done, outputs)
