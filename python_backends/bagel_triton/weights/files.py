"""What a checkpoint folder in the published layout holds and says, by its files' headers alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import safetensors
from safetensors import SafetensorError

from bagel_triton.model.config import CheckpointError, Fields, LanguageConfig, LatentConfig, ModelConfig, VitConfig

# The planner reads this, and starts sooner and smaller without torch.
if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "ema.safetensors"
AUTOENCODER_FILE = "ae.safetensors"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
LANGUAGE_LAYER = "language_model.model.layers.{}.input_layernorm.weight"
VIT_LAYER = "vit_model.vision_model.encoder.layers.{}.layer_norm1.weight"


@dataclass(frozen=True)
class FileIdentity:
    """What tells one state of a checkpoint's file from another."""

    path: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The identity of the file at ``path``, as it is now."""
        status = path.stat()
        return cls(str(path.resolve()), status.st_size, status.st_mtime_ns)


class TensorFiles:
    """Named tensors spread over memory-mapped safetensors files.

    Raises:
        CheckpointError: a file is missing or is not safetensors.
    """

    def __init__(self, files: list[Path]) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{path} does not exist")
            header = _open(path, "numpy")  # unlike torch's, this mapping asks for no memory
            names = header.keys()
            self._shapes.update({name: tuple(header.get_slice(name).get_shape()) for name in names})
            self._paths.update(dict.fromkeys(names, path))
        self.identity = tuple(FileIdentity.of(path) for path in files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by tensor name, from the headers alone."""
        return dict(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """The tensor called ``name``, in its stored dtype."""
        path = self._paths[name]
        if path not in self._opened:
            self._opened[path] = _open(path, "pt")
        return self._opened[path].get_tensor(name)  # type: ignore[no-any-return]


def _open(path: Path, framework: str) -> Any:
    try:
        return safetensors.safe_open(str(path), framework=framework)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be opened as safetensors: {error}") from error


class CheckpointFiles:
    """A checkpoint folder whose files are there and agree with its configuration, but for the tensors' shapes.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"checkpoint {self.directory} is not a folder")
        for name in TOKENIZER_FILES:
            if not (self.directory / name).is_file():
                raise CheckpointError(f"{self.directory / name} does not exist")
        self.weights = TensorFiles(_weight_files(self.directory))
        self.autoencoder = TensorFiles([self.directory / AUTOENCODER_FILE])
        shapes = self.weights.shapes()
        if "latent_pos_embed.pos_embed" not in shapes:
            raise CheckpointError(f"{self.directory} has no tensor latent_pos_embed.pos_embed")
        model, vit = _fields(self.directory / "config.json"), _fields(self.directory / "vit_config.json")
        self.config = ModelConfig(
            language=LanguageConfig.read(_fields(self.directory / "llm_config.json")),
            latent=LatentConfig.read(model, shapes["latent_pos_embed.pos_embed"][0]),
            vit=VitConfig.read(vit, model, _layers(VIT_LAYER, shapes)),
        )
        held, said = _layers(LANGUAGE_LAYER, shapes), self.config.language.num_layers
        if held > said:
            raise CheckpointError(f"llm_config.json: num_hidden_layers={said}, and the checkpoint holds {held}")


def _layers(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many layers there are from the first on: ``name`` is that of a tensor that each has."""
    return next(index for index in itertools.count() if name.format(index) not in shapes)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        # An index that names shards of another download does not hide the single file.
        if all(path.is_file() for path in files) or not (directory / WEIGHTS_FILE).is_file():
            return files
    return [directory / WEIGHTS_FILE]


def _fields(path: Path) -> Fields:
    return Fields(path.name, _read_json(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return fields
