"""The planning stage as a Triton model: a request's tensors in, its plan out."""

import time
from typing import Any

from bagel_triton.deploy.config import from_environment
from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.ipc.liveness import Announcement
from bagel_triton.protocol.events import StageStats, encode_stats
from bagel_triton.protocol.request import ENSEMBLE_FIELDS
from bagel_triton.protocol.tensors import from_tensors
from bagel_triton.triton import io as triton_io


class TritonPythonModel:
    """The request's fields -> ``plan``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer and the checkpoint's geometry."""
        triton_io.use_triton_log()
        config = from_environment()
        self._expander = RequestPlanner.open(config)
        self._announcement = Announcement(config.shm_prefix, args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        started = time.perf_counter()
        try:
            triton_io.refuse_parameters(request, ENSEMBLE_FIELDS)
            plan = self._expander.expand(from_tensors(triton_io.arrays_of(request)), request.request_id())
        except Exception as error:
            return triton_io.error_response(error)
        stats = StageStats("cfg_expand", 0.0, time.perf_counter() - started)
        return triton_io.response(
            {
                "plan": triton_io.message_array(plan),
                "stats": triton_io.bytes_array(encode_stats(stats)),
            },
            request.requested_output_names(),
        )

    def finalize(self) -> None:
        """Leave in good order."""
        self._announcement.withdraw()
