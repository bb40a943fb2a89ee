"""Deploy files on disk: presets, files that are based on others, and files in the older form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bagel_triton.deploy import located, vocabulary
from bagel_triton.deploy.located import Node, Problems
from bagel_triton.deploy.vocabulary import COUNT, Count, Fields, Neutral, Setting
from bagel_triton.protocol.errors import format_value

PRESETS = ("bagel", "bagel_think", "bagel_single_stage", "bagel_two_hosts", "bagel_multiconnector")
_ALIASES = {"bagel_single_gpu": "bagel"}  # vLLM-Omni's file for both stages on one GPU, which is the default here
_MAX_BASES = 16
_PACKAGE = Path(__file__).resolve().parents[1]


def preset(name: str) -> Path | None:
    """The file of the preset ``name``; vLLM-Omni's path of a file by that name will do. None if there is none.

    A wheel carries the files inside the package; an editable install uses the source tree's.
    """
    path = Path(name)
    stem = path.name.removesuffix(".yaml")
    stem = _ALIASES.get(stem, stem)
    if stem not in PRESETS or (len(path.parts) > 1 and "vllm_omni" not in path.parts):
        return None
    candidates = (
        root / "build" / "deploy" / f"{stem}.yaml" for root in (_PACKAGE / "source_tree", _PACKAGE.parents[1])
    )
    return next((file for file in candidates if file.exists()), None)


def with_bases(path: Path, problems: Problems, notes: list[str], above: tuple[Path, ...]) -> Node:
    """The tree of the file ``path`` in today's form, laid over the one it is based on.

    ``above`` are the files that are based on it. Errors of its form are added to ``problems``.

    Raises:
        ConfigError: a file cannot be read, or is no YAML mapping.
    """
    root = converted(located.read(path), problems, notes)
    refuse_repeated_stages(root, problems)
    base = root.mapping.get("base_config")
    if base is None or base.value is None:
        return root
    root = replace(root, value={name: node for name, node in root.value.items() if name != "base_config"})
    given = str(base.value)
    file = path.parent / given
    found = file if file.is_file() else preset(given)
    if not isinstance(base.value, str) or found is None:
        problems.add(
            base,
            f"={format_value(base.plain())} is no file here and no preset; allowed: a path, {', '.join(PRESETS)}",
        )
        return root
    chain = (*above, path.resolve())
    if found.resolve() in chain or len(chain) > _MAX_BASES:
        problems.add(base, f"={format_value(given)} is based on this file in turn")
        return root
    return located.merged(with_bases(found, problems, notes, chain), root)


def refuse_repeated_stages(root: Node, problems: Problems) -> None:
    """Add an error for each stage that ``root`` has twice."""
    seen: dict[str, Node] = {}
    for stage in root.mapping["stages"].items if "stages" in root.mapping else ():
        if (stage_id := stage.mapping.get("stage_id")) is None:
            continue
        key = repr(stage_id.plain())
        if key in seen:
            problems.add(stage_id, f"={key} is there already, in line {seen[key].origin.line}")
        seen.setdefault(key, stage_id)


# The older form: ``stage_args`` with ``engine_args`` and ``runtime``. Values keep their lines and names, so errors
# are about what was written; only the shape is checked here.

EDGE: Fields = {
    "from": Neutral("the only edge is from stage 0 to stage 1", (0,)),
    "to": Neutral("the only edge is from stage 0 to stage 1", (1,)),
    "window_size": vocabulary.TOP["window_size"],
    "max_inflight": vocabulary.TOP["max_inflight"],
}
DEFAULTS: Fields = {name: EDGE[name] for name in ("window_size", "max_inflight")}
RUNTIME: Fields = {
    **DEFAULTS,
    "enabled": Neutral("", (True, False)),
    "defaults": Setting(dict[str, Any], "a mapping", "of the edges"),
    "connectors": vocabulary.TOP["connectors"],
    "edges": Setting(list, "a list of {from: 0, to: 1}", "between stages"),
    "shm_threshold_bytes": vocabulary.TOP["shm_threshold_bytes"],
}
STAGE_RUNTIME: Fields = {
    "devices": Setting(object, "a device", "becomes stages[].devices"),
    "max_batch_size": Setting(Count, COUNT, "becomes stages[].max_num_seqs"),
    "num_replicas": vocabulary.STAGE["num_replicas"],
    "process": Neutral("each stage is a process, unless the pipeline has but one", (True,)),
}


def converted(root: Node, problems: Problems, notes: list[str]) -> Node:
    """``root`` in today's form; itself if it is."""
    if not isinstance(root.value, dict):
        return root
    top = dict(root.value)
    old = top.pop("stage_args", None)
    if old is not None and "stages" in top:
        problems.add(old, f" and stages ({top['stages'].origin}) are the same in two forms; keep one")
    elif old is not None:
        top["stages"] = old
    runtime = top.pop("runtime", None)
    if runtime is not None:
        top |= _runtime(runtime, top, problems, notes)
    stages = top.get("stages")
    if stages is not None and isinstance(stages.value, list):
        top["stages"] = replace(stages, value=[_stage(stage, problems, notes) for stage in stages.value])
        if old is not None and "pipeline" not in top and _is_single(stages):
            top["pipeline"] = Node("bagel_single_stage", stages.origin, stages.path)
    return replace(root, value=top)


def _runtime(runtime: Node, top: dict[str, Node], problems: Problems, notes: list[str]) -> dict[str, Node]:
    found = vocabulary.check(runtime, RUNTIME, problems, notes)
    if "defaults" in found:
        vocabulary.check(found["defaults"], DEFAULTS, problems, notes)
    for edge in found["edges"].items if "edges" in found else ():
        vocabulary.check(edge, EDGE, problems, notes)
    if "connectors" not in found:
        return {}
    if "connectors" in top:
        problems.add(found["connectors"], f" and connectors ({top['connectors'].origin}) are the same; keep one")
        return {}
    return {"connectors": found["connectors"]}


def _stage(stage: Node, problems: Problems, notes: list[str]) -> Node:
    if not isinstance(stage.value, dict):
        return stage
    fields = dict(stage.value)
    engine, runtime = fields.pop("engine_args", None), fields.pop("runtime", None)
    lifted: list[tuple[str, Node]] = []
    if engine is not None:
        if isinstance(engine.value, dict):
            lifted += engine.value.items()
        elif engine.value is not None:
            problems.add(engine, " is not a mapping of fields")
    size = fields.pop("max_batch_size", None)
    if runtime is not None and runtime.value is not None:
        found = vocabulary.check(runtime, STAGE_RUNTIME, problems, notes)
        size = found.pop("max_batch_size", size)
        lifted += found.items()
    for name, node in lifted:
        if name in fields:
            problems.add(node, f" is there already, in line {fields[name].origin.line}")
        fields[name] = node
    if size is not None and "max_num_seqs" not in fields:
        fields["max_num_seqs"] = size
    return replace(stage, value=fields)


def _is_single(stages: Node) -> bool:
    """Whether the only stage is a DiT, which then has every engine."""
    if len(stages.items) != 1:
        return False
    stage = stages.items[0].mapping
    engine = stage["engine_args"].mapping if "engine_args" in stage else {}
    given = {**engine, **stage}
    if "stage_id" in given and given["stage_id"].value != 0:
        return False
    return any(
        name in given and given[name].value == value
        for name, value in (("model_stage", "dit"), ("stage_type", "diffusion"))
    )
