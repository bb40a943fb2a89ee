"""Values in error messages: JSON, or quoted text, and never longer than fits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bagel_triton.protocol.errors import MAX_SHOWN, format_value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "null"),
        (4.1, "4.1"),
        (float("-inf"), "-Infinity"),
        ("A cat", "'A cat'"),
        ("it's\n", '"it\'s\\n"'),
        ({"include_usage": True}, '{"include_usage": true}'),
        ([1, None, "it's 猫", {}, []], '[1, null, "it\'s 猫", {}, []]'),
        (("a", {"b": (False,)}), '["a", {"b": [false]}]'),
        (["\ud800\x1b"], '["\\ud800\\u001b"]'),
    ],
)
def test_a_value_is_shown_as_json_and_a_text_in_quotes(value: object, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"hello", "'hello'"),
        ("<p>Köln</p>\n".encode(), r"'<p>Köln</p>\n'"),
        ("Köln".encode("latin-1"), "4 bytes"),
        ("Köln".encode()[:2], "2 bytes"),
        (b"\xff", "1 byte"),
        (b"\x00\x01\x02", "3 bytes"),
    ],
)
def test_bytes_are_shown_as_the_text_that_they_are_or_counted(data: bytes, text: str) -> None:
    assert format_value(data) == text


class Endless(list[object]):
    """A list that is never done: who asks it for all of its elements does not come back."""

    def __iter__(self) -> Iterator[object]:
        while True:
            yield [self]


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ("x" * 10**6, "'xxx"),
        ("猫".encode() * 10**6, "'猫猫"),
        ([["x" * 10**6] * 10**6], '[["xxx'),
        ({"x" * 10**6: 1}, '{"xxx'),
        (Endless(), "[[[["),
    ],
    ids=["text", "bytes", "list", "name", "endless"],
)
def test_a_large_value_is_cut_and_not_looked_at_any_further(value: object, start: str) -> None:
    text = format_value(value)
    assert len(text) == MAX_SHOWN
    assert text.startswith(start)
    assert text.endswith("...")
