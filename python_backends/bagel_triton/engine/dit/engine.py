"""The denoising stage: every step moves all active images, of all requests, in one packed forward."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bagel_triton.deploy.config import DitConfig
from bagel_triton.engine.dit.batch import BranchItem
from bagel_triton.engine.dit.run import FlowRun, Latents
from bagel_triton.engine.dit.steps import DeviceSteps, HostSteps
from bagel_triton.engine.dit.workspace import WorkspacePool
from bagel_triton.engine.loop import EngineLoop, Job
from bagel_triton.kv.connectors.base import Consumer, read_pattern
from bagel_triton.kv.store import store_shape
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import VISION_TOKENS
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.device import Paced, forward_on, on_gpu, wait_for_stream
from bagel_triton.model.flow import get_timesteps, initial_noise
from bagel_triton.model.lora import LoraAdapter
from bagel_triton.protocol.errors import InvalidRequest, LeaseError
from bagel_triton.protocol.events import PartialImageEvent, Preview, ProgressEvent
from bagel_triton.protocol.messages import DenoiseJob, FlowSettings, KVGeometry, KVHandle
from bagel_triton.protocol.validation import check_adapter
from bagel_triton.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from bagel_triton.parallel.group import RankGroup

DitJob = Job[DenoiseJob, Sequence[Latents]]


class DitEngine(EngineLoop[DenoiseJob, Sequence[Latents]]):
    """Denoises images on contexts claimed from the thinker; owns its workspace, from one thread.

    ``ranks`` compute its forwards, if there are any, and are closed with it. ``vision_tokens`` are
    the ids of ``<|vision_start|>`` and ``<|vision_end|>``; ``geometry`` and ``kv_tokens`` are the
    thinker's KV cache's, whose size on another host is not known here. ``adapters`` are those
    that requests may name.
    """

    stage = "dit"

    def __init__(
        self,
        model: Bagel,
        consumer: Consumer,
        config: DitConfig,
        vision_tokens: tuple[int, int],
        geometry: KVGeometry,
        kv_tokens: int | None,
        metrics: Metrics | None = None,
        ranks: RankGroup | None = None,
        adapters: Mapping[str, LoraAdapter] | None = None,
    ) -> None:
        pool = ThreadPool.of(model.device)
        super().__init__(metrics, config.max_waiting, pool, model.device)
        self._model, self._consumer, self.config, self.ranks = model, consumer, config, ranks
        self._geometry, self._kv_tokens, self._adapters = geometry, kv_tokens, {} if adapters is None else adapters
        self._runs: list[FlowRun] = []
        self._paced = Paced(model.device)
        if ranks is None:
            forward = forward_on(model.device, model.language_model.model, pool)
        else:
            forward = ranks.forward
            ranks.join(self.end)
        self._workspace: WorkspacePool | None = None
        self._steps: HostSteps | DeviceSteps = HostSteps(model, forward)
        if on_gpu(model.device) and ranks is None:
            self._steps = DeviceSteps(model, forward, config, geometry)
            self._workspace = self._steps.workspace
        with torch.inference_mode():
            self._vision_embeddings = model.embed_text(torch.tensor(vision_tokens, device=model.device))  # [2, hidden]
        self.start()

    @property
    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the transformer."""
        return self._model.device, self._model.dtype

    def read_pattern(self, handle: KVHandle) -> Future[None]:
        """Claim and compare the self-test's pattern; from any thread."""
        self._check_handle(handle)
        return self.call(lambda: read_pattern(self._consumer, handle, self._model.device))

    def _active(self) -> list[DitJob]:
        return [run.job for run in self._runs]

    def _check(self, task: DenoiseJob) -> None:
        check_adapter(task.lora, self._adapters)
        self._grid(task.flow)
        for handle in task.handles:
            self._check_handle(handle)
        if self._workspace is not None:
            needed, slots = sum(self._sizes(task)), self._workspace.slots
            if needed > slots:  # it would wait for ever
                raise InvalidRequest(
                    f"the request is too long: its contexts and a step's tokens need {needed} slots of the DiT's "
                    f"workspace, which has {slots} for dit.max_num_seqs={self.config.max_num_seqs}",
                    "messages",
                )

    def _sizes(self, task: DenoiseJob) -> list[int]:
        """Slots for each context and a step's tokens behind it."""
        rows, columns = self._grid(task.flow)
        return [handle.tokens + rows * columns + VISION_TOKENS for handle in task.handles]

    def _check_handle(self, handle: KVHandle) -> None:
        """Refuse a handle that is not the thinker's: its first handle decides how its KV cache is mapped."""
        if handle.geometry != self._geometry:
            raise LeaseError(f"the context's geometry {handle.geometry} is not the thinker's {self._geometry}")
        if self._kv_tokens is not None and handle.tokens > self._kv_tokens + self._geometry.block_tokens:
            raise LeaseError(f"the context's {handle.tokens} tokens are more than the KV cache's {self._kv_tokens}")

    def _admit(self, job: DitJob) -> bool:
        flow = job.task.flow
        rows, columns = self._grid(flow)
        images = flow.num_images + sum(len(run.x) for run in self._runs)
        tokens = (rows * columns + VISION_TOKENS) * len(job.task.handles) * flow.num_images
        tokens += sum((run.tokens + VISION_TOKENS) * len(run.stores) * len(run.x) for run in self._runs)
        within = images <= self.config.max_num_seqs and tokens <= self.config.max_num_batched_tokens
        if self._runs and not within:  # a single request may exceed both
            return False
        slots = [] if self._workspace is None else self._workspace.take(self._sizes(job.task))
        if slots is None:  # it waits for the running ones
            return False
        try:
            self._runs.append(self._begin(job, rows, columns, slots))
        except Exception:
            self._give_back(slots)
            raise
        return True

    def _give_back(self, slots: Sequence[slice]) -> None:
        if self._workspace is not None:
            self._workspace.give_back(slots)

    def _grid(self, flow: FlowSettings) -> tuple[int, int]:
        """Rows and columns of an image's latent tokens."""
        latent = self._model.config.latent
        for name, side in (("height", flow.height), ("width", flow.width)):
            if side % latent.stride or side > latent.max_side:
                raise InvalidRequest.value(name, side, f"a multiple of {latent.stride} up to {latent.max_side}")
        return flow.height // latent.stride, flow.width // latent.stride

    @torch.inference_mode()
    def _begin(self, job: DitJob, rows: int, columns: int, slots: list[slice]) -> FlowRun:
        model, task, settings = self._model, job.task, job.task.flow
        check_adapter(task.lora, self._adapters)  # it may have been unloaded since the job came
        stores = self._claim(task, slots)
        channels = model.config.latent.token_channels
        times = get_timesteps(settings.num_inference_steps, settings.timestep_shift)
        return FlowRun(
            job=job,
            rows=rows,
            columns=columns,
            x=[initial_noise(seed, rows * columns, channels).to(model.device) for seed in settings.seeds],
            times=times,
            time_embeddings=model.time_embedder(times.to(model.device)),
            positions=model.latent_pos_embed(rows, columns),
            stores=stores,
            slots=slots,
            next_positions=[handle.next_position for handle in task.handles],
            context_of={context.branch: context.handle for context in task.branches},
            adapter=self._adapters[task.lora] if task.lora else None,
        )

    def _claim(self, task: DenoiseJob, slots: Sequence[slice]) -> list[Tensor]:
        """Copy each context to the front of a store that has room for a step's tokens behind it.

        With a workspace the stores are ``slots`` of it. Every lease is released, even if some could not be claimed.
        """
        stores: list[Tensor] = []
        started = time.monotonic()
        try:
            for number, (handle, size) in enumerate(zip(task.handles, self._sizes(task), strict=True)):
                if self._workspace is not None:
                    stores.append(self._workspace.store[:, :, slots[number]])
                else:
                    shape = store_shape(self._geometry, size)
                    stores.append(torch.empty(shape, dtype=self._model.dtype, device=self._model.device))
                self._consumer.claim(handle, stores[number][:, :, : handle.tokens])
        except Exception:
            for handle in task.handles:
                self._consumer.release(handle)
            raise
        if self.ranks is not None:
            for number, handle in enumerate(task.handles):  # one by one: the whole of each is freed
                stores[number] = self.ranks.keep(stores[number], handle.tokens)
        self.metrics.observe("dit_kv_handoff_seconds", time.monotonic() - started)
        return stores

    @torch.inference_mode()
    def _step(self) -> None:
        items = [
            BranchItem(run, image, context)
            for run in sorted(self._runs, key=lambda run: run.job.task.lora)  # an adapter's rows are adjacent
            for contexts in [run.contexts_to_compute()]
            for image in range(len(run.x))
            for context in contexts
        ]
        computed: dict[tuple[int, int, int], Tensor] = {}
        if items:
            hidden, start = self._steps.run(items, self._embed(items)), 0
            if any(run.seers for run in self._runs):
                hidden = hidden.clone()  # TaylorSeer keeps its states, and a GPU's next step overwrites these
            for run, image, context in items:
                computed[id(run), image, context] = hidden[start : start + run.tokens]
                start += run.tokens
        self._paced.step()
        for run in list(self._runs):
            for image in range(len(run.x)):
                own = {context: state for (of, at, context), state in computed.items() if (of, at) == (id(run), image)}
                run.update(image, own, self._model.velocity)
            self._report(run)

    def _embed(self, items: Sequence[BranchItem]) -> list[Tensor]:
        """This step's embeddings, [latents of every item | vision tokens of every item]."""
        latents: dict[tuple[int, int], Tensor] = {}
        for run, image, _ in items:
            if (id(run), image) not in latents:
                time = run.time_embeddings[run.step : run.step + 1]
                latents[id(run), image] = self._model.embed_latents(run.x[image], time, run.positions)
        return [latents[id(run), image] for run, image, _ in items] + [self._vision_embeddings] * len(items)

    def _report(self, run: FlowRun) -> None:
        """Count the step, send progress and previews, and finish a run that is complete."""
        preview = run.preview_index
        run.step += 1
        run.job.progress(ProgressEvent("dit", run.step, run.updates))
        if preview is not None or run.step == run.updates:
            wait_for_stream(self._model.device)  # other threads read the results
        if preview is not None:
            for image, tokens in run.predicted.items():
                event = PartialImageEvent(
                    image, preview, run.step, run.updates, run.settings.height, run.settings.width
                )
                run.job.progress(Preview(event, Latents(tokens, run.rows, run.columns)))
            run.predicted.clear()
        if run.step == run.updates:
            self._free(run.job)
            self.metrics.count("images", len(run.x))
            run.job.finish([Latents(x, run.rows, run.columns) for x in run.x], self.stage)

    def _renew_leases(self, job: DitJob) -> None:
        for handle in job.task.handles:
            self._consumer.renew(handle)

    def _on_rejected(self, job: DitJob) -> None:
        for handle in job.task.handles:
            self._consumer.release(handle)

    def _free(self, job: DitJob) -> None:
        for run in self._runs:
            if run.job is job:
                self._give_back(run.slots)
                if self.ranks is not None:
                    self.ranks.free(run.stores)
        self._runs = [run for run in self._runs if run.job is not job]
        self._steps.forget()

    def close(self) -> None:
        """Stop the thread and close the connector."""
        super().close()
        if self.ranks is not None:
            self.ranks.close()
        self._consumer.close()
