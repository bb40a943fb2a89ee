"""What rank 0 sends to the other ranks of its stage, by a pipe each; tensors follow by torch's process group.

A rank waits for its next message on the pipe, so an idle one takes no time, and the end of the pipe is the end of
rank 0, however that came.
"""

from __future__ import annotations

import os
import struct
from typing import IO

import msgspec

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.parallel.layout import PoolLayout, StoresLayout
from bagel_triton.protocol.messages import KVGeometry

_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The first message: who the receiver is, and the file where all ranks meet.

    It is a rank of ``stage``, a Triton model. With ``share`` the weights are those of the server with the
    configuration's prefix. With ``decodes`` it decodes images, beside what the stage does.
    """

    config: DeployConfig
    stage: str
    rank: int
    meeting: str
    threads: int
    share: bool
    decodes: bool


class Meet(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Every rank has its weights: join the process group now, and take part in its self-test."""


class Attach(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """``file`` is the thinker's KV cache; the receiver maps it and uses its own heads of it."""

    file: str
    geometry: KVGeometry


class Keep(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A new store of ``shape`` follows, of which the first ``past`` tokens are sent."""

    store: int
    shape: tuple[int, ...]
    past: int


class Arrange(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Later forwards have this layout; its rotary tables follow.

    With ``returns`` the hidden states of the wanted rows are sent back.
    """

    layout: PoolLayout | StoresLayout
    returns: bool


class Forward(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Compute a forward of the embeddings that follow."""


class Free(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """No later layout has these stores."""

    stores: tuple[int, ...]


class Decode(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Decode your rows of the latents that follow, [batch, latent_channels, height, width] float32."""

    shape: tuple[int, int, int, int]


Message = Start | Meet | Attach | Keep | Arrange | Forward | Free | Decode
_decoder = msgspec.msgpack.Decoder(Message)


def write(pipe: IO[bytes], message: Message) -> None:
    """Send one message.

    Raises:
        OSError: the rank has ended.
    """
    data = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read(descriptor: int) -> Message | None:
    """The next message; None at the end of the pipe."""
    head = _exactly(descriptor, _LENGTH.size)
    body = None if head is None else _exactly(descriptor, _LENGTH.unpack(head)[0])
    return None if body is None else _decoder.decode(body)


def _exactly(descriptor: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        more = os.read(descriptor, size - len(data))
        if not more:
            return None
        data += more
    return data
