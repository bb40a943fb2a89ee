"""A Dockerfile's instructions."""

from pathlib import Path


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, with continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in joined.splitlines())
        if name
    ]
