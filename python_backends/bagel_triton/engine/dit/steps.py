"""A denoising step's forward: on a CPU and over ranks with the contexts' own stores, else by CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagel_triton.deploy.config import DitConfig
from bagel_triton.engine.dit.batch import BranchItem, StepRows, StepShape, placed, shaped, workspace_step
from bagel_triton.engine.dit.workspace import WorkspacePool, workspace_tokens
from bagel_triton.kv.store import WorkspaceStep
from bagel_triton.model.attention import attention_kernel
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.cuda.graphs import GraphCache
from bagel_triton.model.cuda.upload import Upload
from bagel_triton.model.device import Forward
from bagel_triton.model.lora import AdaptedRows, WeakRows, strongly, weakly
from bagel_triton.model.mot import PackedBatch, rotary_tables
from bagel_triton.protocol.messages import KVGeometry

GRAPH_ROWS = 1 << 14  # of the largest step that is a graph: the GPU takes longer for more than the host for launches


class HostSteps:
    """Forwards whose contexts have stores of their own."""

    def __init__(self, model: Bagel, forward: Forward) -> None:
        self._model, self._forward = model, forward
        self._packed: tuple[list[BranchItem], PackedBatch, WorkspaceStep] | None = None

    def run(self, items: list[BranchItem], embedded: Sequence[Tensor]) -> Tensor:
        """Hidden states of every row, before the final norm; ``embedded`` are the rows' in order."""
        if self._packed is None or self._packed[0] != items:
            rows = StepRows.of(items)
            positions = rows.positions.to(self._model.device)
            cos, sin = rotary_tables(positions, self._model.config.language, self._model.dtype)
            wanted = slice(0, rows.gen_rows)
            batch = PackedBatch(rows.gen_rows, cos, sin, wanted, rows.adapted(items))
            self._packed = items, batch, workspace_step(items, rows)
        return self._forward(torch.cat(list(embedded)), *self._packed[1:])

    def forget(self) -> None:
        """Drop what is kept of the last step's contexts."""
        self._packed = None


class DeviceSteps:
    """Forwards over one workspace for all contexts, large enough for the largest images that are admitted together."""

    def __init__(self, model: Bagel, forward: Forward, config: DitConfig, geometry: KVGeometry) -> None:
        self._model, self._forward = model, forward
        side, device = model.config.latent.max_side, model.device
        slots = workspace_tokens(model.config, config.max_num_seqs, side, side)
        self.workspace = WorkspacePool(geometry, slots, model.dtype, device)
        self._packed: tuple[list[BranchItem], StepShape, NDArray[np.int64], tuple[AdaptedRows, ...]] | None = None
        self._upload = Upload(device)
        self._graphs: GraphCache[tuple[StepShape, WeakRows]] | None = None
        # torch's plain attention reads lengths on the host, which a graph cannot; nor has it copies of layers.
        captures = attention_kernel(device, model.dtype).is_flash and model.language_model.model.offload is None
        if captures and not config.enforce_eager:
            self._graphs = GraphCache(device, self._captured)
            hidden = model.config.language.hidden_size
            self._rows = torch.empty(GRAPH_ROWS, hidden, dtype=model.dtype, device=device)

    def run(self, items: list[BranchItem], embedded: Sequence[Tensor]) -> Tensor:
        """Hidden states of every row, as for :class:`HostSteps`; overwritten by the next call."""
        if self._packed is None or self._packed[0] != items:
            rows = StepRows.of(items)
            self._packed = items, *shaped(items, rows), rows.adapted(items)
        _, shape, numbers, adapted = self._packed
        if self._graphs is None or shape.rows > GRAPH_ROWS:
            (inputs,), _ = self._upload((numbers,), ())
            return self._step(shape, adapted, inputs, torch.cat(list(embedded)))
        torch.cat(list(embedded), out=self._rows[: shape.rows])
        (hidden,) = self._graphs.run((shape, weakly(adapted)), numbers)
        return hidden

    def _captured(self, key: tuple[StepShape, WeakRows], inputs: Tensor) -> tuple[Tensor]:
        shape, adapted = key
        return (self._step(shape, strongly(adapted), inputs, self._rows),)

    def _step(self, shape: StepShape, adapted: tuple[AdaptedRows, ...], inputs: Tensor, rows: Tensor) -> Tensor:
        """Compute a step, as a graph captures it; ``rows`` start with the embeddings."""
        positions, kv = placed(shape, inputs, self.workspace.store)
        cos, sin = rotary_tables(positions, self._model.config.language, self._model.dtype)
        batch = PackedBatch(shape.gen_rows, cos, sin, slice(0, shape.gen_rows), adapted)
        return self._forward(rows[: shape.rows], batch, kv)

    def forget(self) -> None:
        """Drop what is kept of the last step's contexts."""
        self._packed = None
