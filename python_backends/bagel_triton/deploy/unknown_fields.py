"""What an error says of a deploy YAML's field that is not known here."""

from __future__ import annotations

import msgspec

from bagel_triton.deploy.config import ConfigError
from bagel_triton.errors import InvalidRequest

_TOPOLOGY = "the topology that `pipeline` names decides it"
_FLAT = "its fields stand directly under the stage here"
# Of vLLM-Omni's files.
_REASONS = {
    "gpu_memory_utilization": "memory is what kv_tokens and max_num_seqs make it; `bagel-triton memory` shows it",
    "max_batch_size": "a stage batches all it has, within max_num_seqs and max_num_batched_tokens",
    "parallel_config": "all stages run on one device",
    "platforms": "`device` says where the stages run",
    "stage_args": "the stages are listed under `stages`",
    "engine_args": _FLAT,
    "runtime": _FLAT,
    "stage_type": _TOPOLOGY,
    "model_stage": _TOPOLOGY,
    "model_arch": _TOPOLOGY,
    "engine_input_source": _TOPOLOGY,
    "omni_kv_config": _TOPOLOGY,
}


def refuse_unknown(where: str, section: object, known: type[msgspec.Struct]) -> None:
    """Refuse a field of ``section``, at ``where``, that a ``known`` does not have; what is no mapping has none.

    Raises:
        ConfigError: names the field, and why there is none such here or which there are.
    """
    if not isinstance(section, dict):
        return
    allowed = [field.name for field in msgspec.structs.fields(known)]
    for name in section:
        if name in allowed:
            continue
        path = f"{where}.{name}" if where else str(name)
        if name in _REASONS:
            raise ConfigError(f"{path} has no meaning here: {_REASONS[name]}; remove it")
        raise ConfigError(InvalidRequest.unknown(path, str(name), allowed).message)
