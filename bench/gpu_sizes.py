"""``python -m bench.gpu_sizes``: what fits a GPU of which size, by the geometry of the published checkpoint.

The plan is the server's own. A checkpoint of the published shapes takes no disk: its files have headers alone, with
holes in place of the data.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch

from bagel_triton.deploy.config import ALL_LAYERS_GB, DeployConfig, DitConfig, Quantization, ThinkerConfig
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.device import Placement
from bagel_triton.serving import memory_plan
from bagel_triton.weights.checkpoint import Checkpoint, stored_tensors
from bagel_triton.weights.folder import AUTOENCODER_FILE, INDEX_FILE, WEIGHTS_FILE
from bench.gpu import AUTOENCODER_WIDTHS, PUBLISHED, autoencoder_shapes

SIZES = (12, 16, 24, 32, 48, 80)  # GB as cards are sold: GiB of memory
DRIVER = 0.03  # of a card's memory that no process gets
FORMS: tuple[Quantization | None, ...] = (None, "int8", "nf4")
SIDES = (512, 1024)
MOST = 4  # images; the default is 8
LEAST_TOKENS, CHUNK = 16384, 2048  # of the KV cache pool, and of one prefill
TINY = Path(__file__).parents[1] / "tests" / "data" / "tiny-a"
GPU = Placement(torch.device("cuda"), torch.bfloat16)


def write_published(folder: Path) -> None:
    """A checkpoint of the published shapes in ``folder``, without data."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX_FILE))
    language, vit = PUBLISHED.language, PUBLISHED.vit
    said: dict[str, dict[str, object]] = {
        "llm_config.json": {
            "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "num_hidden_layers": language.num_layers,
            "num_attention_heads": language.num_heads,
            "num_key_value_heads": language.num_kv_heads,
            "vocab_size": language.vocab_size,
        },
        "vit_config.json": {
            "hidden_size": vit.hidden_size,
            "intermediate_size": vit.intermediate_size,
            "num_hidden_layers": vit.num_layers + 1,
            "num_attention_heads": vit.num_heads,
        },
    }
    for name, fields in said.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with torch.device("meta"):
        bagel, autoencoder = Bagel(PUBLISHED), Autoencoder(autoencoder_shapes(PUBLISHED, AUTOENCODER_WIDTHS))
    tensors: dict[str, tuple[int, ...]] = {}
    for name, tensor in bagel.state_dict().items():
        tensors |= stored_tensors(name, tuple(tensor.shape), language)
    _write_sparse(folder / WEIGHTS_FILE, tensors, "BF16", 2)
    shapes = {name: tuple(tensor.shape) for name, tensor in autoencoder.state_dict().items()}
    _write_sparse(folder / AUTOENCODER_FILE, shapes, "F32", 4)


def _write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, itemsize: int) -> None:
    # In the order of names and aligned, as safetensors itself writes it.
    header, end = {}, 0
    for name, shape in sorted(shapes.items()):
        size = torch.Size(shape).numel() * itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(file.tell() + end)


def needed(checkpoint: Checkpoint, form: Quantization | None, side: int, images: int, offload_gb: float = 0.0) -> int:
    """Bytes that ``bagel_single_stage`` takes on a GPU with a small KV cache pool, and layers in the host's memory."""
    thinker = ThinkerConfig(
        kv_tokens=LEAST_TOKENS, max_num_batched_tokens=CHUNK, quantization=form, cpu_offload_gb=offload_gb
    )
    parts = {"thinker": thinker, "dit": DitConfig(max_num_seqs=images, quantization=form)}
    config = DeployConfig(str(checkpoint.directory), pipeline="bagel_single_stage")
    return memory_plan.plan(checkpoint, msgspec.structs.replace(config, **parts), GPU, side, side).total


def most_images(checkpoint: Checkpoint, form: Quantization | None, side: int, offload_gb: float = 0.0) -> list[int]:
    """For each of ``SIZES``: how many images of ``side`` x ``side`` can be denoised together, at most ``MOST``.

    The server takes no larger ones.
    """
    checkpoint = Checkpoint(checkpoint.directory, most_pixels=side**2)
    totals = [needed(checkpoint, form, side, count, offload_gb) for count in range(1, MOST + 1)]
    return [sum(total <= int(size * (1 - DRIVER) * 2**30) for total in totals) for size in SIZES]


def table(checkpoint: Checkpoint) -> str:
    """In Markdown: for each size of a GPU, the images that each form leaves room for."""
    names = ["bfloat16" if form is None else form for form in FORMS]
    kinds = [(name, form, 0.0) for name, form in zip(names, FORMS, strict=True)]
    kinds.append(("bfloat16 and all layers offloaded", None, ALL_LAYERS_GB))
    heads = [f"{name}, {side}x{side}" for name, _, _ in kinds for side in SIDES]
    rows = [["GPU", *heads], ["---"] * (1 + len(heads))]
    columns = [most_images(checkpoint, form, side, offload_gb) for _, form, offload_gb in kinds for side in SIDES]
    for size, *counts in zip(SIZES, *columns, strict=True):
        rows.append([f"{size} GB", *(str(count) if count else "-" for count in counts)])
    return "\n".join(f"| {' | '.join(row)} |" if row[0] != "---" else f"|{'|'.join(row)}|" for row in rows)


def offloads(checkpoint: Checkpoint) -> str:
    """What offloading takes of the host, and how few images of 512x512 a small GPU has room for with it."""
    said = []
    for form in FORMS:
        host, slots = checkpoint.offloaded_bytes(GPU.torch_dtype, form, ALL_LAYERS_GB)
        small = Checkpoint(checkpoint.directory, most_pixels=min(SIDES) ** 2)
        least = needed(small, form, min(SIDES), 1, ALL_LAYERS_GB)
        said.append(
            f"{form or 'bfloat16'}: {host / 2**30:.1f} GiB on the host, {slots / 2**30:.2f} GiB of slots, "
            f"one image of 512x512 from {least / 2**30:.1f} GiB"
        )
    return "; ".join(said)


def several(checkpoint: Checkpoint) -> str:
    """The least sizes of two and of four GPUs that share the heads of one image of 512x512, and of 1024x1024."""
    found = []
    for side, ranks, word in ((side, *ranks) for ranks in ((2, "two"), (4, "four")) for side in SIDES):
        sized = Checkpoint(checkpoint.directory, most_pixels=side**2)
        thinker = ThinkerConfig(kv_tokens=LEAST_TOKENS, max_num_batched_tokens=CHUNK, tensor_parallel_size=ranks)
        config = DeployConfig(str(checkpoint.directory), pipeline="bagel_single_stage", device="cuda:0")
        config = msgspec.structs.replace(
            config, thinker=thinker, dit=DitConfig(max_num_seqs=1, tensor_parallel_size=ranks)
        )
        total = memory_plan.plan(sized, config, GPU, side, side).total
        least = next(size for size in SIZES if total <= int(size * (1 - DRIVER) * 2**30))
        found.append(f"{word} of {least} GB for {side}x{side} ({total / 2**30:.1f} GiB on the first)")
    return ", ".join(found)


def texts(directory: Path) -> str:
    """For each form, the least size of a GPU on which a server that only understands fits."""
    checkpoint, found = Checkpoint(directory, load="understanding"), []
    for form in FORMS:
        thinker = ThinkerConfig(kv_tokens=LEAST_TOKENS, max_num_batched_tokens=CHUNK, quantization=form)
        config = DeployConfig(str(directory), thinker=thinker, dit=DitConfig(quantization=form), load="understanding")
        total = memory_plan.plan(checkpoint, config, GPU, max(SIDES), max(SIDES)).total
        least = next(size for size in SIZES if total <= int(size * (1 - DRIVER) * 2**30))
        found.append(f"{least} GB in {form or 'bfloat16'} ({total / 2**30:.1f} GiB)")
    return ", ".join(found)


def main() -> None:
    """Print the table, and what texts alone need."""
    with tempfile.TemporaryDirectory(prefix="bagel_triton_") as folder:
        write_published(Path(folder) / "published")
        print(table(Checkpoint(Path(folder) / "published")))
        print(f"\nAll layers offloaded: {offloads(Checkpoint(Path(folder) / 'published'))}")
        print(f"\nSeveral GPUs: {several(Checkpoint(Path(folder) / 'published'))}")
        print(f"\nTexts alone: {texts(Path(folder) / 'published')}")


if __name__ == "__main__":
    main()
