"""What is rehearsed: engines of the published size on a fake GPU, stepped by hand in one thread."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
from PIL import Image
from torch import Tensor, nn

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.engine.build import Models
from bagel_triton.engine.dit.run import Latents
from bagel_triton.engine.loop import EngineLoop, Job
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.lora import LoraAdapter, LowRank, Projection
from bagel_triton.model.quantization import FORMS, quantize
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.messages import DenoiseJob
from bagel_triton.protocol.request import GenerationRequest
from bench.gpu import AUTOENCODER_WIDTHS, PUBLISHED, autoencoder_shapes
from tests.rehearsal.fake_gpu import Counting, Tally, fake_gpu
from tests.support.runs import result_of

GPU = torch.device("cuda:0")
TINY = Path(__file__).parents[1] / "data" / "tiny-a"
PROMPT = "A cute cat that sits on a table and looks at the rain behind the window "


@dataclass(frozen=True)
class Stage:
    """Engines on a fake GPU; their threads are not started."""

    gpu: Counting
    stages: LocalStages

    def turn(self, engine: EngineLoop[Any, Any]) -> Tally:
        """One turn of an engine's loop; what its GPU was given."""
        assert engine._jobs or not engine._inbox.empty(), "it would wait for work"
        self.gpu.tally = Tally()
        engine._turn()
        return self.gpu.tally

    def think(self, request: GenerationRequest) -> Job[Any, Any]:
        """Queue ``request`` at the thinker."""
        plan = result_of(self.stages.expand(request))
        return self.stages.thinker.submit(plan, plan.request_id, lambda event: None, plan.scheduling)

    def until(self, engine: EngineLoop[Any, Any], done: Callable[[], bool]) -> list[Tally]:
        """Turns until ``done``."""
        turns = []
        while not done():
            turns.append(self.turn(engine))
        return turns

    def lent(self, request: GenerationRequest) -> DenoiseJob:
        """The contexts of a request for an image."""
        job = self.think(request)
        self.until(self.stages.thinker, job.done.done)
        lent: DenoiseJob = job.done.result()[0].job
        return lent


@contextlib.contextmanager
def stage(layers: int, form: str | None = None, **deploy: Any) -> Iterator[Stage]:
    """The engines of one process, at the published size but for the number of layers, in bfloat16 or quantised.

    ``deploy`` are fields of their configuration.
    """
    config = dataclasses.replace(
        PUBLISHED,
        language=dataclasses.replace(PUBLISHED.language, num_layers=layers),
        vit=dataclasses.replace(PUBLISHED.vit, num_layers=1),
    )
    with mock.patch.object(EngineLoop, "start"), fake_gpu() as gpu, torch.inference_mode():
        with torch.device("meta"):
            bagel = Bagel(config).to(torch.bfloat16)
            if form is not None:
                quantize(bagel.language_model.model, FORMS[form])
            autoencoder = Autoencoder(autoencoder_shapes(config, AUTOENCODER_WIDTHS))
        models = Models(config, _placed(bagel), _placed(autoencoder))
        deployed = DeployConfig(str(TINY), device="cuda:0", dtype="bfloat16", **deploy)
        yield Stage(gpu, LocalStages(deployed, models=models))


def at_full_depth(scene: Callable[[Stage], Tally], few: int = 2, form: str | None = None) -> Tally:
    """What ``scene`` gives a GPU at the published depth, from that of ``few`` layers and of one more.

    The layers are alike, so each adds the same; the first and the last are among the few.
    """
    tallies = []
    for layers in (few, few + 1):
        with stage(layers, form) as engines:
            tallies.append(scene(engines))
    return tallies[0].extrapolated(tallies[1], PUBLISHED.language.num_layers - few)


def _placed(module: Any) -> Any:
    """``module`` with fake weights on the GPU."""
    for one in module.modules():
        for name, weight in list(one.named_parameters(recurse=False)):
            setattr(one, name, nn.Parameter(_fake(*weight.shape, dtype=weight.dtype), requires_grad=False))
        for name, codes in list(one.named_buffers(recurse=False)):
            setattr(one, name, _fake(*codes.shape, dtype=codes.dtype))
    return module


def _fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def adapted(scene: Stage, request: GenerationRequest, rank: int = 16) -> GenerationRequest:
    """``request`` with an adapter of all projections, which the engines have from here on."""
    language = scene.stages.thinker._model.config.language
    hidden, inner = language.hidden_size, language.intermediate_size
    queries, keys = (heads * language.head_dim for heads in (language.num_heads, language.num_kv_heads))
    shapes: dict[Projection, tuple[int, int]] = {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    updates = {
        (gen, name): LowRank(_fake(rank, width), _fake(height, rank))
        for gen in (False, True)
        for name, (height, width) in shapes.items()
    }
    adapters = {"style": LoraAdapter("style", [updates] * language.num_layers)}
    stages = scene.stages
    for holder in (stages.thinker, stages.thinker._admission, stages.dit, stages.planner):
        holder._adapters = adapters  # type: ignore[attr-defined]
    return msgspec.structs.replace(request, lora="style")


def image(side: int, steps: int = 8, **more: Any) -> GenerationRequest:
    """A guided image."""
    return GenerationRequest(
        prompt=PROMPT, height=side, width=side, num_inference_steps=steps, cfg_interval=(0.0, 1.0), seed=1, **more
    )


def edit(side: int) -> GenerationRequest:
    """An edit of an image of that size, with all three branches."""
    encoded = io.BytesIO()
    Image.new("RGB", (side, side)).save(encoded, "png")
    return image(side, image=(encoded.getvalue(),), cfg_img_scale=2.0)


def step_of(scene: Stage, request: GenerationRequest, graphs: bool = True) -> Tally:
    """The third denoising step of ``request``: the second has captured its graph."""
    job = scene.lent(request)
    dit = scene.stages.dit
    if not graphs:
        dit._steps._graphs = None  # type: ignore[union-attr]
    dit.submit(job, job.request_id, lambda event: None)
    return [scene.turn(dit) for _ in range(3)][-1]


def decode_of(scene: Stage, texts: int, graphs: bool = True, adapter: bool = False, **sampling: Any) -> Tally:
    """A step of that many texts at once, whose prompts differ."""
    if not graphs:
        scene.stages.thinker._prefiller._graphs = None
    requests = [
        GenerationRequest(prompt=f"{number} " + PROMPT * 3, modality="text", max_tokens=64, **sampling)
        for number in range(texts)
    ]
    if adapter:
        requests = [adapted(scene, request) for request in requests[:1]] + [
            msgspec.structs.replace(request, lora="style") for request in requests[1:]
        ]
    jobs = [scene.think(request) for request in requests]
    thinker = scene.stages.thinker
    scene.until(thinker, lambda: all(run.decoders for run in thinker._running) and len(thinker._running) == texts)
    assert not any(job.done.done() for job in jobs)
    return [scene.turn(thinker) for _ in range(4)][-1]


def encoding_of(scene: Stage, side: int) -> Tally:
    """The turn of the thinker that encodes an image to edit for the DiT."""
    job = scene.think(edit(side))
    turns = scene.until(scene.stages.thinker, job.done.done)
    return max(turns, key=lambda turn: turn.kernels["convolution"])


def pixels_of(scene: Stage, side: int) -> Tally:
    """Decoding an image whole."""
    decoder = scene.stages.decoder
    decoder._config = msgspec.structs.replace(decoder._config, use_tiling=False)
    latents = Latents(torch.empty((side // 16) ** 2, 64, device=GPU), side // 16, side // 16)
    decoder.submit(latents, "image", lambda event: None)
    return scene.turn(decoder)
