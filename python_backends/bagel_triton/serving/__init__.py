"""Processes: the command line, the supervisor, tritonserver, health."""


class CommandError(Exception):
    """A command cannot go on. The message is one line: what is wrong, with its value, and what to do."""
