"""What the stages tell each other: frozen, typed, and the only thing that travels.

Messages are ``msgspec.Struct``s: frozen dataclasses with a strict codec (unknown
fields and wrong types are refused) and tagged unions. Stages exchange them as
MessagePack in one UINT8 tensor.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, TypeVar

import msgspec


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages."""


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """MessagePack bytes of ``message``."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[M]) -> M:
    """The message of type ``kind`` in ``data``.

    Raises:
        msgspec.ValidationError: ``data`` is not a ``kind``.
    """
    return msgspec.msgpack.decode(data, type=kind)


class Branch(StrEnum):
    """The contexts of guidance: ``cfg_text`` has no prompt, ``cfg_img`` no picture."""

    GEN = "gen"
    CFG_TEXT = "cfg_text"
    CFG_IMG = "cfg_img"


class TextSegment(Message, frozen=True, tag="text"):
    """Tokens appended causally, one position each, markers included."""

    token_ids: tuple[int, ...]


class _PictureSegment(Message, frozen=True):
    """One bidirectional block at one position; ``pixels`` are uint8 [height, width, 3]."""

    height: int
    width: int
    pixels: bytes


class VitSegment(_PictureSegment, frozen=True, tag="vit"):
    """A picture for understanding, resized for the ViT already."""


class VaeSegment(_PictureSegment, frozen=True, tag="vae"):
    """A picture for generation, resized for the autoencoder already."""


Segment = TextSegment | VitSegment | VaeSegment


class BranchPlan(Message, frozen=True):
    """One branch's context. With ``same_as`` it is another branch's, token for token,
    and ``segments`` is empty: it needs no forward of its own."""

    branch: Branch
    segments: tuple[Segment, ...] = ()
    same_as: Branch | None = None


class FlowSettings(Message, frozen=True):
    """What the denoising loop needs of a request; names and meaning as in the paper's code.

    ``height`` and ``width`` are pixels. ``num_inference_steps`` counts sample points
    (N points are N-1 updates). Guidance acts where ``lo < t <= hi`` of ``cfg_interval``.
    """

    height: int
    width: int
    num_inference_steps: int
    seed: int
    timestep_shift: float
    cfg_text_scale: float
    cfg_img_scale: float
    cfg_interval: tuple[float, float]
    cfg_renorm_type: Literal["global", "channel", "text_channel"]
    cfg_renorm_min: float
    num_pictures: int = 1
    cache: Literal["none", "taylorseer"] = "none"

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed a picture: ``seed``, ``seed`` + 1, ..."""
        return tuple(range(self.seed, self.seed + self.num_pictures))


class Decoding(Message, frozen=True):
    """How text is decoded, and what for.

    ``first_token`` is fed first: the start token, or the last token of a prompt taken
    verbatim. With ``purpose`` "think" the text is appended to the ``gen`` context, as a
    segment of its own, before that is lent; with "answer" it is the result, once per seed.
    ``temperature`` 0 is greedy. ``max_think_tokens`` bounds the tokens before a
    ``</think>`` where ``split_thinking`` is set.
    """

    purpose: Literal["answer", "think"]
    first_token: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    split_thinking: bool = False
    max_think_tokens: int | None = None


class Usage(Message, frozen=True):
    """Token counts: the context a request brought, text and latents it made.

    ``reasoning_tokens`` are those of ``text_tokens`` that were thinking.
    """

    prompt_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    reasoning_tokens: int = 0


class Plan(Message, frozen=True):
    """``cfg_expand``'s answer: everything the later stages need of a request."""

    request_id: str
    branches: tuple[BranchPlan, ...]
    usage: Usage
    flow: FlowSettings | None = None  # None where no picture is wanted
    decoding: Decoding | None = None


class KVGeometry(Message, frozen=True):
    """A block is ``[layers, 2, block_tokens, kv_heads, head_dim]`` of ``dtype`` (a torch dtype's name)."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
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
    slot: int
    lease: int
    blocks: tuple[int, ...]
    tokens: int
    next_position: int
    geometry: KVGeometry
    expires_at: float
    address: Address | None = None


def encode_handle(handle: ContextHandle) -> bytes:
    """JSON of ``handle``: what the connector's self-test passes between the stages."""
    return msgspec.json.encode(handle)


def decode_handle(data: bytes) -> ContextHandle:
    """The handle in JSON ``data``; raises ``msgspec.ValidationError``."""
    return msgspec.json.decode(data, type=ContextHandle)


class BranchContext(Message, frozen=True):
    """Which handle a branch reads: its own, or another branch's."""

    branch: Branch
    handle: int


class DenoiseJob(Message, frozen=True):
    """The thinker's answer, the DiT's input: flow settings and leased contexts."""

    request_id: str
    flow: FlowSettings
    handles: tuple[ContextHandle, ...]
    branches: tuple[BranchContext, ...]


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
