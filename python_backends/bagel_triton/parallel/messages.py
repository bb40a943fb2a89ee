"""Messages of rank 0 to the other ranks of its stage, by a socket each; tensors follow by torch's process group.

A rank waits for its next message on the socket, so an idle one takes no time, and the end of the socket is the end of
rank 0, whatever caused it.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.parallel.layout import PoolLayout, Run, StoresLayout
from bagel_triton.protocol.messages import KVGeometry

_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The first message, which tells the receiver its role.

    It is a rank of ``stage``, a Triton model, on ``device``. With ``share`` the weights are those of the server with
    the configuration's prefix. With ``decodes`` it decodes images, beside what the stage does.
    """

    config: DeployConfig
    stage: str
    rank: int
    device: str
    threads: int
    share: bool
    decodes: bool


class Ready(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A rank's only message: it has its weights."""


class Meet(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Every rank has its weights: join the process group at rank 0's address now, and take part in its self-test."""

    host: str
    port: int


class Attach(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Make a KV cache of ``slots`` for the receiver's heads of the thinker's."""

    slots: int
    geometry: KVGeometry


class Copy(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Copy slots of the KV cache to others."""

    source: Run
    target: Run


class Collect(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Send the keys and values at ``slots`` of the KV cache back."""

    slots: tuple[Run, ...]


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


Message = Start | Ready | Meet | Attach | Copy | Collect | Keep | Arrange | Forward | Free | Decode
_decoder = msgspec.msgpack.Decoder(Message)


def write(connection: socket.socket, message: Message) -> None:
    """Send one message.

    Raises:
        OSError: the other end is gone.
    """
    data = msgspec.msgpack.encode(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def read(connection: socket.socket) -> Message | None:
    """The next message; None where the other end is gone."""
    head = receive_exactly(connection, _LENGTH.size)
    body = None if head is None else receive_exactly(connection, _LENGTH.unpack(head)[0])
    return None if body is None else _decoder.decode(body)


def receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    """The next ``size`` bytes; None where the other end is gone before."""
    data = b""
    while len(data) < size:
        try:
            more = connection.recv(size - len(data))
        except ConnectionError:
            return None
        if not more:
            return None
        data += more
    return data
