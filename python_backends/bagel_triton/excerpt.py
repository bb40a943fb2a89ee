"""What an error quotes of a user's own words and values."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator

MAX_SHOWN = 120  # characters


def shortened(text: str) -> str:
    """``text``, cut where it is too long for an error."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def shown(value: object) -> str:
    """``value`` as an error shows it: a text in quotes, bytes as the text that they are or counted, the rest as JSON.

    It is cut, and no more of a large value is looked at than is shown.
    """
    if isinstance(value, bytes):
        text = _decoded(value)
        return f"{len(value)} byte{'' if len(value) == 1 else 's'}" if text is None else shown(text)
    if isinstance(value, str):
        return shortened(repr(value[: MAX_SHOWN + 1]))
    written = ""
    for piece in _json(value):
        written += piece
        if len(written) > MAX_SHOWN:
            break
    return shortened(written)


def _decoded(data: bytes) -> str | None:
    """The beginning of the text that ``data`` is, as much as is shown; None where it begins like none."""
    head = data[: 4 * (MAX_SHOWN + 1)]  # a character has at most 4
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) == len(data))
    except UnicodeDecodeError:
        return None
    return text if all(character.isprintable() or character.isspace() for character in text) else None


def _json(value: object) -> Iterator[str]:
    """``value`` as JSON writes it, in pieces: ``json`` itself would write all of a long text or list."""
    if isinstance(value, dict):
        yield "{"
        for number, (name, member) in enumerate(value.items()):
            yield f"{', ' if number else ''}{_quoted(str(name))}: "
            yield from _json(member)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _json(item)
        yield "]"
    elif isinstance(value, str):
        yield _quoted(value)
    elif value is None or isinstance(value, bool | int | float):
        yield json.dumps(value)
    else:
        yield repr(value)


def _quoted(text: str) -> str:
    head = text[: MAX_SHOWN + 1]
    return json.dumps(head, ensure_ascii=not head.isprintable())  # half a character must not get into a reply
