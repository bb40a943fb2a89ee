"""Every way in which ranks share a stage, over NCCL on two GPUs: what one rank computes.

A forward of two branches is cut as rank 0 cuts it, and each rank compares its rows with those of the whole. Then whole
stages, whose other ranks are processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
from bagel_triton.engine import vae
from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.mot import rotary_tables
from bagel_triton.parallel import rank as ranks
from bagel_triton.parallel.launch import LOOPBACK
from bagel_triton.parallel.layout import StoresLayout, by_sequence, parts_of
from bagel_triton.parallel.patches import RankDecoder
from bagel_triton.parallel.rank import RankModel
from bagel_triton.parallel.sizes import Sizes
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.weights.checkpoint import Checkpoint
from tests.parity.test_text2img import MIXED
from tests.support.killing import arguments, descendants
from tests.support.runs import generate_together, result_of
from tests.support.waiting import soon

RANKS = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"ranks over NCCL need {RANKS} CUDA devices"),
]
MODES = {
    "tensor": Sizes(tensor=RANKS),
    "guidance": Sizes(cfg=RANKS),
    "ulysses": Sizes(ulysses=RANKS),
    "hsdp": Sizes(cfg=RANKS, shard=RANKS),
}
TEXT = GenerationRequest(prompt="Describe a cat", modality="text", max_tokens=24)
PAST, LATENTS, VISION = 5, 6, 2  # tokens of each of two branches: kept before, and in a step
ROWS = 2 * (LATENTS + VISION)


def two_branches() -> StoresLayout:
    """[latents of both | vision tokens of both], each branch with a store of its own."""
    spans, writes = [], []
    for branch in range(2):
        gen = branch * LATENTS, (branch + 1) * LATENTS
        und = 2 * LATENTS + branch * VISION, 2 * LATENTS + (branch + 1) * VISION
        spans += [QuerySpan(*gen, branch, False), QuerySpan(*und, branch, False)]
        writes.append(((*gen, PAST), (*und, PAST + LATENTS)))
    return StoresLayout(ROWS, 2 * LATENTS, None, tuple(spans), (0, 1), tuple(writes))


def join(rank: int, meeting: str, kind: str) -> tuple[torch.device, torch.Generator]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    ranks.join(dist.FileStore(meeting, RANKS), LOOPBACK, device, rank, RANKS, 120.0)
    ranks.selftest(device)
    return device, torch.Generator().manual_seed(0)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@torch.inference_mode()
def forward(rank: int, meeting: str, checkpoint: str, sizes: Sizes, kind: str) -> None:
    """A rank: its part of a forward is that of one rank."""
    device, generator = join(rank, meeting, kind)
    model = Checkpoint(checkpoint).load_bagel(device, torch.float32)
    config, layout = model.config.language, two_branches()
    slots = PAST + LATENTS + VISION
    shape = 2, config.num_layers, 2, slots, config.num_kv_heads, config.head_dim
    stores = torch.randn(shape, generator=generator).to(device)
    embeddings = torch.randn(ROWS, config.hidden_size, generator=generator).to(device)
    cos, sin = rotary_tables(torch.arange(ROWS, device=device), config, torch.float32)
    whole = model.language_model.model(embeddings, layout.batch(cos, sin), layout.kv([*stores.clone()]))

    ranked = RankModel(model, sizes, ThreadPool(1), device)
    cut = [(layout, None)] if sizes.cfg == 1 else [*by_sequence(layout, sizes.cfg)]
    part = parts_of(cut, sizes)[rank]
    own = {number: ranked.own_heads(stores[number]).contiguous() for number in range(2)}
    assert isinstance(part.layout, StoresLayout)
    arranged = ranked.arranged(part.layout, part.of(cos), part.of(sin), part.layout.kv(own))
    same(ranked.forward(part.of(embeddings), arranged), part.of(whole))
    dist.destroy_process_group()


@torch.inference_mode()
def decode(rank: int, meeting: str, checkpoint: str, kind: str) -> None:
    """A rank: on the first the image is that of the plain decoder."""
    device, generator = join(rank, meeting, kind)
    decoder = Checkpoint(checkpoint).load_autoencoder(device, torch.float32).decoder
    z = torch.randn(1, 16, 13, 6, generator=generator) * torch.linspace(0.1, 3, 13)[:, None]
    found = RankDecoder(decoder, RANKS, ThreadPool(1)).decode(z.to(device))
    if rank == 0:
        same(found, decoder(z.to(device)))
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_compute_what_one_does(checkpoint_dir: Path, tmp_path: Path, mode: str) -> None:
    arguments = str(tmp_path / "meeting"), str(checkpoint_dir), MODES[mode], "cuda"
    multiprocessing.spawn(forward, arguments, RANKS)


def test_two_ranks_decode_what_one_does(checkpoint_dir: Path, tmp_path: Path) -> None:
    multiprocessing.spawn(decode, (str(tmp_path / "meeting"), str(checkpoint_dir), "cuda"), RANKS)


STAGES = {
    "tensor": {"thinker": ThinkerConfig(tensor_parallel_size=RANKS), "dit": DitConfig(tensor_parallel_size=RANKS)},
    "guidance": {"dit": DitConfig(cfg_parallel_size=RANKS)},
    "ulysses": {"dit": DitConfig(ulysses_degree=RANKS)},
    "hsdp": {"dit": DitConfig(use_hsdp=True, hsdp_shard_size=RANKS)},
    "vae": {"vae_decode": VaeDecodeConfig(patch_parallel_size=RANKS)},
}


@pytest.mark.parametrize("mode", STAGES)
def test_stages_on_two_gpus_answer_as_on_one(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """In float32 everywhere: one GPU would decode in bfloat16, and ranks, which are processes, convolve in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setattr(vae, "whole_images_on", lambda device, network: network)
    one = DeployConfig(checkpoint=str(checkpoint_dir), device="cuda:0", dtype="float32")
    found, texts = [], []
    for config in (one, msgspec.structs.replace(one, **STAGES[mode])):
        stages = LocalStages(config)
        try:
            found.append(generate_together(stages, MIXED))
            plan = result_of(stages.expand(TEXT))
            texts.append(result_of(stages.think(plan)).answers[0].content)
        finally:
            stages.close()
    for expected, several in zip(*found, strict=True):
        for before, pixels in zip(expected.pixels, several.pixels, strict=True):
            assert int((pixels.int() - before.int()).abs().max()) <= 1
    assert texts[0] == texts[1]


def stages_at_work(checkpoint: str, device: str) -> LocalStages:
    """Stages whose DiT's ranks are in the middle of an image's steps."""
    stages = LocalStages(DeployConfig(checkpoint, device=device, dtype="float32", dit=DitConfig(ulysses_degree=RANKS)))
    request = GenerationRequest(prompt="x", height=64, width=64, num_inference_steps=1000)
    job = result_of(stages.think(result_of(stages.expand(request)))).job
    assert job is not None
    stepped = threading.Event()
    stages.dit.submit(job, job.request_id, lambda event: stepped.set(), job.scheduling)
    assert stepped.wait(120)
    return stages


def end_and_start_anew(checkpoint: str, device: str) -> None:
    """As a sleep does: what the GPUs had queued keeps no rank from its end, and new ranks meet in this process."""
    for _ in range(2):
        stages_at_work(checkpoint, device).close()


def lose_a_rank(checkpoint: str, device: str) -> None:
    """The engine's thread may wait for its GPU then, for ever: the process ends without it."""
    stages = stages_at_work(checkpoint, device)
    (other,) = (pid for pid in descendants(os.getpid()) if "bagel_triton.parallel.worker" in arguments(pid))
    os.kill(other, signal.SIGKILL)
    os._exit(0 if soon(lambda: stages.is_lost, 60) else 1)


@pytest.mark.parametrize("scene", [end_and_start_anew, lose_a_rank])
def test_ranks_end_in_the_middle_of_a_step(checkpoint_dir: Path, scene: Callable[[str, str], None]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=scene, args=(str(checkpoint_dir), "cuda:0"))
    process.start()
    process.join(400)
    with contextlib.suppress(OSError):
        process.kill()
    assert process.exitcode == 0
