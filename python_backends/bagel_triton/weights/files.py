"""The files of a checkpoint folder in the published layout, read by their headers alone."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import safetensors
from safetensors import SafetensorError

from bagel_triton.model.config import (
    CheckpointError,
    Fields,
    LanguageConfig,
    LatentConfig,
    ModelConfig,
    VitConfig,
    read_resize_rule,
)
from bagel_triton.model.image import VAE_RULE, VIT_RULE
from bagel_triton.weights import validation
from bagel_triton.weights.folder import (
    AUTOENCODER_FILE,
    CONFIG_FILES,
    INDEX_FILE,
    WEIGHTS_FILE,
    check_folder,
    index_files,
)
from bagel_triton.weights.quantized_files import stored_form

# The request planner imports this module, and starts sooner and smaller without torch.
if TYPE_CHECKING:
    from torch import Tensor

LANGUAGE_LAYERS = "language_model.model.layers."
VIT_LAYERS = "vit_model.vision_model.encoder.layers."
POSITIONS = "latent_pos_embed.pos_embed"
# Of safetensors' names of dtypes those that weights and codes have.
TORCH_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "I32": "int32",
    "I8": "int8",
}
_libc = ctypes.CDLL(None)
_MAX_HEADER = 100_000_000  # bytes, as in safetensors


@dataclass(frozen=True)
class FileIdentity:
    """One state of a checkpoint's file."""

    path: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The identity of the file at ``path``, as it is now."""
        status = path.stat()
        return cls(str(path.resolve()), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor: bytes ``start`` to ``stop`` of ``path``. ``dtype`` is safetensors' name for it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFiles:
    """Named tensors spread over memory-mapped safetensors files.

    Raises:
        CheckpointError: a file is missing or is not safetensors.
    """

    def __init__(self, files: list[Path]) -> None:
        self._stored: dict[str, StoredTensor] = {}
        self._mapped: dict[Path, Tensor] = {}
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{path} does not exist")
            _check_header(path)
            for name, stored in _header(path).items():
                if name in self._stored:
                    raise CheckpointError(f"{path} has the tensor {name}, and so has {self.file(name)}")
                self._stored[name] = stored
        self._files = files
        self.identity = tuple(FileIdentity.of(path) for path in files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by tensor name, from the headers alone."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def dtype(self, name: str) -> str:
        """The stored dtype of the tensor called ``name``, as safetensors calls it, from the header alone."""
        return self._stored[name].dtype

    def file(self, name: str | None = None) -> str:
        """The path of the file that holds the tensor ``name``, or of the only file, or of the folder of several."""
        if name is not None:
            return str(self._stored[name].path)
        return str(self._files[0] if len(self._files) == 1 else self._files[0].parent)

    def dtypes(self, names: Sequence[str]) -> set[str]:
        """The stored dtypes of the tensors ``names``, as safetensors calls them, from the headers alone."""
        return {self._stored[name].dtype for name in names}

    def tensor(self, name: str) -> Tensor:
        """The tensor called ``name``, in its stored dtype. Mapped, not copied."""
        stored = self._stored[name]
        return self._view(stored, stored.stop, stored.shape)

    def adjoin(self, names: Sequence[str]) -> bool:
        """Whether the tensors ``names`` follow one another in one file, so that they can be mapped as one."""
        stored = [self._stored[name] for name in names]
        itemsize = max((stored[0].stop - stored[0].start) // max(math.prod(stored[0].shape), 1), 1)
        return stored[0].start % itemsize == 0 and all(
            (one.path, one.dtype, one.stop) == (other.path, other.dtype, other.start) for one, other in pairwise(stored)
        )

    def stacked(self, names: Sequence[str]) -> Tensor:
        """Tensors that :meth:`adjoin`, as one: the second's rows below the first's, and so on. Mapped, not copied."""
        first, last = self._stored[names[0]], self._stored[names[-1]]
        rows = sum(self._stored[name].shape[0] for name in names)
        return self._view(first, last.stop, (rows, *first.shape[1:]))

    def _view(self, first: StoredTensor, stop: int, shape: tuple[int, ...]) -> Tensor:
        """The bytes from the ``first`` tensor's on up to ``stop``, as a tensor of its dtype.

        safetensors' own ``get_tensor`` loses two integers at each call, 40 KiB each time that the toy's stages wake
        from a sleep of level 2.
        """
        import torch

        if first.path not in self._mapped:
            with first.path.open("rb") as file:
                self._mapped[first.path] = map_read_only(file.fileno())
        # A part of the storage, as a view of the tensor would have to begin at a multiple of the dtype's size.
        contents = self._mapped[first.path].untyped_storage()[first.start : stop]
        return torch.empty(0, dtype=getattr(torch, TORCH_DTYPES[first.dtype])).set_(contents).view(shape)


def map_read_only(descriptor: int) -> Tensor:
    """The open file's bytes, read-only: uint8 [size]."""
    import torch

    mapping = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(mapping, dtype=torch.uint8)


def drop_pages(tensors: Iterable[Tensor]) -> None:
    """Give back the pages of ``tensors`` that are mapped from files; they can be read again, from the page cache.

    Else a process that converts or quantises a checkpoint would hold as much of the file as the kernel lets it.
    """
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            ranges.append([int(address, 16) for address in addresses.split("-")])
    for tensor in tensors:
        start, size = tensor.data_ptr(), tensor.nbytes
        first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end and any(low <= start and start + size <= high for low, high in ranges):
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a valid safetensors file, which is a length, that many bytes of JSON, and the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    data = 8 + length
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), *(data + at for at in entry["data_offsets"]))
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _check_header(path: Path) -> None:
    try:
        safetensors.safe_open(str(path), framework="numpy")  # unlike torch's, this mapping reserves no memory
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} {_cut_off(path) or f'cannot be opened as safetensors: {error}'}") from error


def _cut_off(path: Path) -> str | None:
    """The part that a truncated file lacks; None if it is as long as its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length)) if length < _MAX_HEADER else {}
        size = 8 + length + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    held = path.stat().st_size
    return f"is cut off: it has {held} of {size} bytes; download it again" if held < size else None


class CheckpointFiles:
    """A checkpoint folder whose files exist and agree with its configuration; shapes are not checked.

    ``most_pixels`` bounds its images: see :meth:`ModelConfig.limited`.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """

    def __init__(self, directory: str | Path, most_pixels: int | None = None) -> None:
        self.directory = Path(directory)
        check_folder(self.directory)
        model, language, vit = (_fields(self.directory / name) for name in CONFIG_FILES)
        self.stored_form = stored_form((model, language))
        self.weights = TensorFiles(_weight_files(self.directory))
        self.autoencoder = TensorFiles([self.directory / AUTOENCODER_FILE])
        validation.check_kind(self.weights, validation.BAGEL_PARTS, validation.BAGEL_TENSOR, self.stored_form)
        validation.check_kind(self.autoencoder, validation.AUTOENCODER_PARTS, validation.AUTOENCODER_TENSOR)
        shapes = self.weights.shapes()
        if not shapes.get(POSITIONS):
            raise CheckpointError(f"{self.weights.file()} has no tensor {POSITIONS} of two dimensions")
        self.config = ModelConfig(
            language=LanguageConfig.read(language),
            latent=LatentConfig.read(model, shapes[POSITIONS][0]),
            vit=VitConfig.read(vit, model, validation.layer_count(shapes, VIT_LAYERS)),
            vae_resize=read_resize_rule(model, "vae_image_transform", VAE_RULE),
            vit_resize=read_resize_rule(model, "vit_image_transform", VIT_RULE),
        )
        if most_pixels is not None:
            self.config = self.config.limited(most_pixels)
        held, said = validation.layer_count(shapes, LANGUAGE_LAYERS), self.config.language.num_layers
        if held != said:
            raise CheckpointError(f"llm_config.json: num_hidden_layers={said}, and the checkpoint holds {held}")


def _weight_files(directory: Path) -> list[Path]:
    if (directory / INDEX_FILE).is_file():
        files = [directory / name for name in index_files(directory / INDEX_FILE)]
        # An index that names shards of another download does not hide the single file.
        if all(path.is_file() for path in files) or not (directory / WEIGHTS_FILE).is_file():
            return files
    return [directory / WEIGHTS_FILE]


def _fields(path: Path) -> Fields:
    return Fields(path.name, _read_json(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return fields
