"""The stages as ``bagel`` reaches them: models of its own Triton or of another, called over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from bagel_triton.deploy.topology import DECODER, DIT, EXPANDER, THINKER
from bagel_triton.ipc import liveness
from bagel_triton.pipeline.stage_call import StageCall
from bagel_triton.protocol.errors import Internal
from bagel_triton.protocol.events import Stage, decode_event, decode_stats
from bagel_triton.protocol.messages import DenoiseJob, Plan, ThinkerOutput, decode
from bagel_triton.protocol.tensors import Array, Arrays
from bagel_triton.triton import io as triton_io
from bagel_triton.triton.client import RemoteModels, call, drop, own_address

Result = TypeVar("Result")


class TritonStages:
    """One request's way through the server; ``parent`` is its Triton request.

    ``shm_prefix`` is the server's: the stages' processes are announced under it, but for those
    that ``remote`` has.
    """

    def __init__(self, parent: Any, shm_prefix: str, remote: RemoteModels) -> None:
        self._shm_prefix, self._remote = shm_prefix, remote
        self._address = own_address()
        self._request_id: str = parent.request_id()  # the plan's, once there is a plan

    def expand(self, request: Arrays) -> StageCall[Plan]:
        """``cfg_expand``, with the client's own tensors."""
        return self._visit(EXPANDER, request, ["plan"], _plan)

    def think(self, plan: Plan) -> StageCall[ThinkerOutput]:
        """``thinker``, with text as it is decoded."""
        self._request_id = plan.request_id
        inputs = {"plan": triton_io.message_array(plan), "progress": np.array([True])}
        return self._visit(THINKER, inputs, ["event", "thoughts"], _thoughts)

    def denoise(self, job: DenoiseJob) -> StageCall[list[Arrays]]:
        """``dit``, with progress."""
        inputs = {"contexts": triton_io.message_array(job), "progress": np.array([True])}
        return self._visit(DIT, inputs, ["event", "latents", "latent_grid"], _images)

    def decode(self, latents: Arrays, request_id: str) -> StageCall[Array]:
        """``vae_decode``."""
        return self._visit(DECODER, latents, ["generated_image"], lambda arrays: arrays["generated_image"])

    def abandon(self, request_id: str) -> None:
        """Tell the stages that hold something: Triton does not pass a cancellation on."""
        # A stage that died holds nothing any more, and a call of it would hang.
        living = [stage for stage in (DECODER, DIT, THINKER) if self._watch(stage)()]
        calls = [threading.Thread(target=drop, args=(self._at(stage), stage, request_id)) for stage in living]
        for thread in calls:
            thread.start()
        for thread in calls:
            thread.join()

    def _at(self, stage: str) -> str:
        return self._remote.addresses.get(stage, self._address)

    def _watch(self, stage: Stage) -> Callable[[], bool]:
        if stage in self._remote.addresses:
            return self._remote.watch(stage)
        return liveness.watch(self._shm_prefix, stage)

    def _visit(
        self,
        stage: Stage,
        inputs: Arrays,
        outputs: list[str],
        result: Callable[[Arrays], Result],
    ) -> StageCall[Result]:
        visit: StageCall[Result] = StageCall(stage, self._watch(stage))
        address = self._at(stage)

        def read() -> None:
            answered = False
            try:
                names = [*outputs, "stats"]
                for arrays in call(address, stage, inputs, names, self._request_id):
                    if "stats" in arrays:
                        stats = decode_stats(_bytes(arrays.pop("stats")))
                        visit.finish(result(arrays), stats)
                        answered = True
                    elif "event" in arrays:
                        visit.progress(decode_event(_bytes(arrays["event"])))
                if not answered:
                    visit.fail(Internal(f"{stage} ended without an answer"))
            except Exception as error:
                visit.fail(error)

        # A thread, because a response of a stage that died never comes: the reader is
        # given up then, not the request.
        threading.Thread(target=read, daemon=True).start()
        return visit


def _bytes(array: Array) -> bytes:
    return bytes(array.reshape(-1)[0])


def _plan(arrays: Arrays) -> Plan:
    return decode(_bytes(arrays["plan"]), Plan)


def _thoughts(arrays: Arrays) -> ThinkerOutput:
    return decode(_bytes(arrays["thoughts"]), ThinkerOutput)


def _images(arrays: Arrays) -> list[Arrays]:
    """The latents of each image: they come stacked, [images * tokens, channels]."""
    rows, columns = arrays["latent_grid"].tolist()
    latents = arrays["latents"]
    parts = np.split(latents, len(latents) // (rows * columns))
    return [{"latents": part, "latent_grid": arrays["latent_grid"]} for part in parts]
