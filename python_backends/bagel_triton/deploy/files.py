"""Deploy files on disk: presets, and files that are based on others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bagel_triton.deploy import located
from bagel_triton.deploy.located import Node, Problems
from bagel_triton.deploy.stage_configs import converted
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
