"""Values of a configuration with the place that each was written at: a file's line, or a flag.

A file is read into a tree of :class:`Node`, and a file it is based on, a platform's section and flags are merged
into that tree, so an error can name the line and a value its origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from bagel_triton.deploy.config import ConfigError
from bagel_triton.protocol.errors import format_value, truncate

MERGE, MERGE_TAG = "<<", "tag:yaml.org,2002:merge"
INTEGER = "tag:yaml.org,2002:int"
STAGE_LISTS, STAGE_ID = ("stages", "stage_args"), "stage_id"
MAX_NODES = 100_000  # aliases can make a small file a huge tree


@dataclass(frozen=True)
class Origin:
    """The place of a value: ``source`` is a file or a flag; ``section`` a part of it that only applies sometimes."""

    source: str
    line: int | None = None
    section: str = ""

    @property
    def prefix(self) -> str:
        """The start of an error message; one about a flag starts with the flag itself."""
        return "" if self.source.startswith("--") else f"{self}: "

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return f"{where} ({self.section})" if self.section else where


@dataclass(frozen=True)
class Node:
    """A scalar, a mapping or a list of nodes; ``path`` is its name as written, also after a merge."""

    value: Any
    origin: Origin
    path: str = ""

    @property
    def mapping(self) -> dict[str, Node]:
        """The entries of a mapping; none of anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        """The elements of a list; none of anything else."""
        return self.value if isinstance(self.value, list) else []

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


class Problems:
    """Errors that are collected, so that a file's come all at once, in the order of its lines."""

    def __init__(self) -> None:
        self._found: list[tuple[Origin, str]] = []
        self._keys: set[tuple[str, int | None, str]] = set()

    def add(self, at: Node | Origin, message: str) -> None:
        """Note ``message``; it begins with the name of the value if ``at`` is one."""
        origin = at.origin if isinstance(at, Node) else at
        text = f"{truncate(at.path)}{message}" if isinstance(at, Node) else message
        key = (origin.source, origin.line, text)
        if key not in self._keys:
            self._keys.add(key)
            self._found.append((origin, text))

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Raise them.

        Raises:
            ConfigError: a line for each.
        """
        if self._found:
            raise ConfigError(self.text())

    def text(self) -> str:
        """A line for each, in the order of a file's lines."""
        ordered = sorted(self._found, key=lambda found: (found[0].source, found[0].line or 0))
        return "\n".join(f"{origin.prefix}{' '.join(text.split())}" for origin, text in ordered)


def of_value(value: Any, origin: Origin, path: str) -> Node:
    """``value`` as a tree whose every node has ``origin``."""
    if isinstance(value, dict):
        entries = {str(key): of_value(entry, origin, f"{path}.{key}") for key, entry in value.items()}
        return Node(entries, origin, path)
    if isinstance(value, list):
        return Node([of_value(entry, origin, f"{path}[{at}]") for at, entry in enumerate(value)], origin, path)
    return Node(value, origin, path)


def read(path: Path) -> Node:
    """The mapping in the YAML file ``path``.

    Raises:
        ConfigError: it cannot be read or is no mapping; a line for each error.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Node:
    """The mapping that the YAML ``text`` is; ``source`` names it in errors.

    Raises:
        ConfigError: a line for each error.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        reader = _Reader(loader, source)
        node = None if root is None else reader.node(root, root.start_mark.line + 1, "")
    except yaml.MarkedYAMLError as error:
        line, message = _described(error, text.splitlines())
        raise ConfigError(f"{Origin(source, line)}: {message}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{source}:{line}: the character {error.character:#04x} is not allowed in YAML") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()
    reader.problems.raise_if_any()
    if node is None or node.value is None:
        raise ConfigError(
            f"{source}: is empty; the shortest is `pipeline: bagel`, and without a file that is the default"
        )
    if not isinstance(node.value, dict):
        kind = "a list" if isinstance(node.value, list) else format_value(node.value)
        raise ConfigError(f"{node.origin}: is {kind}, not a mapping of fields such as `pipeline: bagel`")
    return node


class _Reader:
    """Makes nodes of PyYAML's, which know their lines."""

    def __init__(self, loader: yaml.SafeLoader, source: str) -> None:
        self._loader, self._source, self._count = loader, source, 0
        self._open: list[Any] = []
        self.problems = Problems()

    def node(self, written: Any, line: int, path: str) -> Node:
        """The node of what is ``written`` at ``line``, which is its key's where it has one."""
        self._count += 1
        origin = Origin(self._source, line)
        if self._count > MAX_NODES:
            raise ConfigError(f"{origin}: there are more than {MAX_NODES} values, aliases counted as often as used")
        if any(written is other for other in self._open):
            raise ConfigError(f"{origin}: an alias stands inside of what it refers to")
        self._open.append(written)
        try:
            if isinstance(written, yaml.MappingNode):
                return Node(self._entries(written, path), origin, path)
            if isinstance(written, yaml.SequenceNode):
                numbered = enumerate(written.value)
                entries = [
                    self.node(entry, entry.start_mark.line + 1, f"{path}[{_index(path, at, entry)}]")
                    for at, entry in numbered
                ]
                return Node(entries, origin, path)
            return Node(self._scalar(written), origin, path)
        finally:
            self._open.pop()

    def _entries(self, written: yaml.MappingNode, path: str) -> dict[str, Node]:
        own: dict[str, int] = {}
        for key, _ in written.value:
            name, line = self._key(key), key.start_mark.line + 1
            if name in own:
                self.problems.add(Origin(self._source, line), f"{name} is there already, in line {own[name]}")
            own[name] = line
        self._loader.flatten_mapping(written)  # what `<<` refers to comes before the mapping's own
        entries = {}
        for key, value in written.value:
            name = self._key(key)
            entries[name] = self.node(value, key.start_mark.line + 1, f"{path}.{name}" if path else name)
        return entries

    def _key(self, written: Any) -> str:
        if isinstance(written, yaml.ScalarNode):
            return MERGE if written.tag == MERGE_TAG else str(self._scalar(written))
        return "(a list or mapping as a key)"

    def _scalar(self, written: yaml.ScalarNode) -> Any:
        try:
            value = self._loader.construct_object(written)
            return value if value is None or isinstance(value, bool | int | float | str) else str(value)
        except ValueError as error:  # a date such as 2026-99-99
            shown = format_value(written.value)
            raise ConfigError(f"{Origin(self._source, written.start_mark.line + 1)}: {shown}: {error}") from error


def _index(path: str, at: int, element: Any) -> str:
    """The name of element number ``at`` of the list ``path``: a stage's is its id, which its place need not be."""
    if path.rpartition(".")[2] in STAGE_LISTS and isinstance(element, yaml.MappingNode):
        for key, value in reversed(element.value):  # its own come after those that `<<` refers to
            if key.value == STAGE_ID and value.tag == INTEGER:
                return f"{STAGE_ID}={value.value}"
    return str(at)


def _described(error: yaml.MarkedYAMLError, lines: Sequence[str]) -> tuple[int | None, str]:
    """The line of a syntax error, and what is wrong there."""
    if error.problem_mark is None:
        return None, str(error.problem)
    number = error.problem_mark.line
    line = lines[number] if number < len(lines) else ""
    where = f"column {error.problem_mark.column + 1}, {format_value(line.strip())}" if line else "the end of the file"
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return number + 1, f"{where}: YAML indents by spaces, and this line begins with a tab"
    context = f" {error.context}" if error.context else ""
    return number + 1, f"{where}: {error.problem}{context}"


def merged(below: Node, above: Node, list_key: str = STAGE_ID) -> Node:
    """``above`` laid over ``below``.

    Mappings are merged key by key. Elements of two lists of mappings are matched by ``list_key``, and those that
    match none are appended; any other value replaces the one below.
    """
    if isinstance(below.value, dict) and isinstance(above.value, dict):
        both = dict(below.value)
        for key, node in above.value.items():
            both[key] = merged(both[key], node, list_key) if key in both else node
        return Node(both, above.origin, above.path)
    if isinstance(below.value, list) and isinstance(above.value, list):
        if not all(list_key in entry.mapping for entry in (*below.value, *above.value)):
            return above
        # By their texts, as a wrong value may be a list.
        entries = {repr(entry.mapping[list_key].plain()): entry for entry in below.value}
        for entry in above.value:
            key = repr(entry.mapping[list_key].plain())
            entries[key] = merged(entries[key], entry, list_key) if key in entries else entry
        return Node(list(entries.values()), above.origin, above.path)
    return above


def in_section(node: Node, section: str) -> Node:
    """``node`` with ``section`` in every origin."""
    value = node.value
    if isinstance(value, dict):
        value = {key: in_section(entry, section) for key, entry in value.items()}
    elif isinstance(value, list):
        value = [in_section(entry, section) for entry in value]
    return replace(node, value=value, origin=replace(node.origin, section=section))
