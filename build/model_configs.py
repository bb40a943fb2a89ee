"""Rewrite the request inputs of model_repository/*/config.pbtxt after a change to protocol/request.py.

Triton reads the files as they are, without ``auto_complete_config``, so that an embedded server
and a container start alike and a model's interface can be read without running it.
"""

from __future__ import annotations

import re
from pathlib import Path

from bagel_triton.protocol.request import ABORT, ENSEMBLE_FIELDS, REQUEST_FIELDS

REPOSITORY = Path(__file__).parents[1] / "model_repository"
STREAM = '  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }'
CALLS = ("sleep", "adapters", ABORT)
CHANGES = [f'  {{ name: "{name}" data_type: TYPE_STRING dims: [ 1 ] optional: true }}' for name in CALLS]
TYPES = {"BYTES": "TYPE_STRING"}


def tensor(name: str, optional: bool = True) -> str:
    """The declaration of a request field."""
    field = REQUEST_FIELDS[name]
    datatype = TYPES.get(field.datatype, f"TYPE_{field.datatype}")
    rest = " optional: true" if optional else ""
    return f'  {{ name: "{name}" data_type: {datatype} dims: [ {field.length} ]{rest} }}'


def inputs(model: str) -> list[str]:
    """The inputs of a model that takes requests."""
    if model == "bagel_text2img":
        return [tensor(name, optional=name != "prompt") for name in ENSEMBLE_FIELDS]
    return [tensor(name) for name in REQUEST_FIELDS] + ([STREAM, *CHANGES] if model == "bagel" else [])


def rewritten(model: str, text: str) -> str:
    """``text``, the configuration of ``model``, with today's request fields."""
    block = "input [\n" + ",\n".join(inputs(model)) + "\n]\n"
    text = re.sub(r"^input \[\n.*?^\]\n", block, text, count=1, flags=re.MULTILINE | re.DOTALL)
    if model == "bagel_text2img":
        maps = "".join(f'      input_map {{ key: "{name}" value: "{name}" }}\n' for name in ENSEMBLE_FIELDS)
        start = text.index('model_name: "cfg_expand"')
        end = text.index("output_map", start)
        head = '      model_name: "cfg_expand"\n      model_version: -1\n'
        text = f"{text[:start].rstrip(' ')}{head}{maps}      {text[end:]}"
    return text


MODELS = ("bagel", "bagel_infer", "bagel_text2img", "cfg_expand")

if __name__ == "__main__":
    for model in MODELS:
        path = REPOSITORY / model / "config.pbtxt"
        path.write_text(rewritten(model, path.read_text()))
