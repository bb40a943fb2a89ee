"""A checkpoint's networks, their weights memory-mapped.

Parameters have the names of the checkpoint's tensors, but for the transformer's layers: there a
parameter belongs to one expert and may hold several tensors, one above the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import CheckpointError, LanguageConfig, ModelConfig
from bagel_triton.model.cpu.row_stable import make_row_stable
from bagel_triton.model.offload import SLOTS, LayerOffload, offloadable, offloadable_bytes, offloaded
from bagel_triton.model.quantization import FORMS, SCALE, Form, QuantizedLinear, quantize
from bagel_triton.model.slim import Load, slim_autoencoder, slim_transformer
from bagel_triton.weights import validation
from bagel_triton.weights.files import CheckpointFiles, FileIdentity, TensorFiles
from bagel_triton.weights.layout import Dense, Part, Quantized, Source, stored_of
from bagel_triton.weights.lora import Adapter
from bagel_triton.weights.sharing import SharedWeights, on_device

Module = TypeVar("Module", bound=nn.Module)
EXPERT_PARAMETER = re.compile(r"(language_model\.model\.layers\.\d+)\.(gen|und)\.(.+)\.(weight|weight_scale|bias)")
EXPERT_SUFFIX = {"gen": "_moe_gen", "und": ""}
EXPERT_TENSORS: Mapping[str, Sequence[str]] = {
    "input_layernorm": ["input_layernorm{}"],
    "qkv_proj": ["self_attn.q_proj{}", "self_attn.k_proj{}", "self_attn.v_proj{}"],
    "q_norm": ["self_attn.q_norm{}"],
    "k_norm": ["self_attn.k_norm{}"],
    "o_proj": ["self_attn.o_proj{}"],
    "post_attention_layernorm": ["post_attention_layernorm{}"],
    "mlp.gate_up_proj": ["mlp{}.gate_proj", "mlp{}.up_proj"],
    "mlp.down_proj": ["mlp{}.down_proj"],
}
# Outside its layers the transformer is computed by plain modules on every device.
ROW_STABLE = (
    "time_embedder",
    "vae2llm",
    "llm2vae",
    "language_model.lm_head",
    "language_model.model.norm",
    "language_model.model.norm_moe_gen",
)
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Checkpoint:
    """A checkpoint folder whose files, names and shapes were checked on opening.

    With an ``adapter``, a LoRA adapter's folder and scale, its transformer is loaded with that merged into it.
    ``most_pixels`` bounds its images: see :meth:`ModelConfig.limited`.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """

    def __init__(
        self,
        directory: str | Path,
        adapter: tuple[str, float] | None = None,
        load: Load = "all",
        most_pixels: int | None = None,
    ) -> None:
        files, self._load = CheckpointFiles(directory, most_pixels), load
        self.directory, self.config = files.directory, files.config
        self._weights, self._autoencoder = files.weights, files.autoencoder
        self._stored = files.stored_form
        self._bagel_bytes: dict[tuple[torch.dtype, str | None], int] = {}
        try:
            with torch.device("meta"):
                bagel, autoencoder = Bagel(self.config), Autoencoder(self._autoencoder.shapes())
                form = self.form(None)
                if form is not None:
                    quantize(bagel.language_model.model, form)
        except RuntimeError as error:  # an overflow of a tensor's size
            raise CheckpointError(f"{self.directory}: the sizes in its configuration files are too large") from error
        for module, tensors in ((bagel, self._weights), (autoencoder, self._autoencoder)):
            expected: dict[str, tuple[int, ...]] = {}
            coded: dict[str, Sequence[str]] = {}
            layers = quantized_layers(module)
            for name, tensor in module.state_dict().items():
                found = stored_tensors(name, tuple(tensor.shape), self.config.language)
                layer, _, kind = name.rpartition(".")
                if self._stored is not None and layer in layers and kind in ("weight", SCALE):
                    if kind == "weight":
                        found = {self._coded(name): self._coded_shape(shape) for name, shape in found.items()}
                    dtypes = (self._stored.dtype,) if kind == "weight" else self._stored.scale_dtypes
                    coded |= dict.fromkeys(found, dtypes)
                expected |= found
            validation.check_tensors(tensors, expected, coded)
        self._adapter = None if adapter is None else Adapter(*adapter)
        if self._adapter is not None:
            if self._stored is not None:
                raise CheckpointError(
                    f"{self.directory} is quantised, as {self._stored.form}, and takes no adapter; name it in "
                    "--lora-modules, or quantise the weights that it was made from: --quantization with --lora-path"
                )
            self._adapter.check(self._weights.shapes())
        latent = self.config.latent
        if (autoencoder.latent_channels, autoencoder.downsample) != (latent.channels, latent.downsample):
            raise CheckpointError(
                f"config.json says z_channels={latent.channels}, downsample={latent.downsample}; the autoencoder's "
                f"tensors have {autoencoder.latent_channels} channels and downsample by {autoencoder.downsample}"
            )

    @property
    def stored_bytes(self) -> int:
        """Bytes of the transformer's files."""
        return sum(file.size for file in self._weights.identity)

    def tensor(self, name: str) -> Part:
        """The transformer's stored tensor ``name``, every value of which was read, and what an adapter adds to it.

        Raises:
            CheckpointError: one is NaN or infinite.
        """
        tensor = self._weights.tensor(name)
        if not validation.is_finite(tensor):
            raise _not_finite(self._weights, [name])
        return tensor if self._adapter is None else self._adapter.apply(name, tensor)

    def form(self, quantization: str | None) -> Form | None:
        """The form of the transformer's weights where ``quantization`` is wanted; None for weights in its dtype.

        Raises:
            CheckpointError: the files hold weights in another form.
        """
        if self._stored is None:
            return None if quantization is None else FORMS[quantization]
        stored = FORMS[self._stored.form]
        if self._stored.group is not None:
            stored = replace(stored, group=self._stored.group)
        if quantization is None:
            return stored
        allowed = [name for name, form in FORMS.items() if form.storage == stored.storage]
        if quantization not in allowed:
            raise CheckpointError(
                f"quantization={quantization!r} is not allowed: the weights in {self.directory} are stored as "
                f"{stored.name}; allowed: {', '.join(allowed)}"
            )
        return replace(stored, name=quantization, activations=FORMS[quantization].activations)

    def bagel(self, dtype: torch.dtype, quantization: str | None = None) -> Bagel:
        """The transformer with its flow head as it would be loaded in ``dtype``, without weights; errors as of
        :meth:`form`."""
        form = self.form(quantization)
        with torch.device("meta"):
            module = Bagel(self.config).to(dtype)
            if form is not None:
                quantize(module.language_model.model, form)
        slim_transformer(module, self._load)
        return module

    def autoencoder(self) -> Autoencoder:
        """The autoencoder as it would be loaded, without weights."""
        with torch.device("meta"):
            module = Autoencoder(self._autoencoder.shapes())
        slim_autoencoder(module, self._load)
        return module

    def bagel_bytes(self, dtype: torch.dtype, quantization: str | None = None) -> int:
        """Bytes of the weights of :meth:`bagel`; errors as of :meth:`form`."""
        key = dtype, quantization
        if key not in self._bagel_bytes:
            state = self.bagel(dtype, quantization).state_dict()
            self._bagel_bytes[key] = sum(tensor.nbytes for tensor in state.values())
        return self._bagel_bytes[key]

    def load_bagel(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shared: SharedWeights | None = None,
        quantization: str | None = None,
        offload_gb: float = 0.0,
        cut: bool = False,
    ) -> Bagel:
        """The transformer with its flow head, on ``device`` in ``dtype``; its weights are in ``shared``, if given.

        With a ``quantization``, one of ``FORMS``, its layers are quantised one after the other as they are read.
        ``offload_gb`` GiB of weights stay in the host's memory; on a GPU none are ``shared`` then. Weights that the
        caller is to ``cut`` for a GPU are all on the host, since the whole may not fit there.

        Raises:
            CheckpointError: a tensor has values that are NaN or infinite; errors as of :meth:`form`.
            MemoryError: there is no room for them.
            ValueError: ``shared`` is on another device.
        """
        module = self.bagel(dtype, quantization)
        if device.type == "cpu":
            with torch.device("meta"):
                make_row_stable(module, *ROW_STABLE, few_rows={"language_model.lm_head"})
        if cut and device.type != "cpu":
            return self._fill(module, self._weights, torch.device("cpu"), dtype, None)
        transformer = module.language_model.model
        layers = offloaded(self.config.language.num_layers, offloadable_bytes(transformer), offload_gb)
        if not layers:
            return self._fill(module, self._weights, device, dtype, shared)
        host = {f"language_model.model.{name}" for layer in layers for name in offloadable(transformer, layer)}
        if device.type != "cpu":
            shared = None
        module = self._fill(module, self._weights, device, dtype, shared, host)
        with torch.inference_mode(False):
            LayerOffload(transformer, layers, device)
        return module

    def load_autoencoder(
        self, device: torch.device, dtype: torch.dtype, shared: SharedWeights | None = None
    ) -> Autoencoder:
        """The autoencoder, likewise."""
        return self._fill(self.autoencoder(), self._autoencoder, device, dtype, shared)

    def offloaded_bytes(self, dtype: torch.dtype, quantization: str | None, gigabytes: float) -> tuple[int, int]:
        """Bytes of weights that stay in the host's memory where ``gigabytes`` GiB are to, and those on the device in
        their place; errors as of :meth:`form`."""
        transformer = self.bagel(dtype, quantization).language_model.model
        layer = offloadable_bytes(transformer)
        count = len(offloaded(self.config.language.num_layers, layer, gigabytes))
        return count * layer, min(count, SLOTS) * layer

    def stored_apart(self, dtype: torch.dtype, quantizations: Sequence[str | None] = (None,)) -> int:
        """Bytes of all weights that processes on a CPU cannot map from the checkpoint's files.

        The transformer computes in ``dtype``. Weights stored in another dtype are converted or quantised, and
        tensors that do not adjoin in their file are copied into their packed parameter. Each of
        ``quantizations`` has a transformer of its own.
        """
        modules: list[tuple[nn.Module, TensorFiles]] = [(self.autoencoder(), self._autoencoder)]
        modules += [(self.bagel(dtype, quantization), self._weights) for quantization in quantizations]
        size = 0
        for module, files in modules:
            layers, state = quantized_layers(module), module.state_dict()

            def in_file(name: str, tensor: Tensor, files: TensorFiles = files) -> bool:
                names = [*stored_tensors(name, tuple(tensor.shape), self.config.language)]
                if self._adapted(files, names):
                    return False
                return files.adjoin(names) and files.dtypes(names) == {SAFETENSORS_DTYPES[tensor.dtype]}

            for name, tensor in state.items():
                layer, _, kind = name.rpartition(".")
                if layer not in layers or kind == "bias":
                    size += 0 if in_file(name, tensor) else tensor.nbytes
                elif kind == "weight":
                    scale = state[f"{layer}.{SCALE}"]
                    mapped = self._stored is not None and self._codes_adjoin(layer, files)
                    size += 0 if mapped else tensor.nbytes + scale.nbytes
        return size

    def _fill(
        self,
        module: Module,
        files: TensorFiles,
        device: torch.device,
        dtype: torch.dtype,
        shared: SharedWeights | None,
        host: Collection[str] = (),
    ) -> Module:
        if shared is not None and shared.device != device:
            raise ValueError(f"device={device}: the shared weights are on {shared.device}")

        layers = quantized_layers(module)
        sources: dict[str, Source] = {}
        for name, tensor in module.state_dict().items():
            layer, _, kind = name.rpartition(".")
            names = [*stored_tensors(name, tuple(tensor.shape), self.config.language)]
            if layer not in layers or kind == "bias":
                sources[name] = self._source(files, names)
            elif kind == "weight":
                sources[name] = self._quantized(layers[layer], files, names)
        try:
            if shared is not None:
                state = shared.converted(sources, dtype, files.identity + self._adapters_identity)
            else:
                there = {name: source for name, source in sources.items() if name not in host}
                here = {name: source for name, source in sources.items() if name in host}
                state = on_device(there, device, dtype) | on_device(here, torch.device("cpu"), dtype)
        except validation.NotFinite as error:
            shape = tuple(module.state_dict()[error.parameter].shape)
            names = [*stored_tensors(error.parameter, shape, self.config.language)]
            layer, _, kind = error.parameter.rpartition(".")
            if layer in layers and kind == "weight" and self._stored is not None:
                names = [*(self._coded(name) for name in names), *_scales(names)]
            raise _not_finite(files, names) from error
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).eval()

    @property
    def _adapters_identity(self) -> tuple[FileIdentity, ...]:
        return () if self._adapter is None else self._adapter.identity

    def _adapted(self, files: TensorFiles, names: Sequence[str]) -> bool:
        """Whether an adapter changes one of the tensors ``names`` of ``files``."""
        return self._adapter is not None and files is self._weights and any(map(self._adapter.adapts, names))

    def _source(self, files: TensorFiles, names: Sequence[str]) -> Dense:
        """The tensors ``names`` with what an adapter adds to them."""
        if self._adapter is None or not self._adapted(files, names):
            return _source(files, names)
        return tuple(self._adapter.apply(name, files.tensor(name)) for name in names)

    def _quantized(self, form: Form, files: TensorFiles, names: Sequence[str]) -> Quantized:
        """The source of a quantised weight, whose tensors are called ``names`` in other checkpoints."""
        if self._stored is None:
            return Quantized(form, self._source(files, names))
        codes = _source(files, [self._coded(name) for name in names])
        return Quantized(form, _as_bytes(codes) if self._stored.packed else codes, _source(files, _scales(names)))

    def _coded(self, name: str) -> str:
        """The stored name of a quantised weight that is called ``name`` in other checkpoints."""
        assert self._stored is not None, "only quantised files have one"
        return f"{name.removesuffix('weight')}{self._stored.weight}"

    def _coded_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of stored codes whose bytes have this ``shape``."""
        assert self._stored is not None, "only quantised files have one"
        return (*shape[:-1], shape[-1] // 4) if self._stored.packed else shape

    def _codes_adjoin(self, layer: str, files: TensorFiles) -> bool:
        """Whether the codes of a ``layer``, and its scales, are mapped from their file as they are."""
        assert self._stored is not None, "only quantised files have codes"
        names = [*stored_tensors(f"{layer}.weight", (0, 0), self.config.language)]
        codes = [self._coded(name) for name in names]
        scales = _scales(names)
        wanted = "BF16" if self._stored.packed else "F32"
        return files.adjoin(codes) and files.adjoin(scales) and files.dtypes(scales) == {wanted}


def quantized_layers(module: nn.Module) -> dict[str, Form]:
    """The form of each quantised layer of ``module``, by the layer's name."""
    return {name: layer.form for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}


def _source(files: TensorFiles, names: Sequence[str]) -> Dense:
    """The tensors ``names``, mapped and not read yet."""
    if len(names) == 1:
        return files.tensor(names[0])
    return files.stacked(names) if files.adjoin(names) else tuple(files.tensor(name) for name in names)


def _scales(names: Sequence[str]) -> list[str]:
    """The stored scales of quantised weights ``names``."""
    return [f"{name.removesuffix('weight')}{SCALE}" for name in names]


def _as_bytes(source: Dense) -> Dense:
    found = tuple(part.view(torch.uint8) for part in stored_of(source))
    return found if isinstance(source, tuple) else found[0]


def inspect(directory: str | Path) -> ModelConfig:
    """Check the checkpoint in ``directory`` and return its geometry; reads headers only.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """
    return Checkpoint(directory).config


def stored_tensors(parameter: str, shape: tuple[int, ...], config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors that a parameter of ``shape`` holds, one above the other."""
    found = EXPERT_PARAMETER.fullmatch(parameter)
    if found is None:
        return {parameter: shape}
    layer, expert, module, kind = found.groups()
    names = [f"{layer}.{name.format(EXPERT_SUFFIX[expert])}.{kind}" for name in EXPERT_TENSORS[module]]
    rows = [shape[0] // len(names)] * len(names)
    if module == "qkv_proj":
        rows = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return {name: (count, *shape[1:]) for name, count in zip(names, rows, strict=True)}


def _not_finite(files: TensorFiles, names: Iterable[str]) -> CheckpointError:
    name = next(name for name in names if not validation.is_finite(files.tensor(name)))
    tensor = files.tensor(name)
    found = validation.not_finite_at(tensor)
    return CheckpointError(
        f"{files.file(name)}: tensor {name} has NaN or infinite values ({len(found)} of {tensor.numel()}, "
        f"the first at {list(found[0])}); download the file again, or use another checkpoint"
    )
