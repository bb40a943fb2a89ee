"""Why a command cannot go on, in one line for the person who typed it."""

from __future__ import annotations


class CommandError(Exception):
    """The message is one clear line: what is wrong, with its value, and what to do."""
