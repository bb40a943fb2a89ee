"""The whole pipeline as a Triton model: a request's tensors in, a stream of events out."""

from bagel_triton.triton.orchestrator import Orchestrator


class TritonPythonModel(Orchestrator):
    """A response for every event, or one response where ``stream`` is false."""
