"""Storage of quantised weights in a checkpoint's files, and other projects' formats, which are refused by name.

``bagel-triton quantize`` writes int8, float8 and int4 as compressed-tensors does, so such files of others are read,
too, where they quantise the same layers with the same symmetric scales. NF4, which compressed-tensors does not have,
is stored alike under a method of our own. Read by the request planner, so nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from bagel_triton.model.config import CheckpointError, Fields
from bagel_triton.weights.folder import HUB_NAME

FIELD = "quantization_config"
COMPRESSED_TENSORS, OWN = "compressed-tensors", "bagel-triton"
USE_DENSE = (
    f"allowed: files that `bagel-triton quantize` wrote, compressed-tensors' int8, float8 and int4, and {HUB_NAME} in "
    "bfloat16, which --quantization quantises while it is loaded"
)
# Marks of each tool in its tensors' names, the most specific first.
_MAKERS = (
    (re.compile(r"\.SCB$|weight_format$"), "bitsandbytes in int8"),
    (re.compile(r"absmax|quant_state|quant_map|bitsandbytes"), "bitsandbytes in four bits"),
    (re.compile(r"qweight|qzeros|g_idx"), "GPTQ or AWQ"),
    (re.compile(r"scaled_fp8|scale_weight|scale_input"), "ComfyUI in float8"),
    (re.compile(r"weight_scale_inv"), "blocks of float8, as DeepSeek's are"),
    (re.compile(r"encoded_exponent|sign_mantissa|output_positions|split_positions|\.luts$"), "DFloat11"),
    (re.compile(r"weight_packed|weight_scale|zero_point|input_scale"), "compressed-tensors or ModelOpt"),
)
# compressed-tensors' settings that are read, and those that change nothing. Any other has to be off: a transform or
# sparsity that is not applied makes noise of the weights.
_SETTINGS = (
    *("quant_method", "format", "config_groups", "quantization_status", "ignore"),
    *("version", "global_compression_ratio"),
)
_GROUP_SETTINGS = ("targets", "weights", "input_activations", "format")
_NUMBERS = (
    *("num_bits", "type", "symmetric", "strategy", "group_size"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)
_QUANTISED = re.compile(r"scale|quant(?!_conv)|zero_point")


@dataclass(frozen=True)
class StoredForm:
    """A checkpoint's quantised form: ``form`` by name, and inputs that share a scale in four bits at most."""

    form: str
    group: int | None = None

    @property
    def weight(self) -> str:
        """The name of a quantised weight's tensor, after its layer's."""
        return "weight_packed" if self.packed else "weight"

    @property
    def packed(self) -> bool:
        """Whether eight codes are one integer."""
        return self.form in ("int4", "nf4")

    @property
    def dtype(self) -> str:
        """The dtype of codes, as safetensors calls it."""
        return "I32" if self.packed else "I8" if self.form.startswith("int8") else "F8_E4M3"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """The dtypes of scales that are read without rounding them."""
        return ("BF16",) if self.packed else ("F32", "BF16", "F16")


def maker(name: str) -> str | None:
    """The tool whose quantised tensors have this name; None if the weights are not quantised."""
    found = next((who for pattern, who in _MAKERS if pattern.search(name)), None)
    return found or ("an unknown program" if _QUANTISED.search(name) else None)


def stored_form(files: Iterable[Fields]) -> StoredForm | None:
    """The form that the configuration ``files`` record; None where they record none.

    Raises:
        CheckpointError: it is one that is not read; the message names it.
    """
    for fields in files:
        if fields.has("dfloat11_config"):
            raise CheckpointError(f"{fields.file} has a dfloat11_config: the weights are DFloat11's; {USE_DENSE}")
        if fields.has(FIELD):
            return _read(fields.file, fields.plain(FIELD))
    return None


def config_of(form: StoredForm) -> dict[str, Any]:
    """The ``quantization_config`` of ``form``."""
    kind = "float" if form.form.startswith("fp8") else "int"
    grouped = {"strategy": "group", "group_size": form.group} if form.packed else {"strategy": "channel"}
    weights = {"num_bits": 4 if form.packed else 8, "type": kind, "symmetric": True, "dynamic": False, **grouped}
    rows = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {
        "targets": [r"re:language_model\.model\.layers\..*_proj.*"],
        "weights": weights,
        "input_activations": rows if form.form.endswith("w8a8") else None,
    }
    return {
        "quant_method": OWN if form.form == "nf4" else COMPRESSED_TENSORS,
        "format": "nf4" if form.form == "nf4" else "pack-quantized" if form.packed else f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _read(file: str, config: Any) -> StoredForm:
    config = config if isinstance(config, dict) else {}
    if (method := config.get("quant_method")) is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in (COMPRESSED_TENSORS, OWN):
        raise CheckpointError(f"{file}: {FIELD} is that of quant_method={method!r}; {USE_DENSE}")
    other = (
        "one group of symmetric weights, a scale for each output row in eight bits or for each group of inputs in four"
    )
    refused = CheckpointError(
        f"{file}: {FIELD} has format={config.get('format')!r} with other settings than {other}; {USE_DENSE}"
    )
    try:
        (group,) = config["config_groups"].values()
        weights, rows, format_ = group["weights"], group.get("input_activations"), config["format"]
        size, kind = weights.get("group_size"), weights["type"]
        found = {
            ("int-quantized", 8, "int"): "int8",
            ("float-quantized", 8, "float"): "fp8",
            ("pack-quantized", 4, "int"): "int4",
            ("nf4", 4, "int"): "nf4",
        }[format_, weights["num_bits"], kind]
        unread = [
            *_unread(config, _SETTINGS),
            *_unread(group, _GROUP_SETTINGS),
            *_unread(weights, _NUMBERS),
            *_unread(rows or {}, (*_NUMBERS, "dynamic")),
        ]
        if found in ("int8", "fp8") and rows is not None:
            found += "_w8a8"
            read = [rows.get(name) for name in ("num_bits", "type", "dynamic", "strategy", "symmetric")]
            known = read == [8, kind, True, "token", True]
        else:
            known = rows is None
        strategy = "group" if found in ("int4", "nf4") else "channel"
        power_of_two = strategy == "channel" or (isinstance(size, int) and size >= 8 and size & (size - 1) == 0)
        known = known and group.get("format") in (None, format_) and weights.get("strategy") == strategy
        if not known or not power_of_two or weights.get("symmetric") is not True:
            raise refused
    except (LookupError, AttributeError, TypeError, ValueError):
        raise refused from None
    if unread:
        raise CheckpointError(f"{file}: {FIELD} has {', '.join(unread)}, which is not read; {USE_DENSE}")
    return StoredForm(found, size if strategy == "group" else None)


def _unread(settings: dict[str, Any], known: Collection[str]) -> list[str]:
    """The ``settings`` that are on and not ``known``, with their values."""
    dense = {"sparsity_config"} if (settings.get("sparsity_config") or {}).get("format") == "dense" else set()
    return [f"{name}={value!r}" for name, value in settings.items() if value and name not in {*known, *dense}]
