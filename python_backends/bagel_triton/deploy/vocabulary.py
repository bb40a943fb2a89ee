"""Every field that a deploy file may have: its type, its meaning, and what is done with it.

The names are vLLM-Omni's. A *setting* has an effect. A *neutral* field is taken at the values at which it cannot
change a result of this model, and else refused with what to do instead. All other known fields are refused with
the reason. Validation, the flags of `serve`, the JSON Schema and the tables of docs/deploy.md come from here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from bagel_triton.deploy.config import Load, Quantization
from bagel_triton.deploy.located import Node, Origin, Problems
from bagel_triton.deploy.topology import TOPOLOGIES
from bagel_triton.protocol.errors import NEAR, format_value
from bagel_triton.protocol.request import FIELD_ALIASES, FIELD_TYPES, REQUEST_FIELDS, RequestField

Engine = Literal["thinker", "dit"]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Size = Annotated[int, Meta(ge=0, le=2**62)]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
LoraModules = str | list[str | dict[str, str]] | dict[str, str]
COUNT, SECONDS = "an integer from 1 to 2147483647", "seconds > 0"
BOOLEAN = "true or false"


@dataclass(frozen=True)
class Setting:
    """A field with an effect. ``engines`` are those whose stage takes it."""

    type: Any
    allowed: str
    doc: str
    engines: tuple[Engine, ...] = ("thinker", "dit")


@dataclass(frozen=True)
class Neutral:
    """A field without an effect at ``values``, or at every value of ``type``.

    ``instead`` is what to do in place of another value, or what ``type`` allows. With a ``note``, `serve` and
    `config` mention that it was taken.
    """

    instead: str
    values: tuple[Any, ...] = ()
    type: Any = None
    note: str = ""

    def takes(self, value: Any) -> bool:
        """Whether ``value`` changes nothing."""
        if self.type is not None:
            return converts(value, self.type)
        return any(type(value) is type(one) and value == one for one in self.values)

    def refusal(self, value: Any) -> str:
        """An error's words for a ``value`` that is not taken."""
        if self.type is not None:
            return f"={format_value(value)} is not allowed; allowed: {self.instead}"
        values = ", ".join(str(msgspec.json.encode(one), "utf-8").strip('"') for one in self.values if one is not None)
        allowed = f"; allowed: {values}" if values else "; remove it"
        kind = f"not supported: {self.instead}" if self.instead else "not allowed"
        return f"={format_value(value)} is {kind}{allowed}"


Field = Setting | Neutral | str  # a text is the reason why a field is refused
Fields = Mapping[str, Field]


def converts(value: Any, kind: Any) -> bool:
    """Whether ``value`` is one of the type ``kind``; a number must be finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError):
        return False
    return True


# --- the two tables that several levels share ---

ONE_DEVICE = (
    "it is not built; several ranks share a stage's heads (tensor_parallel_size), the DiT's branches of guidance "
    "(cfg_parallel_size), rows (ulysses_degree) or weights (use_hsdp), or an image's decoding "
    "(vae_patch_parallel_size)"
)
THINKER_RANKS = "the thinker's ranks share its heads (tensor_parallel_size); others are the DiT's, stage 1"
ALL_LORAS = "all adapters of `lora_modules` are in memory, each with its own rank"
NAMED_QUANTIZATION = "name a form in `quantization`; a checkpoint's own is read from its config.json"
QUANTIZATIONS = ("auto", *get_args(Quantization))
UNSUPPORTED_OFFLOAD = (
    "every stage needs the transformer, so no part of the model rests for long; layers are offloaded by "
    "`cpu_offload_gb` or `enable_layerwise_offload`"
)
REPLICAS = "start each server of stage 1 by itself, as many as there are devices: docs/deploy.md, several DiT hosts"
OTHER_CODE = "code of another server is not loaded; `pipeline` decides what a stage does"
OTHER_NAMES = "names of vLLM's own code (vllm.*, vllm_omni.*), which change nothing; no code is loaded"
PIPELINE = "`pipeline` decides it: bagel, bagel_think or bagel_single_stage"
_OFF = (False, None)
_EITHER = (True, False)


def _one(*more: Any) -> Neutral:
    return Neutral(ONE_DEVICE, (1, *more))


PARALLEL: Fields = {
    "allgather_degree": _one(),
    "cfg_parallel_size": Setting(Count, COUNT, "ranks that share the branches of guidance, and images", ("dit",)),
    "data_parallel_size": _one(),
    "enable_expert_parallel": Neutral(ONE_DEVICE, _OFF),
    "hsdp_replicate_size": Setting(Count, COUNT, "copies of the weights that use_hsdp shards", ("dit",)),
    "hsdp_shard_size": Setting(
        Annotated[int, Meta(ge=-1, le=2**31 - 1)],
        "an integer from 1 to 2147483647, or -1 for all ranks of a copy",
        "ranks that keep a part each of one copy of the weights, with use_hsdp",
        ("dit",),
    ),
    "pipeline_parallel_size": _one(),
    "ring_degree": _one(),
    "sequence_parallel_size": _one(),
    "tensor_parallel_size": Setting(Count, COUNT, "ranks that share each layer's heads"),
    "ulysses_degree": Setting(Count, COUNT, "ranks that share a step's rows, and its heads in the attention", ("dit",)),
    "ulysses_mode": Neutral(ONE_DEVICE, ("strict", "advanced_uaa")),
    "use_hsdp": Setting(bool, BOOLEAN, "keep a part of every layer's weights on each rank", ("dit",)),
    "vae_parallel_mode": Neutral(ONE_DEVICE, type=str),
    "vae_patch_parallel_size": Setting(Count, COUNT, "ranks that share the rows of an image to decode", ("dit",)),
}
DIT_RANKS = ("cfg_parallel_size", "ulysses_degree")  # the DiT's sizes with an effect
RANKS = ("tensor_parallel_size", *DIT_RANKS)  # and those of either stage
DECODER_RANKS = "vae_patch_parallel_size"
HSDP = ("use_hsdp", "hsdp_shard_size", "hsdp_replicate_size")
OF_STAGE_1 = (*DIT_RANKS, *HSDP, DECODER_RANKS)
# Engine options of vLLM and vLLM-Omni, at a stage or for all stages.
ENGINE: Fields = {
    **PARALLEL,
    "async_scheduling": Neutral("", _EITHER),
    "cache_backend": Neutral("ask for it in a request: `cache: taylorseer`", ("none",)),
    "cache_config": Neutral("ask for a cache in a request: `cache: taylorseer`", ({},)),
    "cpu_offload_gb": Setting(
        Annotated[float, Meta(ge=0)],
        "GiB >= 0",
        "GiB of the transformer's layers that stay in the host's memory, and are copied to the GPU one after the other",
    ),
    "compilation_config": Neutral("nothing is compiled", ({}, 0)),
    "diffusion_attention_backend": Neutral("the device and dtype decide it, and `serve` prints it", ("auto",)),
    "diffusion_attention_config": Neutral("the device and dtype decide it, and `serve` prints it", ({},)),
    "diffusion_compile_dynamic": Neutral("", _EITHER),
    "diffusion_compile_granularity": Neutral("", ("regional", "full")),
    "diffusion_kv_cache_dtype": Neutral("keys and values are in `dtype`", ("auto",)),
    "diffusion_offload_config": Neutral(UNSUPPORTED_OFFLOAD, ({},)),
    "diffusion_quantization_config": Neutral(NAMED_QUANTIZATION, ({},)),
    "disable_log_stats": Neutral("", _EITHER),
    "distributed_executor_backend": Neutral("set worker_backend, process or ray, at the top", ("mp", "uni")),
    "enable_chunked_prefill": Neutral("", _EITHER),
    "enable_cpu_offload": Neutral(UNSUPPORTED_OFFLOAD, _OFF),
    "enable_diffusion_pipeline_profiler": Neutral("traces and /metrics have each stage's times", _OFF),
    "enable_distributed_layerwise_offload": Neutral(UNSUPPORTED_OFFLOAD, _OFF),
    "enable_layerwise_offload": Setting(bool, BOOLEAN, "all layers stay in the host's memory: see cpu_offload_gb"),
    "enable_sleep_mode": Neutral("", _EITHER),
    "engine_extras": Neutral("write the fields directly under the stage", ({},)),
    "hf_overrides": Neutral(
        "the checkpoint's config.json decides",
        ({}, {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}),
    ),
    "kv_cache_dtype": Neutral("keys and values are in `dtype`", ("auto",)),
    "limit_mm_per_prompt": Neutral(
        "a mapping such as {image: 4}; a request may hold as many images as fit kv_tokens, and no video or audio",
        type=dict[Literal["image", "img2img", "video", "audio"], Annotated[int, Meta(ge=0)]],
    ),
    "load_format": Neutral("weights are read from safetensors files", ("auto", "safetensors", "default")),
    "lora_backend": Neutral(ALL_LORAS, ("auto",)),
    "lora_path": Setting(str, "a folder", "a LoRA adapter (PEFT) that is merged into the weights of all stages"),
    "lora_scale": Setting(float, "a number", "factor of what the adapter adds"),
    "enable_lora": Neutral("", _EITHER),
    "lora_modules": Setting(
        LoraModules,
        "NAME=FOLDER, a list of them, or a mapping of names to folders",
        "LoRA adapters (PEFT) that requests choose by name",
    ),
    "lora_dir": Setting(str, "a folder", "from below it POST /v1/load_lora_adapter loads adapters"),
    "max_cpu_loras": Neutral(f"an integer >= 1; {ALL_LORAS}", type=Count),
    "max_lora_rank": Setting(Count, COUNT, "adapters of a higher rank are refused (default: of none)"),
    "max_loras": Setting(
        Count, COUNT, "adapters that there is memory kept for, with lora_dir (default: 1), of rank max_lora_rank or 16"
    ),
    "max_generated_image_size": Setting(
        Annotated[int, Meta(ge=256, le=2**31 - 1)],
        "pixels, an integer from 256 to 2147483647; 262144 is 512x512",
        "pixels of the largest square image; the checkpoint has its own bound, 1024x1024",
    ),
    "profiler_config": Neutral("use traces (docs/observability.md)", ({},)),
    "quantization": Setting(
        Literal[QUANTIZATIONS],
        ", ".join(QUANTIZATIONS),
        "form of the transformer's weights in memory; auto: the first that fits a GPU",
    ),
    "quantization_config": Neutral(NAMED_QUANTIZATION, ({},)),
    "step_execution": Neutral("", _EITHER),
    "trust_remote_code": Neutral("", _EITHER),
    "vae_use_slicing": Neutral("", _EITHER),
}

# --- the levels of a file ---

TOP: Fields = {
    "pipeline": Setting(Literal[tuple(TOPOLOGIES)], ", ".join(TOPOLOGIES), "the topology"),
    "base_config": Setting(str, "the path of a deploy file, or a preset's name", "a file that this one changes"),
    "device": Setting(
        Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")], "auto, cpu, cuda, cuda:N", "where stages run"
    ),
    "dtype": Setting(Literal["auto", "float32", "bfloat16"], "auto, float32, bfloat16", "of weights and KV"),
    "request_timeout_s": Setting(Seconds, SECONDS, "time of a request that sets no `timeout`"),
    "load": Setting(
        Literal[get_args(Load)],
        ", ".join(get_args(Load)),
        "which weights: all; understanding: answers in text alone; generation: for a server of stage 1",
    ),
    "while_asleep": Setting(
        Literal["wait", "refuse"], "wait, refuse", "what becomes of requests while the server sleeps"
    ),
    "worker_backend": Setting(
        Literal["process", "multi_process", "mp", "ray"],
        "process, ray",
        "what starts a stage's ranks but the first: this server, or a Ray cluster",
    ),
    "ray_address": Setting(
        Annotated[str, Meta(pattern=r"^(auto|[^:/\s]+:[0-9]{1,5})$")],
        "HOST:PORT of the cluster's head, or auto, the one that this host is in",
        "the Ray cluster of worker_backend: ray",
    ),
    "stages": Setting(list, "a list of stages, each with a stage_id", "the stages' limits"),
    "connectors": Setting(dict, "a mapping of names to {name, extra}", "what carries KV from stage to stage"),
    "platforms": Setting(dict, "a mapping with cpu or cuda", "changes for machines without or with CUDA"),
    **ENGINE,
    **{name: Neutral("write it under its stage", (1,)) for name in (*RANKS, "hsdp_replicate_size", DECODER_RANKS)},
    "use_hsdp": Neutral("write it under its stage", _OFF),
    "hsdp_shard_size": Neutral("write it under its stage", (1, -1)),
    "async_chunk": Neutral("a stage gets its input whole", (False,)),
    "edges": Neutral("the only edge is from stage 0 to stage 1", type=list[Any]),
    "enable_prefix_caching": Setting(bool, BOOLEAN, "for the thinker's stage", ("thinker",)),
    "max_batch_size": Neutral(
        "an integer >= 1; set max_num_seqs of a stage", type=Count, note="max_num_seqs of a stage bounds its batches"
    ),
    "max_inflight": Neutral(
        "an integer >= 1", type=Count, note="max_num_seqs and max_waiting of a stage bound its requests"
    ),
    "shm_threshold_bytes": Neutral("bytes >= 0", type=Size),
    "window_size": Neutral("a stage gets its input whole, and max_waiting bounds its queue", (-1,)),
}

_THINKER: tuple[Engine, ...] = ("thinker",)
_DIT: tuple[Engine, ...] = ("dit",)
STAGE: Fields = {
    "stage_id": Setting(Annotated[int, Meta(ge=0)], "0 or 1", "0 is the thinker, 1 the DiT with the decoder"),
    "address": Setting(
        str | Annotated[list[str], Meta(min_length=1)],
        "HOST:PORT, or a list of them",
        "of the stage's own servers, where each stage has its own",
    ),
    "devices": Setting(
        Annotated[int, Meta(ge=0, le=1023)]
        | Annotated[str, Meta(pattern=r"^([0-9]{1,4}(,[0-9]{1,4})*|auto|cpu|cuda(:[0-9]+)?)$")],
        "a device's number, or as many as the stage has ranks, such as 0,1; or auto, cpu, cuda, cuda:N",
        "number of the CUDA device; without CUDA the stage is on the CPU",
    ),
    "max_num_seqs": Setting(Count, COUNT, "thinker: requests in flight; DiT: images denoised together"),
    "max_num_batched_tokens": Setting(Count, COUNT, "tokens of one forward"),
    "max_waiting": Setting(Count, COUNT, "length of the queue"),
    "max_model_len": Setting(Count, COUNT, "tokens that one request may need", _THINKER),
    "gpu_memory_utilization": Setting(
        Fraction,
        "a number above 0, at most 1",
        "fraction of the GPU for the stage: sizes the KV pool",
        ("thinker", "dit"),
    ),
    "kv_tokens": Setting(Count, COUNT, "tokens in the KV cache pool", _THINKER),
    "block_tokens": Setting(Count, COUNT, "tokens per KV block", _THINKER),
    "lease_ttl_s": Setting(Seconds, SECONDS, "until a lease that is not renewed expires", _THINKER),
    "enable_prefix_caching": Setting(bool, BOOLEAN, "keep prefixes for later requests", _THINKER),
    "enforce_eager": Setting(bool, BOOLEAN, "on a GPU, decode and denoise without CUDA graphs"),
    "encoder_cache_mb": Setting(
        Annotated[int, Meta(ge=0, le=2**31 - 1)], "an integer >= 0", "megabytes of cached image encodings", _THINKER
    ),
    "vae_use_tiling": Setting(
        bool, BOOLEAN, "decode large images in strips (default: except on a GPU with room)", _DIT
    ),
    "default_sampling_params": Setting(
        dict[str, Any], "a mapping of request fields", "values of fields that a request leaves out"
    ),
    "input_connectors": Setting(dict[str, str], "a mapping to names of connectors", "what the stage reads KV from"),
    "output_connectors": Setting(dict[str, str], "a mapping to names of connectors", "what the stage writes KV to"),
    "parallel_config": Setting(
        dict[str, Any], "a mapping of sizes", "sizes of the stage, which may as well stand beside it"
    ),
    **ENGINE,
    "dtype": Setting(
        Literal["auto", "float32", "bfloat16"], "auto, float32, bfloat16", "as at the top, for all stages"
    ),
    "block_size": "set block_tokens",
    "env": Neutral("set environment variables for `serve` itself; the stages get them", ({},)),
    "num_gpu_blocks_override": "set kv_tokens",
    "num_replicas": Neutral(REPLICAS, (1,)),
    # What the topology decides, as the older files state it.
    "cfg_kv_collect_func": Neutral(OTHER_NAMES, type=Annotated[str, Meta(pattern=r"bagel\.collect_cfg_kv_caches$")]),
    "custom_process_input_func": Neutral(OTHER_CODE),
    "custom_process_next_stage_input_func": Neutral(OTHER_CODE),
    "engine_input_source": Neutral(PIPELINE, ([], [0])),
    "engine_output_type": Neutral(PIPELINE, ("text", "image")),
    "final_output": Neutral(PIPELINE, _EITHER),
    "final_output_type": Neutral(PIPELINE, ("text", "image")),
    "hf_config_name": Neutral("the checkpoint's config.json decides"),
    "is_comprehension": Neutral(PIPELINE, _EITHER),
    "model_arch": Neutral(
        "no other model is served",
        ("BagelForConditionalGeneration", "OmniBagelForConditionalGeneration", "BagelPipeline"),
    ),
    "model_class_name": Neutral("no other model is served", ("BagelPipeline",)),
    "model_stage": Neutral(PIPELINE, ("thinker", "dit")),
    "omni_kv_config": Setting(dict[str, Any], "a mapping", "checked against the pipeline"),
    "prompt_expand_func": Neutral(
        OTHER_CODE, type=Annotated[str, Meta(pattern=r"bagel\.expand_cfg_prompts(_think)?$")]
    ),
    "requires_multimodal_data": Neutral(PIPELINE, _EITHER),
    "scheduler_cls": Neutral(OTHER_NAMES, type=Annotated[str, Meta(pattern=r"^vllm(_omni)?\.")]),
    "stage_type": Neutral(PIPELINE, ("llm", "diffusion")),
    "worker_cls": Neutral(OTHER_NAMES, type=Annotated[str, Meta(pattern=r"^vllm(_omni)?\.")]),
    "worker_type": Neutral(PIPELINE, ("ar", "generation", "diffusion")),
}
OMNI_KV: Fields = {
    "need_send_cache": Neutral("the thinker always lends its KV to the DiT; `pipeline` decides", (True, False)),
    "need_recv_cache": Neutral("the DiT always reads the thinker's KV; `pipeline` decides", (True, False)),
    "kv_transfer_criteria": Neutral("KV after thinking is `pipeline: bagel_think`", ({}, {"type": "prefill_finished"})),
}
CONNECTOR: Fields = {
    "name": Setting(str, "the name of a connector", "which connector"),
    "extra": Setting(dict[str, Any], "a mapping of options", "its options"),
}
# Sections of platforms that this server does not run on are skipped.
OTHER_PLATFORMS = ("rocm", "npu", "xpu", "musa", "tpu", "hpu")

# Fields of vLLM's SamplingParams that are no fields of a request here.
_SAMPLING: Fields = {
    "detokenize": Neutral("an answer is always text", (True,)),
    "extra_args": Setting(dict[str, Any], "a mapping of request fields", "more of them"),
    "include_stop_str_in_output": Neutral("a text ends before its stop text", (False,)),
    "logprobs": Neutral("ask for top_logprobs in a request"),
    "prompt_logprobs": Neutral("log-probabilities of a prompt are not computed"),
    "skip_special_tokens": Neutral("special tokens are never text", (True,)),
    "spaces_between_special_tokens": Neutral("", _EITHER),
    "stop_token_ids": Neutral("name texts in `stop`", ([],)),
}
_NOT_DEFAULTS = ("prompt", "image", "messages", "modality", "aspect_ratio")
_SAMPLING_ALIASES = {**FIELD_ALIASES, "num_outputs_per_prompt": "n"}


def request_field(name: str) -> str:
    """The request field that ``name`` of a ``default_sampling_params`` is, which may be an alias."""
    return _SAMPLING_ALIASES.get(name, name)


def default_fields() -> dict[str, RequestField | Field]:
    """The fields of a ``default_sampling_params``."""
    names = [name for name in (*REQUEST_FIELDS, *_SAMPLING_ALIASES) if name not in _NOT_DEFAULTS]
    return {**{name: REQUEST_FIELDS[request_field(name)] for name in names}, **_SAMPLING}


def check(node: Node, fields: Fields, problems: Problems, notes: list[str]) -> dict[str, Node]:
    """The settings of the mapping ``node`` that ``fields`` allows, and that are given; every error is noted."""
    if not isinstance(node.value, dict):
        problems.add(node, f"={format_value(node.plain())} is not allowed; allowed: a mapping of fields")
        return {}
    found: dict[str, Node] = {}
    for name, entry in node.value.items():
        field, value = _field(fields, name), entry.plain()
        if field is None:
            problems.add(entry, _unknown(name, fields))
        elif value is None:  # as if it were not there
            continue
        elif isinstance(field, str):
            problems.add(entry, f"={format_value(value)} is not supported: {field}")
        elif isinstance(field, Neutral):
            if not field.takes(value):
                problems.add(entry, field.refusal(value))
            elif field.note:
                notes.append(f"{entry.origin.prefix}{entry.path} changes nothing: {field.note}")
        elif converts(value, field.type):
            found[name] = entry
        else:
            problems.add(entry, f"={format_value(value)} is not allowed; allowed: {field.allowed}")
    return found


def check_defaults(node: Node, problems: Problems) -> dict[str, tuple[Any, Origin]]:
    """The request fields, by name, that a ``default_sampling_params`` sets, each with its value and origin."""
    found: dict[str, tuple[Any, Origin]] = {}
    for given, entry in node.mapping.items():
        name, value = request_field(given), entry.plain()
        if value is None:
            continue
        if given in _SAMPLING:
            check(Node({given: entry}, node.origin, node.path), _SAMPLING, problems, [])
            if given == "extra_args":
                found |= check_defaults(entry, problems)
            continue
        if name not in REQUEST_FIELDS or name in _NOT_DEFAULTS:
            problems.add(entry, _unknown(given, list(default_fields())))
            continue
        field = REQUEST_FIELDS[name]
        try:
            converted = msgspec.convert(value, FIELD_TYPES[name], str_keys=True)
            valid = field.permits(converted) and not (isinstance(value, float) and not math.isfinite(value))
        except (msgspec.ValidationError, OverflowError):
            valid = False
        if valid and name == "cfg_interval":
            valid = 0 <= value[0] <= value[1] <= 1
        if valid and name == "top_k":
            valid = value >= -1
        if not valid:
            allowed = field.allowed or {"BOOL": BOOLEAN, "BYTES": "a text"}.get(field.datatype, "a number")
            problems.add(entry, f"={format_value(value)} is not allowed; allowed: {allowed}")
            continue
        found[name] = value, entry.origin
    return found


def _field(fields: Fields, name: str) -> Field | None:
    if name in fields:
        return fields[name]
    if fields is STAGE and name.startswith(("dlo_", "host_weight_runtime_")):
        return Neutral(UNSUPPORTED_OFFLOAD, _OFF)
    return None


def _unknown(name: str, fields: Fields | Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:100], list(fields), n=1, cutoff=NEAR)
    suggestion = f"did you mean {near[0]}? " if near else ""
    named = fields.items() if isinstance(fields, Mapping) else ()
    settings = [known for known, field in named if isinstance(field, Setting)] or list(fields)
    return f" is not a known field; {suggestion}allowed: {', '.join(settings)}"
