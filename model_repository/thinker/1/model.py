"""The autoregressive stage as a Triton model: a plan in, texts and leases on KV out."""

from concurrent.futures import Future

from bagel_triton.engine.build import StageResources, build_thinker
from bagel_triton.engine.thinker.engine import ThinkerEngine
from bagel_triton.protocol.messages import KVHandle, Plan, ThinkerOutput, encode_handle
from bagel_triton.protocol.tensors import Arrays
from bagel_triton.triton.io import bytes_array, mapped, message_array, message_of
from bagel_triton.triton.stage_model import StageModel
from bagel_triton.triton.tickets import Work


def outputs(result: ThinkerOutput) -> Arrays:
    """``thinker_output``, and the ``denoise_job`` in it where an image is to follow."""
    job = {} if result.job is None else {"denoise_job": message_array(result.job)}
    return {"thinker_output": message_array(result), **job}


class TritonPythonModel(StageModel):
    """``plan`` -> ``thinker_output``, ``denoise_job``."""

    def build(self, resources: StageResources) -> ThinkerEngine:
        """The engine and its KV cache."""
        return build_thinker(resources, self.metrics)

    def work(self, inputs: Arrays, request_id: str) -> Work:
        """A plan's branches and text."""
        plan = message_of(inputs, "plan", Plan)
        return Work(plan, plan.request_id, outputs, plan.scheduling)

    def selftest(self, inputs: Arrays) -> Future[Arrays]:
        """Lend a pattern; the lease as JSON."""

        def lease(handle: KVHandle) -> Arrays:
            return {"selftest": bytes_array(encode_handle(handle))}

        return mapped(self.engine.lend_pattern(), lease)
