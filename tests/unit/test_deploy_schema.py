"""The published JSON Schema is the one of the code, and knows every field that files have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bagel_triton.deploy.json_schema import schema
from bagel_triton.serving import cli

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "build" / "deploy").glob("*.yaml"), *(ROOT / "tests" / "data" / "seeds" / "deploy").glob("*.yaml")]


def unknown(value: Any, of: dict[str, Any], root: dict[str, Any], path: str = "") -> list[str]:
    """What in ``value`` the schema ``of`` does not allow: names that are not there, and enumerated values."""
    if "$ref" in of:
        target: Any = root
        for step in of["$ref"].removeprefix("#").split("/")[1:]:
            target = target[step]
        of = {**target, **{name: entry for name, entry in of.items() if name != "$ref"}}
    if "enum" in of and value not in of["enum"]:
        return [f"{path}={value}"]
    found = []
    if isinstance(value, dict) and of.get("type") == "object":
        for name, entry in value.items():
            inner = of.get("properties", {}).get(name, of.get("additionalProperties", True))
            if inner is False:
                found.append(f"{path}.{name}")
            elif isinstance(inner, dict):
                found += unknown(entry, inner, root, f"{path}.{name}")
    if isinstance(value, list):
        for entry in value:
            found += unknown(entry, of.get("items", {}), root, f"{path}[]")
    return found


def test_the_published_file_is_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """Written by `bagel-triton config --schema > docs/deploy.schema.json`."""
    assert cli.main(["config", "--schema"]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "docs" / "deploy.schema.json").read_text()
    assert json.loads(printed) == schema()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_fit_the_schema(path: Path) -> None:
    assert unknown(yaml.safe_load(path.read_text()), schema(), schema()) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pipelin: bagel", [".pipelin"]),
        ("pipeline: bagle", [".pipeline=bagle"]),
        ("stages: [{stage_id: 0, max_num_seq: 1, ring_degree: 2}]", 2),
        ("platforms: {cpu: {stages: [{stage_id: 0, kv: 1}]}}", 1),
        ("stage_args: [{stage_id: 0, engine_args: {model_stage: vae}}]", 1),
        ("connectors: {a: {name: Carrier}}", 1),
    ],
)
def test_an_editor_marks_what_does_not_fit(text: str, wrong: list[str] | int) -> None:
    found = unknown(yaml.safe_load(text), schema(), schema())
    assert found == wrong if isinstance(wrong, list) else len(found) == wrong
