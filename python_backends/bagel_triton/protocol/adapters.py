"""Messages that load and unload adapters while a server runs, and the rules of their names and paths."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec

from bagel_triton.protocol.errors import InvalidRequest, ModelNotFound
from bagel_triton.protocol.messages import Message

MAX_NAME = 256  # characters


class AdapterCall(Message, frozen=True):
    """A change of the server's adapters, or a question about them. ``path`` is that of the one that is loaded."""

    action: Literal["load", "unload", "list"]
    name: str = ""
    path: str = ""


class AdapterNames(Message, frozen=True):
    """The names of the adapters that requests may choose.

    ``max_model_len`` is what the model has beside them: the tokens of context and text that a request may have.
    """

    names: tuple[str, ...]
    max_model_len: int | None = None


def decode_adapter_call(data: bytes) -> AdapterCall:
    """The call in JSON ``data``.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        call = msgspec.json.decode(data, type=AdapterCall)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"input adapters is not an AdapterCall: {error}", "adapters") from error
    if call.action != "list":
        check_name(call.name)
    if call.action == "load" and not call.path:
        raise InvalidRequest.value("lora_path", call.path, "the path of an adapter's folder")
    return call


def check_name(name: str) -> None:
    """Refuse a name that no adapter can have.

    Raises:
        InvalidRequest: it is empty, too long, or has blanks around it or characters that do not print.
    """
    if not name or len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        allowed = f"1 to {MAX_NAME} characters that print, without blanks around them"
        raise InvalidRequest.value("lora_name", name, allowed)


def is_a_models(name: str, models: Collection[str]) -> bool:
    """Whether a request's ``model`` of this ``name`` is one of ``models``, or MODEL:NAME, an adapter by both names."""
    return any(name == model or name.startswith(f"{model}:") for model in models)


def folder_below(root: str, path: str) -> str:
    """The adapter's folder that ``path`` names, below the folder ``root`` once links are followed.

    A relative path begins there.

    Raises:
        InvalidRequest: there is no such ``root``, or ``path`` leads out of it.
        ModelNotFound: there is no such folder.
    """
    if not root:
        raise InvalidRequest(
            f"lora_path={path!r} is not allowed: this server has no lora_dir; allowed: a path below the folder that "
            "--lora-dir names",
            "lora_path",
        )
    try:
        base = Path(root).resolve()
        folder = (base / path).resolve()
        inside, found = folder.is_relative_to(base), folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
        inside, found = True, False
    if not inside:
        raise InvalidRequest.value("lora_path", path, "a folder below that of --lora-dir")
    if not found:
        raise ModelNotFound.value("lora_path", path, "an adapter's folder below that of --lora-dir")
    return str(folder)
