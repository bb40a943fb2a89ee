"""The stages as ``bagel`` reaches them: its own server's by BLS, another host's over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bagel_triton.deploy.topology import DECODER, DIT, EXPANDER, THINKER
from bagel_triton.engine.preprocess.image_input import is_heavy
from bagel_triton.ipc import liveness
from bagel_triton.ipc.liveness import Announcement
from bagel_triton.pipeline.stage_call import StageCall
from bagel_triton.protocol.events import Stage, decode_stats
from bagel_triton.protocol.messages import DenoiseJob, Message, Plan, SchedulingParams, ThinkerOutput, decode, encode
from bagel_triton.protocol.tensors import Array, Arrays
from bagel_triton.triton.ticket_client import Doorbell, ModelCall, TicketClient

if TYPE_CHECKING:
    from bagel_triton.triton.client import RemoteModels

# BLS calls that may wait at a time: these, and two for each stage with tickets. Triton has 32
# threads for a model's BLS calls, which also send the model's own responses.
EXPANDER_CALLS = 2


class StageConnections:
    """``bagel``'s way to every stage, shared by all requests.

    Args:
        bls: makes the unary call of a model of this server.
        announcement: this process; a stage drops its tickets when it has died.
        shm_prefix: the server's; its stages are announced under it.
        remote: the stages of other hosts, if there are any.
    """

    def __init__(
        self, bls: Callable[[str], ModelCall], announcement: Announcement, shm_prefix: str, remote: RemoteModels | None
    ) -> None:
        self._prefix, self._remote = shm_prefix, remote
        self.expand_call = bls(EXPANDER)
        self._expanding = ThreadPoolExecutor(EXPANDER_CALLS, "cfg_expand-calls")
        # One at a time, so an instance is always free for a request whose images are soon decoded.
        self._expanding_heavy = ThreadPoolExecutor(1, "cfg_expand-heavy")
        self.stages = {stage: self._connect(stage, bls, announcement) for stage in (THINKER, DIT, DECODER)}

    def _connect(self, stage: str, bls: Callable[[str], ModelCall], announcement: Announcement) -> TicketClient:
        if self._remote is not None and stage in self._remote.addresses:
            return TicketClient(self._remote.model_call(stage))
        return TicketClient(bls(stage), Doorbell(self._prefix), announcement.lock_name)

    def watch(self, stage: str) -> Callable[[], bool]:
        """Whether ``stage`` has lived on since this call, when called."""
        if self._remote is not None and stage in self._remote.addresses:
            return self._remote.watch(stage)
        return liveness.watch(self._prefix, stage)

    def is_alive(self, stage: str) -> bool:
        """Whether ``stage`` can be called."""
        if self._remote is not None and stage in self._remote.addresses:
            return self._remote.is_ready(stage)
        return self.watch(stage)()

    def expander_pool(self, request: Arrays) -> ThreadPoolExecutor:
        """The threads that call ``cfg_expand`` for ``request``."""
        images = request["image"].reshape(-1).tolist() if "image" in request else ()
        return self._expanding_heavy if is_heavy(images) else self._expanding

    def close(self, timeout_s: float) -> None:
        """Stop; aborts that are queued get up to ``timeout_s`` seconds a stage."""
        for pool in (self._expanding, self._expanding_heavy):
            pool.shutdown(wait=False, cancel_futures=True)
        for client in self.stages.values():
            client.close(timeout_s)
        if self._remote is not None:
            self._remote.close()


class TritonStages:
    """The stages for one request; ``headers`` hold its trace context."""

    def __init__(self, connections: StageConnections, request_id: str, headers: Mapping[str, str]) -> None:
        self._connections, self._request_id, self._headers = connections, request_id, headers

    def expand(self, request: Arrays) -> StageCall[Plan]:
        """``cfg_expand``, with the client's own tensors."""
        call: StageCall[Plan] = StageCall(EXPANDER, self._connections.watch(EXPANDER))

        def run() -> None:
            if call.given_up:  # while it was queued: to decode its images would only hold up others
                return
            try:
                arrays = self._connections.expand_call(request, ["plan", "stats"], self._request_id)
                call.finish(decode(_bytes(arrays["plan"]), Plan), decode_stats(_bytes(arrays["stats"])))
            except Exception as error:
                call.fail(error)

        self._connections.expander_pool(request).submit(run)
        return call

    def think(self, plan: Plan) -> StageCall[ThinkerOutput]:
        """``thinker``, with text as it is decoded."""

        def result(arrays: Arrays) -> ThinkerOutput:
            return decode(_bytes(arrays["thinker_output"]), ThinkerOutput)

        return self._submit(THINKER, {"plan": _message(plan)}, ["thinker_output"], result, plan.request_id)

    def denoise(self, job: DenoiseJob) -> StageCall[list[Arrays]]:
        """``dit``, with progress."""
        outputs = ["latents", "latent_grid"]
        return self._submit(DIT, {"denoise_job": _message(job)}, outputs, _split_latents, job.request_id)

    def decode(self, latents: Arrays, request_id: str, scheduling: SchedulingParams) -> StageCall[Array]:
        """``vae_decode``."""
        name, inputs = "generated_image", {**latents, "scheduling": _message(scheduling)}
        return self._submit(DECODER, inputs, [name], lambda arrays: arrays[name], request_id)

    def abort(self, request_id: str) -> None:
        """Stop the request's work in every stage and revoke its leases."""
        for stage, client in self._connections.stages.items():
            client.abort(request_id, partial(self._connections.is_alive, stage))

    def _submit(
        self,
        stage: Stage,
        inputs: Arrays,
        outputs: Sequence[str],
        result: Callable[[Arrays], Any],
        request_id: str,
    ) -> StageCall[Any]:
        call: StageCall[Any] = StageCall(stage, self._connections.watch(stage))
        self._connections.stages[stage].submit(call, inputs, outputs, result, request_id, self._headers)
        return call


def _bytes(array: Array) -> bytes:
    return bytes(array.reshape(-1)[0])


def _message(message: Message) -> Array:
    return np.array([encode(message)], dtype=np.object_)


def _split_latents(arrays: Arrays) -> list[Arrays]:
    """The latents of each image: they come stacked, [images * tokens, channels]."""
    rows, columns = arrays["latent_grid"].tolist()
    latents = arrays["latents"]
    parts = np.split(latents, len(latents) // (rows * columns))
    return [{"latents": part, "latent_grid": arrays["latent_grid"]} for part in parts]
