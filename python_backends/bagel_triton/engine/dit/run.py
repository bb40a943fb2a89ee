"""One request's images while they are denoised: their state, and one step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bagel_triton.engine.loop import Job
from bagel_triton.model.config import VISION_TOKENS
from bagel_triton.model.flow import TaylorSeer, combine, guidance_branches
from bagel_triton.model.lora import LoraAdapter
from bagel_triton.protocol.messages import Branch, DenoiseJob, FlowSettings


@dataclass(frozen=True)
class Latents:
    """An image's latents: ``tokens`` [rows * columns, channels] float32."""

    tokens: Tensor
    rows: int
    columns: int


@dataclass(eq=False)
class FlowRun:
    """The images of one request, which share contexts, times and size and differ in their noise.

    Only ``x``, ``step``, ``seers`` and ``predicted`` change.
    """

    job: Job[DenoiseJob, Sequence[Latents]]
    rows: int
    columns: int
    x: list[Tensor]  # an image each: [tokens, channels] float32
    times: Tensor  # [steps] float32, on the CPU
    time_embeddings: Tensor  # [steps, hidden]
    positions: Tensor  # [tokens, hidden]
    stores: list[Tensor]  # one per context: past keys and values, then a step's
    slots: list[slice]  # on a GPU, those of each store in the workspace
    next_positions: list[int]  # a RoPE position per context
    context_of: dict[Branch, int]
    adapter: LoraAdapter | None = None
    step: int = 0
    seers: dict[tuple[int, Branch], TaylorSeer] = field(default_factory=dict)  # by image and branch
    predicted: dict[int, Tensor] = field(default_factory=dict)  # clean latents by image, in a preview's step

    @property
    def settings(self) -> FlowSettings:
        return self.job.task.flow

    @property
    def tokens(self) -> int:
        """Latent tokens of an image."""
        return self.rows * self.columns

    @property
    def past(self) -> list[int]:
        """Tokens of each context."""
        return [store.shape[2] - self.tokens - VISION_TOKENS for store in self.stores]

    @property
    def updates(self) -> int:
        """Updates from noise to image."""
        return self.settings.num_inference_steps - 1

    @property
    def preview_index(self) -> int | None:
        """The number of the preview that this step makes, if any; previews are spread evenly."""
        wanted = self.settings.partial_images
        due = [round(self.updates * number / (wanted + 1)) for number in range(1, wanted + 1)]
        done = self.step + 1
        return due.index(done) if done in due and done < self.updates else None

    def branches(self) -> tuple[Branch, ...]:
        """Branches that this step's guidance needs."""
        return guidance_branches(self.times[self.step], self.settings)

    def _seer(self, image: int, branch: Branch) -> TaylorSeer | None:
        if self.settings.cache != "taylorseer":
            return None
        return self.seers.setdefault((image, branch), TaylorSeer())

    def contexts_to_compute(self) -> list[int]:
        """Contexts that this step computes, each once: branches may share one, or be extrapolated."""
        due = []
        for branch in self.branches():
            seer = self._seer(0, branch)  # all images' counters move together
            if seer is None or seer.due:
                due.append(self.context_of[branch])
        return list(dict.fromkeys(due))

    def update(self, image: int, hidden: Mapping[int, Tensor], velocity: Callable[[Tensor], Tensor]) -> None:
        """Move one image by one step.

        Args:
            hidden: by context, the computed hidden states [tokens, hidden] before the final norm.
            velocity: hidden states to velocities, [tokens, channels].
        """
        velocities: dict[Branch, Tensor] = {}
        computed: dict[int, Tensor] = {}
        for branch in self.branches():
            context, seer = self.context_of[branch], self._seer(image, branch)
            if seer is not None:
                state = seer.update(hidden[context]) if seer.due else seer.extrapolate()
                velocities[branch] = velocity(state).float()
                continue
            if context not in computed:
                computed[context] = velocity(hidden[context]).float()
            velocities[branch] = computed[context]
        t, t_next = self.times[self.step], self.times[self.step + 1]
        x, v = self.x[image], combine(velocities, self.settings)
        # By numbers and not tensors: one on the CPU would be a copy that waits for the GPU.
        self.x[image] = x - v * float(t - t_next)
        if self.preview_index is not None:
            self.predicted[image] = x - v * float(t)  # rectified flow: x_t = (1 - t) * image + t * noise
