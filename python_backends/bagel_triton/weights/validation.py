"""Whether stored tensors are those of BAGEL: their dtypes, names and shapes from the headers, and their values.

A checkpoint that is not what it seems would be served as noise, so everything that is not known is
refused. Headers are checked before a server starts. Values are checked while the weights are loaded,
all of them: a loader reads every byte anyway, and the check takes about 0.2 s a GB.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bagel_triton.model.config import CheckpointError
from bagel_triton.weights.folder import HUB_NAME
from bagel_triton.weights.quantized_files import USE_DENSE, StoredForm, maker

# The request planner imports this module, and starts sooner and smaller without torch.
if TYPE_CHECKING:
    from torch import Tensor

SCALE = "weight_scale"
DTYPES = ("BF16", "F16", "F32", "F64")
# Tensors of a complete checkpoint; a fine-tune of some networks may hold those alone.
BAGEL_PARTS = (
    "language_model.",
    "vit_model.",
    "connector.",
    "vit_pos_embed.pos_embed",
    "time_embedder.",
    "vae2llm.",
    "llm2vae.",
    "latent_pos_embed.pos_embed",
)
AUTOENCODER_PARTS = ("encoder.", "decoder.")
BAGEL_TENSOR = "language_model.model.embed_tokens.weight"
AUTOENCODER_TENSOR = "decoder.conv_in.weight"
_ADAPTER = re.compile(r"\blora_|\bhada_w|\bdora_|_lora\b")
# Buffers that some training code saves, and SigLIP's head, which BAGEL does not use.
_UNUSED = re.compile(r".*\.(?:rotary_emb\.inv_freq|position_ids|weight_shape)|vit_model\.vision_model\.head\..*")
_EXPONENTS: dict[str, tuple[str, type[np.unsignedinteger[Any]], int]] = {
    # By torch's dtype: the integers to view it as, and all bits of the exponent, which NaN and infinity have set.
    "torch.bfloat16": ("int16", np.uint16, 0x7F80),
    "torch.float16": ("int16", np.uint16, 0x7C00),
    "torch.float32": ("int32", np.uint32, 0x7F800000),
    "torch.float64": ("int64", np.uint64, 0x7FF0000000000000),
    "torch.float8_e4m3fn": ("int8", np.uint8, 0x7F),  # which has no infinity, and NaN with all bits set
}
_CHUNK = 1 << 18  # values; what is computed from them stays in the cache


class Headers(Protocol):
    """Contents of the weight files' headers."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by tensor name."""

    def dtype(self, name: str) -> str:
        """The stored dtype of a tensor, as safetensors calls it."""

    def file(self, name: str | None = None) -> str:
        """The name of the file that holds a tensor, or of all files."""


def check_kind(headers: Headers, parts: Sequence[str], known: str, form: StoredForm | None = None) -> None:
    """Refuse tensors that are quantised, an adapter's, or named with a prefix, and files without one of ``parts``.

    ``known`` is a tensor that every checkpoint has. The tensors of a quantised ``form`` are left to
    :func:`check_tensors`.

    Raises:
        CheckpointError: names the file and the tensor, and what to use instead.
    """
    names = headers.shapes()
    for name in names:
        if _UNUSED.fullmatch(name):
            continue
        if _ADAPTER.search(name):
            raise CheckpointError(
                f"{headers.file(name)} holds an adapter (tensor {name}); merge it into the weights that it adapts"
            )
        if form is not None and (name.endswith((form.weight, SCALE)) or headers.dtype(name) == form.dtype):
            continue
        if (who := maker(name)) is not None:
            raise CheckpointError(
                f"{headers.file(name)}: tensor {name} belongs to weights quantised by {who}; {USE_DENSE}"
            )
        if headers.dtype(name) not in DTYPES:
            raise CheckpointError(
                f"{headers.file(name)}: tensor {name} is stored as {headers.dtype(name)}; "
                f"allowed: {', '.join(DTYPES)}; {USE_DENSE}"
            )
    if known not in names and (prefixed := next((name for name in names if name.endswith(f".{known}")), None)):
        prefix = prefixed.removesuffix(known)
        raise CheckpointError(
            f"{headers.file(prefixed)}: names of tensors begin with {prefix!r}, as in {prefixed}; save them without it"
        )
    absent = [part for part in parts if not any(name.startswith(part) for name in names)]
    if 0 < len(absent) < len(parts):
        listed = ", ".join(f"{part}*" if part.endswith(".") else part for part in absent)
        raise CheckpointError(
            f"{headers.file()} has no tensors {listed}; the server needs all of the model: "
            f"take them from the checkpoint that this one was tuned from, such as {HUB_NAME}"
        )
    if absent:
        first = f"; its first is {next(iter(names))}" if names else ""
        raise CheckpointError(f"{headers.file()} has no tensor of BAGEL, such as {known}{first}")


def check_tensors(
    headers: Headers, expected: Mapping[str, tuple[int, ...]], coded: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> None:
    """Refuse files whose tensors have not the ``expected`` names and shapes, and the dtypes of those in ``coded``.

    Raises:
        CheckpointError: names the file and the first tensor that is wrong, and the nearest name.
    """
    shapes = headers.shapes()
    extra = [name for name in shapes if name not in expected and not _UNUSED.fullmatch(name)]
    if missing := [name for name in expected if name not in shapes]:
        raise CheckpointError(
            f"{headers.file()} has no tensor {missing[0]}{_more(missing)}{_nearest(missing[0], extra)}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{headers.file(name)}: tensor {name} has shape {list(shapes[name])}; "
                f"the configuration files say {list(shape)}"
            )
        allowed = coded.get(name, DTYPES)
        if headers.dtype(name) not in allowed:
            raise CheckpointError(
                f"{headers.file(name)}: tensor {name} is stored as {headers.dtype(name)}; "
                f"allowed: {', '.join(allowed)}, by the quantization_config"
            )
    if extra:
        raise CheckpointError(
            f"{headers.file(extra[0])}: tensor {extra[0]}{_more(extra)} is not one of BAGEL's"
            f"{_nearest(extra[0], expected)}"
        )


def layer_count(names: Collection[str], prefix: str) -> int:
    """The number of layers ``prefix``0, ``prefix``1, ... that have tensors among ``names``.

    Raises:
        CheckpointError: a layer between others has none.
    """
    pattern = re.compile(rf"{re.escape(prefix)}(\d{{1,6}})\.")
    layers = {int(found[1]) for name in names if (found := pattern.match(name))}
    for index in range(len(layers)):
        if index not in layers:
            raise CheckpointError(f"the checkpoint has no tensors {prefix}{index}.*, and has layers after it")
    return len(layers)


class NotFinite(ValueError):
    """A source of ``parameter`` has NaN or infinite values."""

    def __init__(self, parameter: str) -> None:
        super().__init__(f"{parameter} has values that are NaN or infinite")
        self.parameter = parameter


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a contiguous ``tensor`` on the CPU is NaN or infinite; codes of integers never are."""
    if not tensor.is_floating_point():
        return True
    bits, exponent = _bits(tensor)
    scratch = np.empty(min(_CHUNK, len(bits)), bits.dtype)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        magnitude = scratch[: len(chunk)]
        np.bitwise_and(chunk, ~_sign(bits), out=magnitude)
        if magnitude.max() >= exponent:  # the bits of a float without its sign sort as its magnitude
            return False
    return True


def not_finite_at(tensor: Tensor) -> list[tuple[int, ...]]:
    """The indices of the values of ``tensor``, as for :func:`is_finite`, that are NaN or infinite."""
    bits, exponent = _bits(tensor)
    found = np.flatnonzero((bits & ~_sign(bits)) >= exponent)
    return [tuple(int(axis) for axis in np.unravel_index(index, tuple(tensor.shape))) for index in found]


def _bits(tensor: Tensor) -> tuple[NDArray[Any], Any]:
    import torch

    name, unsigned, exponent = _EXPONENTS[str(tensor.dtype)]
    bits = tensor.detach().reshape(-1).view(getattr(torch, name)).numpy().view(unsigned)
    return bits, unsigned(exponent)


def _sign(bits: NDArray[Any]) -> Any:
    return bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _nearest(name: str, others: Collection[str]) -> str:
    found = difflib.get_close_matches(name, others, n=1)
    return f"; nearest: {found[0]}" if found else ""
