"""The flow stage: one step of the flow for every active picture at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_triton.deploy.config import DitConfig
from bagel_triton.engine.worker import Job, Worker
from bagel_triton.errors import LeaseError
from bagel_triton.kv.connectors.base import Consumer
from bagel_triton.kv.store import WorkspaceStep, store_shape
from bagel_triton.messages import Branch, ContextHandle, DenoiseJob, FlowSettings, KVGeometry, ProgressEvent
from bagel_triton.model.attention import Span
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.flow import combine, guidance_branches, initial_noise, schedule
from bagel_triton.model.mot import Pack, rotary_tables

MARKERS = 2  # <|vision_start|> and <|vision_end|> around a picture's latents


@dataclass(frozen=True)
class Latents:
    """A finished flow: ``tokens`` [rows * columns, channels] float32."""

    tokens: Tensor
    rows: int
    columns: int


DitJob = Job[DenoiseJob, Latents]


@dataclass
class _Picture:
    """One picture under way; everything but ``x`` and ``step`` is fixed at admission."""

    job: DitJob
    settings: FlowSettings
    x: Tensor  # [tokens, channels] float32
    times: Tensor  # [steps] float32
    time_embeddings: Tensor  # [steps, hidden]
    positions: Tensor  # [tokens, hidden]
    stores: list[Tensor]  # a workspace per context: past keys and values, then this step's
    next_positions: list[int]  # a RoPE position per context
    context_of: dict[Branch, int]
    step: int = 0

    def contexts(self) -> list[int]:
        """Contexts this step needs, each once: branches may share one."""
        branches = guidance_branches(self.times[self.step], self.settings)
        return list(dict.fromkeys(self.context_of[branch] for branch in branches))


@dataclass(frozen=True)
class _Block:
    """One context of one picture in a pack: rows of its latents and of its markers."""

    picture: _Picture
    context: int
    start: int
    markers: int


class DitEngine(Worker[DenoiseJob, Latents]):
    """Owns the transformer's generation side, from one thread.

    ``vision_markers`` are the ids of ``<|vision_start|>`` and ``<|vision_end|>``.
    """

    stage = "dit"

    def __init__(self, model: Bagel, consumer: Consumer, config: DitConfig, vision_markers: tuple[int, int]) -> None:
        super().__init__()
        self._model, self._consumer, self._config = model, consumer, config
        self._pictures: list[_Picture] = []
        self._packed: tuple[tuple[tuple[int, ...], ...], list[_Block], Pack] | None = None
        with torch.inference_mode():
            self._markers = model.embed_text(torch.tensor(vision_markers, device=model.device))  # [2, hidden]
        self.start()

    def _active(self) -> list[DitJob]:
        return [picture.job for picture in self._pictures]

    def _admit(self, job: DitJob) -> bool:
        if len(self._pictures) >= self._config.max_num_seqs:
            return False
        self._pictures.append(self._begin(job))
        return True

    @torch.inference_mode()
    def _begin(self, job: DitJob) -> _Picture:
        model, task, settings = self._model, job.task, job.task.flow
        stride = model.config.latent.stride
        rows, columns = settings.height // stride, settings.width // stride
        stores = self._claim(task.handles, rows * columns + MARKERS)
        times = schedule(settings.num_inference_steps, settings.timestep_shift)
        return _Picture(
            job=job,
            settings=settings,
            x=initial_noise(settings.seed, rows * columns, model.config.latent.token_channels).to(model.device),
            times=times,
            time_embeddings=model.time_embedder(times.to(model.device)),
            positions=model.latent_pos_embed(rows, columns),
            stores=stores,
            next_positions=[handle.next_position for handle in task.handles],
            context_of={context.branch: context.handle for context in task.branches},
        )

    def _claim(self, handles: Sequence[ContextHandle], new_tokens: int) -> list[Tensor]:
        """Each context copied to the front of a workspace with room for ``new_tokens``.

        Every lease ends here, whether or not all could be claimed.
        """
        stores = []
        for index, handle in enumerate(handles):
            try:
                self._check_geometry(handle.geometry)
                shape = store_shape(handle.geometry, handle.tokens + new_tokens)
                store = torch.empty(shape, dtype=self._model.dtype, device=self._model.device)
                self._consumer.claim(handle, store[:, :, : handle.tokens])
            except Exception:
                for rest in handles[index:]:
                    self._consumer.release(rest)
                raise
            stores.append(store)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)  # the copies are done before the leases are reused
        return stores

    def _check_geometry(self, geometry: KVGeometry) -> None:
        language = self._model.config.language
        expected = (language.num_layers, language.num_kv_heads, language.head_dim)
        if (geometry.layers, geometry.kv_heads, geometry.head_dim) != expected:
            raise LeaseError(f"the context's geometry {geometry} is not this model's {expected}")

    @torch.inference_mode()
    def _step(self) -> None:
        blocks, pack = self._pack()
        hidden = self._model.language_model.model(self._embed(blocks), pack)
        velocities = self._model.velocity(hidden[: pack.gen_rows]).float()  # [latent rows, channels]
        by_context = {
            (id(block.picture), block.context): velocities[block.start : block.start + block.picture.x.shape[0]]
            for block in blocks
        }
        for picture in list(self._pictures):
            t, t_next = picture.times[picture.step], picture.times[picture.step + 1]
            needed = guidance_branches(t, picture.settings)
            branches = {branch: by_context[id(picture), picture.context_of[branch]] for branch in needed}
            picture.x = picture.x - combine(branches, picture.settings) * (t - t_next).to(picture.x.device)
            picture.step += 1
            self._report(picture)

    def _embed(self, blocks: Sequence[_Block]) -> Tensor:
        """This step's embeddings, [latents of every block | markers of every block]."""
        latents = {
            id(picture): self._model.embed_latents(
                picture.x, picture.time_embeddings[picture.step : picture.step + 1], picture.positions
            )
            for picture in self._pictures
        }
        return torch.cat([latents[id(block.picture)] for block in blocks] + [self._markers] * len(blocks))

    def _pack(self) -> tuple[list[_Block], Pack]:
        """The pack of this step; built anew only when pictures or their guidance change."""
        key = tuple((id(picture), *picture.contexts()) for picture in self._pictures)
        if self._packed is None or self._packed[0] != key:
            self._packed = (key, *self._build())
        return self._packed[1], self._packed[2]

    def _build(self) -> tuple[list[_Block], Pack]:
        needed = [(picture, context) for picture in self._pictures for context in picture.contexts()]
        gen_rows = sum(picture.x.shape[0] for picture, _ in needed)
        blocks, spans, writes, counts, positions, start = [], [], [], [], [], 0
        for number, (picture, context) in enumerate(needed):
            tokens, markers = picture.x.shape[0], gen_rows + MARKERS * number
            blocks.append(_Block(picture, context, start, markers))
            past = picture.stores[context].shape[2] - tokens - MARKERS
            for first, length, slot in ((start, tokens, past), (markers, MARKERS, past + tokens)):
                spans.append(Span(first, first + length, number, causal=False))
                writes.append((first, first + length, number, slot))
            positions.append(picture.next_positions[context])
            counts.append(tokens)
            start += tokens
        # One position for a whole block, latents and markers alike.
        repeats = torch.tensor(counts + [MARKERS] * len(counts))
        rows = torch.tensor(positions * 2).repeat_interleave(repeats).to(self._model.device)
        cos, sin = rotary_tables(rows, self._model.config.language, self._model.dtype)
        kv = WorkspaceStep([block.picture.stores[block.context] for block in blocks], writes)
        return blocks, Pack(gen_rows, cos, sin, spans, kv)

    def _report(self, picture: _Picture) -> None:
        updates = picture.settings.num_inference_steps - 1
        picture.job.progress(ProgressEvent("dit", picture.step, updates))
        if picture.step == updates:
            self._drop(picture.job)
            stride = self._model.config.latent.stride
            rows, columns = picture.settings.height // stride, picture.settings.width // stride
            picture.job.finish(Latents(picture.x, rows, columns), self.stage)

    def _drop(self, job: DitJob) -> None:
        self._pictures = [picture for picture in self._pictures if picture.job is not job]
        self._packed = None

    def close(self) -> None:
        """Stop the thread and drop every mapping."""
        super().close()
        self._consumer.close()
