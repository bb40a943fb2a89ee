"""What a step holds for a moment is what was estimated."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bagel_triton.kv.store import WorkspaceStep, store_shape
from bagel_triton.model.attention import QuerySpan
from bagel_triton.model.autoencoder import Autoencoder, decode, encode
from bagel_triton.model.config import LanguageConfig
from bagel_triton.model.cpu import row_stable
from bagel_triton.model.cpu import strip_decoder as strips
from bagel_triton.model.cpu.executor import CpuExecutor
from bagel_triton.model.cpu.row_decoder import decode_by_rows
from bagel_triton.model.cpu.thread_pool import ThreadPool
from bagel_triton.model.device import Placement
from bagel_triton.model.mot import PackedBatch, Transformer, rotary_tables
from bagel_triton.model.quantization import FORMS, quantize
from bagel_triton.protocol.messages import KVGeometry
from bagel_triton.serving import activations

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def peak_bytes(work: Callable[[], object], folder: Path) -> int:
    """The most that ``work`` holds at a time beyond what there was."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def forward_peak(
    folder: Path, transformer: Transformer, rows: int, sequences: int, threads: int, markers: int = 8, past: int = 512
) -> int:
    """Of one forward of ``sequences`` of ``rows``, by the executor's threads; by none, the plain forward, a GPU's."""
    language, dtype = transformer.config, transformer.norm.weight.dtype
    geometry = KVGeometry(language.num_layers, language.num_kv_heads, language.head_dim, 16, "float32")
    stores = [torch.zeros(store_shape(geometry, past + rows), dtype=dtype) for _ in range(sequences)]
    spans = [QuerySpan(index * rows, (index + 1) * rows, index, causal=False) for index in range(sequences)]
    kv = WorkspaceStep(spans, stores, [[(span.start, span.stop, past)] for span in spans])
    tokens = rows * sequences
    pool = ThreadPool(max(threads, 1))
    run = CpuExecutor(transformer, pool) if threads else transformer

    def forward() -> torch.Tensor:
        cos, sin = rotary_tables(torch.arange(tokens), language, dtype)
        embeddings = torch.ones(tokens, language.hidden_size, dtype=dtype)
        return run(embeddings, PackedBatch(tokens - markers, cos, sin), kv)

    try:
        return peak_bytes(forward, folder)
    finally:
        pool.close()


# Threads need not be at their peaks at the same time.
@pytest.mark.parametrize(
    ("dtype", "threads", "least", "name"),
    [
        (torch.float32, 0, 0.95, ""),
        *((dtype, 1, 0.95, name) for dtype in (torch.float32, torch.bfloat16) for name in ("", *FORMS)),
        *((dtype, 2, 0.65, name) for dtype in (torch.float32, torch.bfloat16) for name in ("", "nf4")),
    ],
)
def test_a_forward_takes_what_was_estimated(tmp_path: Path, dtype: torch.dtype, threads: int, least: float, name: str):
    language, form = LanguageConfig(256, 704, 2, 8, 2, 32, 64, 1e6, 1e-6), FORMS.get(name)
    transformer = Transformer(language).requires_grad_(False).to(dtype)
    if form is not None:
        quantize(transformer, form)
    rows, sequences = 256, 6
    peak = forward_peak(tmp_path, transformer, rows, sequences, threads)  # both experts take part
    placement = Placement(CPU if threads else CUDA, dtype)
    estimated = activations.forward_bytes(language, rows * sequences, placement, threads, form, span=rows)
    if dtype == torch.bfloat16 and not name:
        least -= 0.05  # torch does not count oneDNN's copies
    assert least * estimated < peak < 1.05 * estimated


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize(
    ("rows", "past"),
    [
        (4098, 16),  # heads with the same keys do not fit a thread's scratch memory together
        (112, 0),  # a tile is several products
    ],
)
def test_one_thread_of_other_sizes_takes_what_was_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, past: int, amd: bool
):
    """With the products, and the attention, of either processor."""
    monkeypatch.setattr(row_stable, "_is_amd", lambda: amd)
    language = LanguageConfig(256, 704, 1, 28, 4, 32, 64, 1e6, 1e-6)
    transformer = Transformer(language).requires_grad_(False)
    peak = forward_peak(tmp_path, transformer, rows, 1, 1, markers=0, past=past)
    estimated = activations.forward_bytes(language, rows, Placement(CPU, torch.float32), 1)
    assert 0.95 * estimated < peak < 1.05 * estimated


def autoencoder_of(widths: list[int], encoder_blocks: int, decoder_blocks: int) -> Autoencoder:
    """One with random weights."""
    shapes = {f"decoder.up.{level}.block.0.conv1.weight": (width,) for level, width in enumerate(widths)}
    shapes |= {f"decoder.up.0.block.{index}.conv1.weight": (widths[0],) for index in range(decoder_blocks)}
    shapes |= {f"encoder.down.0.block.{index}.conv1.weight": (widths[0],) for index in range(encoder_blocks)}
    return Autoencoder({**shapes, "decoder.conv_out.weight": (3,), "decoder.conv_in.weight": (widths[-1], 16)})


@pytest.mark.parametrize(
    ("widths", "blocks", "size"),
    [
        ([32, 64, 128, 128], (2, 3), (256, 128)),  # the published one, narrower
        ([32, 64, 128, 128], (2, 3), (512, 512)),
        ([32, 64, 128, 128], (2, 3), (48, 1024)),
        ([32, 32, 64, 64], (1, 2), (128, 256)),
        ([64, 64, 64, 64], (1, 1), (128, 128)),
    ],
)
def test_the_autoencoder_takes_what_was_estimated(
    tmp_path: Path, widths: list[int], blocks: tuple[int, int], size: tuple[int, int]
):
    autoencoder, (height, width) = autoencoder_of(widths, *blocks), size
    latent, pixels = torch.ones(1, 16, height // 8, width // 8), torch.ones(height, width, 3)
    decoding = peak_bytes(lambda: decode(autoencoder, latent, partial(decode_by_rows, autoencoder.decoder)), tmp_path)
    assert decoding == pytest.approx(activations.decode_bytes(autoencoder.decoder, height, width), rel=0.1)
    encoding = peak_bytes(lambda: encode(autoencoder, pixels), tmp_path)
    assert encoding == pytest.approx(activations.encode_bytes(autoencoder.encoder, height, width), rel=0.1)


@pytest.mark.parametrize("widths", [[32, 64, 128, 128], [32, 32, 64, 64]])
def test_strips_take_what_was_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widths: list[int]):
    monkeypatch.setattr(strips, "ROWS", 8)
    monkeypatch.setattr(strips, "WORTH_IT", 0)
    decoder, latent = autoencoder_of(widths, 2, 3).decoder, torch.ones(1, 16, 32, 16)
    peak = peak_bytes(lambda: strips.decode_in_strips(decoder, latent), tmp_path)
    assert peak == pytest.approx(activations.decode_bytes(decoder, 256, 128, tiled=True), rel=0.1)
    assert peak < 0.8 * activations.decode_bytes(decoder, 256, 128)
