"""The denoising stage: every step moves all active images, of all requests, in one packed forward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from bagel_triton.deploy.config import DitConfig
from bagel_triton.engine.dit.run import FlowRun, Latents
from bagel_triton.engine.loop import EngineLoop, Job
from bagel_triton.kv.connectors.base import Consumer, read_pattern
from bagel_triton.kv.store import WorkspacePart, WorkspaceStep, WorkspaceVarlenStep, store_shape
from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import VISION_TOKENS
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.cuda.attention import KeySpan, call_of, grouped, numbers_of
from bagel_triton.model.cuda.upload import Upload
from bagel_triton.model.device import Paced, forward_on, on_gpu, wait_for_stream
from bagel_triton.model.flow import get_timesteps, initial_noise
from bagel_triton.model.mot import PackedBatch, rotary_tables
from bagel_triton.protocol.errors import InvalidRequest, LeaseError
from bagel_triton.protocol.events import PartialImageEvent, Preview, ProgressEvent
from bagel_triton.protocol.messages import DenoiseJob, FlowSettings, KVGeometry, KVHandle
from bagel_triton.telemetry.metrics import Metrics

DitJob = Job[DenoiseJob, Sequence[Latents]]


class BranchItem(NamedTuple):
    """An image in one of its contexts, the unit of a step's batch."""

    run: FlowRun
    image: int
    context: int


class DitEngine(EngineLoop[DenoiseJob, Sequence[Latents]]):
    """Denoises images on contexts claimed from the thinker; owns its workspaces, from one thread.

    ``vision_tokens`` are the ids of ``<|vision_start|>`` and ``<|vision_end|>``; ``geometry``
    and ``kv_tokens`` are the thinker's KV cache's.
    """

    stage = "dit"

    def __init__(
        self,
        model: Bagel,
        consumer: Consumer,
        config: DitConfig,
        vision_tokens: tuple[int, int],
        geometry: KVGeometry,
        kv_tokens: int,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(metrics, config.max_waiting, ThreadPool.of(model.device), model.device)
        self._model, self._consumer, self._config = model, consumer, config
        self._forward = forward_on(model.device, model.language_model.model, self._pool)
        self._geometry, self._kv_tokens = geometry, kv_tokens
        self._runs: list[FlowRun] = []
        self._packed: tuple[list[BranchItem], PackedBatch, WorkspaceStep | WorkspaceVarlenStep] | None = None
        self._upload, self._paced = Upload(model.device), Paced(model.device)
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
        self._grid(task.flow)
        for handle in task.handles:
            self._check_handle(handle)

    def _check_handle(self, handle: KVHandle) -> None:
        """Refuse a handle that is not the thinker's: its first handle decides how its KV cache is mapped."""
        if handle.geometry != self._geometry:
            raise LeaseError(f"the context's geometry {handle.geometry} is not the thinker's {self._geometry}")
        if handle.tokens > self._kv_tokens + self._geometry.block_tokens:
            raise LeaseError(f"the context's {handle.tokens} tokens are more than the KV cache's {self._kv_tokens}")

    def _admit(self, job: DitJob) -> bool:
        flow = job.task.flow
        rows, columns = self._grid(flow)
        images = flow.num_images + sum(len(run.x) for run in self._runs)
        tokens = (rows * columns + VISION_TOKENS) * len(job.task.handles) * flow.num_images
        tokens += sum((run.tokens + VISION_TOKENS) * len(run.stores) * len(run.x) for run in self._runs)
        within = images <= self._config.max_num_seqs and tokens <= self._config.max_num_batched_tokens
        if self._runs and not within:  # a single request may exceed both
            return False
        self._runs.append(self._begin(job, rows, columns))
        return True

    def _grid(self, flow: FlowSettings) -> tuple[int, int]:
        """Rows and columns of an image's latent tokens."""
        latent = self._model.config.latent
        for name, side in (("height", flow.height), ("width", flow.width)):
            if side % latent.stride or side > latent.max_side:
                raise InvalidRequest.value(name, side, f"a multiple of {latent.stride} up to {latent.max_side}")
        return flow.height // latent.stride, flow.width // latent.stride

    @torch.inference_mode()
    def _begin(self, job: DitJob, rows: int, columns: int) -> FlowRun:
        model, task, settings = self._model, job.task, job.task.flow
        workspace, stores = self._claim(task.handles, rows * columns + VISION_TOKENS)
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
            workspace=workspace,
            stores=stores,
            next_positions=[handle.next_position for handle in task.handles],
            context_of={context.branch: context.handle for context in task.branches},
        )

    def _claim(self, handles: Sequence[KVHandle], new_tokens: int) -> tuple[Tensor | None, list[Tensor]]:
        """Copy each context to the front of a store that has room for ``new_tokens`` behind it.

        On a GPU the stores are parts of one tensor, which comes first. Every lease is released, even if some could
        not be claimed.
        """
        stores: list[Tensor] = []
        started, workspace = time.monotonic(), None
        try:
            sizes = [handle.tokens + new_tokens for handle in handles]
            if on_gpu(self._model.device):
                workspace = self._workspace(sum(sizes))
                stores.extend(workspace.split(sizes, dim=2))
            for number, (handle, size) in enumerate(zip(handles, sizes, strict=True)):
                if workspace is None:
                    stores.append(self._workspace(size))
                self._consumer.claim(handle, stores[number][:, :, : handle.tokens])
        except Exception:
            for handle in handles:
                self._consumer.release(handle)
            raise
        self.metrics.observe("dit_kv_handoff_seconds", time.monotonic() - started)
        return workspace, stores

    def _workspace(self, tokens: int) -> Tensor:
        shape = store_shape(self._geometry, tokens)
        return torch.empty(shape, dtype=self._model.dtype, device=self._model.device)

    @torch.inference_mode()
    def _step(self) -> None:
        items = [
            BranchItem(run, image, context)
            for run in self._runs
            for contexts in [run.contexts_to_compute()]
            for image in range(len(run.x))
            for context in contexts
        ]
        computed: dict[tuple[int, int, int], Tensor] = {}
        if items:
            hidden = self._forward(self._embed(items), *self._pack(items))
            start = 0
            for run, image, context in items:
                computed[id(run), image, context] = hidden[start : start + run.tokens]
                start += run.tokens
        self._paced.step()
        for run in list(self._runs):
            for image in range(len(run.x)):
                own = {context: state for (of, at, context), state in computed.items() if (of, at) == (id(run), image)}
                run.update(image, own, self._model.velocity)
            self._report(run)

    def _embed(self, items: Sequence[BranchItem]) -> Tensor:
        """This step's embeddings, [latents of every item | vision tokens of every item]."""
        latents: dict[tuple[int, int], Tensor] = {}
        for run, image, _ in items:
            if (id(run), image) not in latents:
                time = run.time_embeddings[run.step : run.step + 1]
                latents[id(run), image] = self._model.embed_latents(run.x[image], time, run.positions)
        return torch.cat([latents[id(run), image] for run, image, _ in items] + [self._vision_embeddings] * len(items))

    def _pack(self, items: list[BranchItem]) -> tuple[PackedBatch, WorkspaceStep | WorkspaceVarlenStep]:
        """The batch of this step; built anew only when images or their branches change."""
        if self._packed is None or self._packed[0] != items:
            self._packed = (items, *self._build(items))
        return self._packed[1:]

    def _build(self, items: Sequence[BranchItem]) -> tuple[PackedBatch, WorkspaceStep | WorkspaceVarlenStep]:
        gen_rows = sum(item.run.tokens for item in items)
        spans: list[QuerySpan] = []
        writes, start = [], 0
        for number, (run, _, context) in enumerate(items):
            und, past = gen_rows + VISION_TOKENS * number, run.stores[context].shape[2] - run.tokens - VISION_TOKENS
            rows = (
                (start, start + run.tokens, past),
                (und, und + VISION_TOKENS, past + run.tokens),
            )
            # Both spans of a sequence are adjacent, so its new KV is written once for both.
            spans.extend(QuerySpan(first, last, number, causal=False) for first, last, _ in rows)
            writes.append(rows)
            start += run.tokens
        # One position for a whole image, latents and vision tokens alike.
        repeats = torch.tensor([item.run.tokens for item in items] + [VISION_TOKENS] * len(items))
        positions = torch.tensor([run.next_positions[context] for run, _, context in items] * 2)
        rows_at = positions.repeat_interleave(repeats)
        kv: WorkspaceStep | WorkspaceVarlenStep
        if on_gpu(self._model.device):
            rows_at, kv = self._placed(items, writes, rows_at)
        else:
            kv = WorkspaceStep(spans, [run.stores[c] for run, _, c in items], writes)
        cos, sin = rotary_tables(rows_at, self._model.config.language, self._model.dtype)
        return PackedBatch(gen_rows, cos, sin, wanted=slice(0, gen_rows)), kv

    def _placed(
        self, items: Sequence[BranchItem], writes: Sequence[Sequence[tuple[int, int, int]]], rows_at: Tensor
    ) -> tuple[Tensor, WorkspaceVarlenStep]:
        """The rows' positions on the device, and their keys and values: an image of each request at a time."""
        turns: dict[int, dict[int, list[tuple[KeySpan, int]]]] = {}  # by image and run; a span and its first slot
        for (run, image, context), rows in zip(items, writes, strict=True):
            at = sum(store.shape[2] for store in run.stores[:context])
            length = run.stores[context].shape[2]
            spans = [(KeySpan(first, stop, at, length, causal=False), at + slot) for first, stop, slot in rows]
            turns.setdefault(image, {}).setdefault(id(run), []).extend(spans)
        workspaces = {id(item.run): item.run.workspace for item in items}
        longs: list[Tensor] = [rows_at]
        ints: list[list[int]] = []
        parts: list[list[tuple[Tensor, tuple[KeySpan, ...]]]] = []
        for by_run in turns.values():
            parts.append([])
            for run_id, pairs in by_run.items():
                slot_of = {span.start: slot for span, slot in pairs}
                workspace = workspaces[run_id]
                assert workspace is not None, "a GPU's stores are parts of one workspace"
                for group in grouped([span for span, _ in pairs]):
                    slots = [torch.arange(span.stop - span.start) + slot_of[span.start] for span in group]
                    longs.append(torch.cat(slots))
                    ints.append(numbers_of(group))
                    parts[-1].append((workspace, group))
        (on_device, *slots_at), numbers = self._upload(longs, ints)
        tensors = iter(zip(slots_at, numbers, strict=True))
        steps: list[list[WorkspacePart]] = []
        for turn in parts:
            steps.append([])
            for workspace, group in turn:
                slots_of, own = next(tensors)
                steps[-1].append(WorkspacePart(workspace, slots_of, call_of(group, own)))
        return on_device, WorkspaceVarlenStep(steps)

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
        self._runs = [run for run in self._runs if run.job is not job]
        self._packed = None

    def close(self) -> None:
        """Stop the thread and close the connector."""
        super().close()
        self._consumer.close()
