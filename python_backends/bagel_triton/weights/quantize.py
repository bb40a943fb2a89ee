"""Writes a checkpoint whose transformer is quantised, in the format of :mod:`~bagel_triton.weights.quantized_files`.

The file is laid out so that a server maps it as it is: tensors of one parameter lie one after the other.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bagel_triton.model.config import CheckpointError
from bagel_triton.model.quantization import FORMS, SCALE, Form
from bagel_triton.weights.checkpoint import Checkpoint, quantized_layers, stored_tensors
from bagel_triton.weights.folder import AUTOENCODER_FILE, CONFIG_FILES, TOKENIZER_FILES, WEIGHTS_FILE
from bagel_triton.weights.layout import Quantized, Source, read_into, stored_of
from bagel_triton.weights.quantized_files import FIELD, StoredForm, config_of

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {**{dtype: name for name, dtype in _DTYPES.items()}, torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written. Bytes of two codes are called integers of eight in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        return self.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def alignment(self) -> int:
        return 4 if self.packed else self.dtype.itemsize

    def header(self, start: int) -> dict[str, Any]:
        """Its entry in the file's header, with its data at ``start``."""
        shape = [*self.shape[:-1], self.shape[-1] // 4] if self.packed else [*self.shape]
        dtype = "I32" if self.packed else _NAMES[self.dtype]
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + self.nbytes]}


def write(source: Path, target: Path, quantization: str, adapter: tuple[str, float] | None = None) -> int:
    """Write the checkpoint in ``source``, its transformer quantised, to ``target``; bytes of the weights' file.

    ``target`` is new or empty, and appears complete or not at all. One layer's rows are in memory at a time.

    Raises:
        CheckpointError: ``source`` is no good, or quantised already.
        FileExistsError: ``target`` holds something.
        OSError: it cannot be written.
    """
    checkpoint = Checkpoint(source, adapter)
    form = FORMS[quantization]
    if (stored := checkpoint.form(None)) is not None:
        raise CheckpointError(f"{source} is quantised already, as {stored.name}; take the weights it was made from")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder")
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        size = _write_weights(checkpoint, form, partial / WEIGHTS_FILE)
        copied = (*TOKENIZER_FILES, *CONFIG_FILES, AUTOENCODER_FILE, "generation_config.json")
        for name in copied:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        config = json.loads((source / "config.json").read_text("utf-8"))
        packed = form.bits == 4
        config[FIELD] = config_of(StoredForm(form.name, form.group if packed else None))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return size


def _write_weights(checkpoint: Checkpoint, form: Form, path: Path) -> int:
    parts = [*_parts(checkpoint, form)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    # The widest first, so that each lies at a multiple of its size; else in the order of the network.
    for entry in sorted((entry for _, entries in parts for entry in entries), key=lambda entry: -entry.alignment):
        places[entry.name], header[entry.name] = end, entry.header(end)
        end += entry.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    start = 8 + len(head)
    if (free := shutil.disk_usage(path.parent).free) < start + end:
        raise OSError(f"{path.parent.parent} has {free} bytes free; the weights need {start + end}")
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(start + end)
    contents = torch.from_file(str(path), shared=True, size=start + end, dtype=torch.uint8)
    for source, entries in parts:
        targets = [
            contents[start + places[entry.name] :][: entry.nbytes].view(entry.dtype).view(entry.shape)
            for entry in entries
        ]
        read_into(targets, source)
    return start + end


def _parts(checkpoint: Checkpoint, form: Form) -> Iterator[tuple[Source, list[_Entry]]]:
    """Each stored tensor, and what it is written as, in the order of the network."""
    plain, language = checkpoint.bagel(torch.float32), checkpoint.config.language
    layers = quantized_layers(checkpoint.bagel(torch.float32, form.name))
    stored = StoredForm(form.name)
    for parameter, tensor in plain.state_dict().items():
        layer, _, kind = parameter.rpartition(".")
        for name, shape in stored_tensors(parameter, tuple(tensor.shape), language).items():
            values = checkpoint.tensor(name)
            if layer not in layers or kind != "weight":
                yield values, [_Entry(name, shape, stored_of(values)[0].dtype)]
                continue
            (codes, codes_dtype), (scales, scale_dtype) = form.tensors(*shape).values()
            prefix = name.removesuffix("weight")
            yield (
                Quantized(form, values),
                [
                    _Entry(f"{prefix}{stored.weight}", codes, codes_dtype),
                    _Entry(f"{prefix}{SCALE}", scales, scale_dtype),
                ],
            )
