"""The JSON Schema of a deploy file: what an editor completes and checks. docs/deploy.schema.json is this."""

from __future__ import annotations

from typing import Any

import msgspec

from bagel_triton.deploy import vocabulary
from bagel_triton.deploy.connector import NAMES, OPTIONS
from bagel_triton.deploy.files import DEFAULTS, EDGE, RUNTIME, STAGE_RUNTIME
from bagel_triton.deploy.vocabulary import Field, Fields, Neutral
from bagel_triton.protocol.request import FIELD_TYPES, RequestField

Schema = dict[str, Any]
TITLE = "bagel-triton deploy file"


def schema() -> Schema:
    """The schema of a whole file."""
    stages = {"type": "array", "items": {**_ref("stage"), "required": ["stage_id"]}}
    top = {
        "stages": stages,
        "connectors": {"type": "object", "additionalProperties": _ref("connector")},
        "platforms": {"$ref": "#/$defs/platforms"},
        "stage_args": {**stages, "description": "stages, in the older form"},
        "runtime": {**_ref("runtime"), "description": "connectors and edges, in the older form"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": TITLE,
        **_object(vocabulary.TOP, top),
        "$defs": {
            "stage": _object(vocabulary.STAGE, _stage_parts()),
            "default_sampling_params": _sampling(),
            "connector": {
                **_object(vocabulary.CONNECTOR, {"name": {"enum": list(NAMES)}, "extra": _extra()}),
                "required": ["name"],
            },
            "runtime": _object(
                RUNTIME,
                {
                    "defaults": _object(DEFAULTS),
                    "connectors": top["connectors"],
                    "edges": {"type": "array", "items": _object(EDGE)},
                },
            ),
            "platforms": {
                "type": "object",
                "description": vocabulary.TOP["platforms"].doc,  # type: ignore[union-attr]
                "properties": {
                    **{name: {"$ref": "#"} for name in ("cpu", "cuda")},
                    **{name: {"description": "skipped"} for name in vocabulary.OTHER_PLATFORMS},
                },
                "additionalProperties": False,
            },
        },
    }


def _stage_parts() -> Schema:
    return {
        "default_sampling_params": _ref("default_sampling_params"),
        "parallel_config": _object(vocabulary.PARALLEL),
        "omni_kv_config": _object(vocabulary.OMNI_KV),
        "engine_args": {**_ref("stage"), "description": "fields of the stage, in the older form"},
        "runtime": {**_object(STAGE_RUNTIME), "description": "devices and batch size, in the older form"},
        "max_batch_size": _of(STAGE_RUNTIME["max_batch_size"]),
    }


def _sampling() -> Schema:
    """Fields of a request, and those of vLLM's SamplingParams that change nothing."""
    fields: Schema = {}
    for name, field in vocabulary.default_fields().items():
        if isinstance(field, RequestField):
            kind = msgspec.json.schema(FIELD_TYPES[vocabulary.request_field(name)])
            fields[name] = {**kind, "description": f"{field.doc}; {field.allowed}".rstrip("; ")}
        else:
            fields[name] = _of(field)
    fields["extra_args"] = {"type": "object", "description": "more of these fields"}
    return {"type": "object", "properties": fields, "additionalProperties": False}


def _extra() -> Schema:
    """Options of any connector: which of them one has is checked when the file is read."""
    options: Schema = {}
    for fields in OPTIONS.values():
        for name, field in fields.items():
            if name not in options or "not" in options[name]:
                options[name] = _of(field)
    options["proto"] = options["protocol"]
    options["host"]["description"] += ", or auto"
    return {"type": "object", "properties": options}


def _object(fields: Fields, parts: Schema | None = None) -> Schema:
    """A mapping of ``fields``; ``parts`` are the schemas of those with fields of their own."""
    properties: Schema = {name: _of(field) for name, field in fields.items()}
    for name, part in (parts or {}).items():
        properties[name] = {**properties.get(name, {}), **part}
        properties[name].pop("additionalProperties", None) if "$ref" in part else None
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _of(field: Field) -> Schema:
    if isinstance(field, str):
        return {"not": {}, "description": f"not supported: {field}"}
    if isinstance(field, Neutral):
        described = {"description": f"changes nothing; for other values: {field.instead}"}
        if field.type is not None:
            return {**msgspec.json.schema(field.type), **described}
        return {"enum": [*(value for value in field.values if value is not None), None], **described}
    kind = {} if field.type is object else msgspec.json.schema(field.type)
    return {**kind, "description": field.doc}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}
