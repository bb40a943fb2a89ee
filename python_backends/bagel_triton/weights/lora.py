"""A LoRA adapter in PEFT's layout: merged into the weights while they are loaded, or chosen by requests.

PEFT names a tensor ``base_model.model.MODULE.lora_A.weight``; a module is called here as in the checkpoint, so each
expert has its own (``self_attn.q_proj`` and ``self_attn.q_proj_moe_gen``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bagel_triton.model.config import CheckpointError
from bagel_triton.weights.files import FileIdentity, TensorFiles
from bagel_triton.weights.layout import Adapted
from bagel_triton.weights.validation import DTYPES, is_finite

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
MAX_ALPHA, DEFAULT_ALPHA = 1e6, 8  # the default is PEFT's
# Ways to begin a training that leave the adapted weights as they are. Others, PiSSA's for one, take a part out of them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Fields of an adapter's configuration that are read, and those that change nothing once it is trained. Any other has
# to be off: it may be one that changes what an adapter computes.
_READ = ("peft_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "bias", "init_lora_weights")
_NEUTRAL = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "target_modules", "task_type", "velora_config"),
)


class Adapter:
    """The adapter in the folder ``directory``, with all that it does times ``scale``.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """

    def __init__(self, directory: str | Path, scale: float = 1.0) -> None:
        self.directory = Path(directory)
        self._config = _read_config(self.directory / CONFIG_FILE)
        files = TensorFiles([self.directory / TENSORS_FILE])
        pairs: dict[str, dict[str, Tensor]] = {}
        for name in files.shapes():
            found = _TENSOR.fullmatch(name)
            if found is None or files.dtype(name) not in DTYPES:
                raise CheckpointError(
                    f"{files.file(name)}: tensor {name} ({files.dtype(name)}) is not allowed; "
                    "allowed: base_model.model.MODULE.lora_A.weight and lora_B.weight, of floating-point numbers"
                )
            tensor = files.tensor(name).float()
            if not is_finite(tensor):
                raise CheckpointError(f"{files.file(name)}: tensor {name} has NaN or infinite values")
            if found[2] in pairs.setdefault(found[1], {}):
                raise CheckpointError(f"{files.file(name)}: tensor {name} is there under two names")
            pairs[found[1]][found[2]] = tensor
        if not pairs:
            raise CheckpointError(f"{files.file()} has no tensors")
        self.updates: dict[str, tuple[Tensor, Tensor]] = {}
        for module, pair in pairs.items():
            shapes = [tuple(pair[side].shape) for side in sorted(pair)]
            if len(pair) != 2 or any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
                raise CheckpointError(
                    f"{files.file()}: lora_A and lora_B of {module} have the shapes {shapes}; "
                    "allowed: [rank, in] and [out, rank]"
                )
            if not shapes[0][0]:
                raise CheckpointError(f"{files.file()}: lora_A and lora_B of {module} have rank 0; allowed: 1 or more")
            down, up = pair["A"], pair["B"]
            said = _matching(self._config.get("rank_pattern"), module, self._config.get("r"))
            if said not in (None, len(down)):
                raise CheckpointError(
                    f"{files.file()}: lora_A and lora_B of {module} have rank {len(down)}; {CONFIG_FILE} says {said}"
                )
            scaling = scale * self._scaling(module, len(down))
            if not is_finite(down := down * scaling):
                raise CheckpointError(f"{files.file()}: lora_A of {module} has values beyond float32 times {scaling:g}")
            self.updates[f"{module}.weight"] = down, up
        self.identity = (*files.identity, FileIdentity(f"scale {scale!r}", 0, 0))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse an adapter for other weights than those of ``shapes``, by name.

        Raises:
            CheckpointError: names a module that is not there, or has another shape.
        """
        for name, (down, up) in self.updates.items():
            shape = (up.shape[0], down.shape[1])
            if name not in shapes:
                module = name.removesuffix(".weight")
                raise CheckpointError(f"{self.directory} adapts {module}, which is no module of the checkpoint")
            if shapes[name] != shape:
                raise CheckpointError(
                    f"{self.directory} adapts {name} of shape {list(shape)}; the checkpoint's is {list(shapes[name])}"
                )

    def adapts(self, name: str) -> bool:
        """Whether it changes the stored tensor ``name``."""
        return name in self.updates

    def apply(self, name: str, weight: Tensor) -> Tensor | Adapted:
        """The stored tensor ``name`` with its update, if there is one; nothing is computed yet."""
        return Adapted(weight, *self.updates[name]) if name in self.updates else weight

    def _scaling(self, module: str, rank: int) -> float:
        alpha = _matching(self._config.get("alpha_pattern"), module, self._config.get("lora_alpha", DEFAULT_ALPHA))
        return float(alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))


def _matching(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first of PEFT's ``patterns`` that is the end of a ``module``'s name; else ``default``."""
    return next(
        (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module)), default
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as a LoRA adapter's configuration: {error}") from error
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type={kind!r} is not allowed; allowed: 'LORA'")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias={config['bias']!r} is not allowed; allowed: 'none'")
    for name in config:
        if name not in _READ and name not in _NEUTRAL and config[name]:
            raise CheckpointError(f"{path}: {name}={config[name]!r} is not allowed; allowed: null, false")
    if (init := config.get("init_lora_weights")) not in _INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights={init!r} is not allowed: such an adapter belongs to changed weights; allowed: "
            f"{', '.join(map(repr, _INITS))} (PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) "
            "writes it as one of the unchanged weights)"
        )
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, given in patterns.items():
        if not isinstance(given, dict) or not all(map(_is_pattern, given)):
            allowed = "numbers by patterns of names"
            raise CheckpointError(f"{path}: {name}={given!r} is not allowed; allowed: {allowed}")
    alphas = {f"alpha_pattern[{key}]": alpha for key, alpha in patterns["alpha_pattern"].items()}
    alphas["lora_alpha"] = config.get("lora_alpha", DEFAULT_ALPHA)
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
            raise CheckpointError(f"{path}: {name}={alpha!r} is not allowed; allowed: a number up to {MAX_ALPHA:g}")
    return dict(config)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError):
        return False
    return True
