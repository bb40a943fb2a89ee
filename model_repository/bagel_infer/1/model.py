"""The whole pipeline as a unary Triton model: a request's tensors in, one response out."""

from bagel_triton.triton.orchestrator import Orchestrator


class TritonPythonModel(Orchestrator):
    """One response, for clients and tools that call a decoupled model an error."""

    streams = False
