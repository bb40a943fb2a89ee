"""What the thinker answers: texts, and contexts that a lease lends from it to the DiT."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bagel_triton.messages import Branch, Count, FlowSettings, Index, Message, Schedule, Seed

LEASE_SLOTS = 4096  # contexts that are lent at a time


class KVGeometry(Message, frozen=True):
    """A block is ``[layers, 2, block_tokens, kv_heads, head_dim]`` of ``dtype`` (a torch dtype's name)."""

    layers: Count
    kv_heads: Count
    head_dim: Count
    block_tokens: Count
    dtype: str


class MooncakeAddress(Message, frozen=True, tag="mooncake"):
    """Where a transfer engine finds an arena of ``slots`` tokens.

    ``peer`` is the engine, ``host:port``; ``store`` and ``words`` are addresses in its
    process.
    """

    peer: str
    store: int
    words: int
    slots: int


class CudaAddress(Message, frozen=True, tag="cuda_ipc"):
    """An arena of ``slots`` tokens on the GPU ``device`` (its UUID); ``memory`` is its CUDA IPC handle."""

    device: str
    memory: bytes
    slots: int


Address = MooncakeAddress | CudaAddress


class ContextHandle(Message, frozen=True):
    """A lease on one branch's context: enough to map and check it, no KV.

    ``blocks`` are block indices in the arena named ``arena`` of generation
    ``generation``; an empty context has none and needs no lease (``lease`` 0).
    ``expires_at`` is ``time.monotonic()`` seconds, comparable between processes of
    one host only. ``address`` is what a connector needs beyond the arena's name.
    """

    request_id: str
    branch: Branch
    connector: str
    arena: str
    generation: int
    slot: Annotated[int, Meta(ge=0, lt=LEASE_SLOTS)]
    lease: Seed
    blocks: tuple[Index, ...]
    tokens: Index
    next_position: Index
    geometry: KVGeometry
    expires_at: float
    address: Address | None = None

    def __post_init__(self) -> None:
        if bool(self.lease) != bool(self.tokens):
            raise ValueError(f"lease {self.lease} is of {self.tokens} tokens: an empty context alone has none")
        if "\0" in self.arena or "\0" in self.request_id:
            raise ValueError("a name holds a NUL")
        if len(self.blocks) != -(-self.tokens // self.geometry.block_tokens):
            raise ValueError(f"{len(self.blocks)} blocks do not hold {self.tokens} tokens")


def encode_handle(handle: ContextHandle) -> bytes:
    """JSON of ``handle``: what the connector's self-test passes between the stages."""
    return msgspec.json.encode(handle)


def decode_handle(data: bytes) -> ContextHandle:
    """The handle in JSON ``data``; raises ``msgspec.ValidationError``."""
    return msgspec.json.decode(data, type=ContextHandle)


class BranchContext(Message, frozen=True):
    """Which handle a branch reads: its own, or another branch's."""

    branch: Branch
    handle: Index


class DenoiseJob(Message, frozen=True):
    """The thinker's answer, the DiT's input: flow settings and leased contexts."""

    request_id: str
    flow: FlowSettings
    handles: tuple[ContextHandle, ...]
    branches: tuple[BranchContext, ...]
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        if {context.branch for context in self.branches} != set(Branch):
            raise ValueError(f"branches must have a context for each of {', '.join(Branch)}")
        if any(context.handle >= len(self.handles) for context in self.branches):
            raise ValueError(f"a branch reads a handle beyond the {len(self.handles)} there are")


class Answer(Message, frozen=True):
    """One decoded text: what was thought, what is answered, why it ended."""

    content: str
    reasoning: str
    finish_reason: Literal["stop", "length"]
    tokens: int
    reasoning_tokens: int


class Thoughts(Message, frozen=True):
    """The thinker's answer: texts it decoded, and contexts where a picture is to follow."""

    answers: tuple[Answer, ...] = ()
    job: DenoiseJob | None = None
