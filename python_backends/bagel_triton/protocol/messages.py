"""The messages between stages: frozen, typed, and the only form in which stages exchange data.

Messages are ``msgspec.Struct``s: frozen dataclasses with a strict codec (unknown
fields, wrong types and impossible values are refused) and tagged unions. They travel as
MessagePack in one tensor. Decoding refuses values that no stage can work with, whatever
their source. The limits of a user's request, which depend on the checkpoint too, are
checked in ``validation.py``.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Index = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
MIN_STEPS, MAX_STEPS = 2, 1000
MAX_SCALE = 1000
MIN_SHIFT, MAX_SHIFT = 0.001, 1000
MAX_RESULTS = 10  # images or texts of a request
LATENT_STRIDE = 16  # pixels that a latent token covers per side: VAE stride 8, patches of 2
MAX_NEW_TOKENS = 32768
MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS = 100, 20
MAX_PARTIAL_IMAGES = 3  # previews of one image
Share = Annotated[float, Meta(ge=0, le=1)]
Scale = Annotated[float, Meta(ge=0, le=MAX_SCALE)]


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


class SchedulingParams(Message, frozen=True):
    """Order and end of a request's work: lower ``priority`` first, previews last, until ``deadline`` (Unix seconds)."""

    priority: int = 0
    deadline: float | None = None
    preview: bool = False


class Branch(StrEnum):
    """The contexts of classifier-free guidance: ``cfg_text`` lacks the prompt, ``cfg_img`` the images."""

    GEN = "gen"
    CFG_TEXT = "cfg_text"
    CFG_IMG = "cfg_img"


class TextSegment(Message, frozen=True, tag="text"):
    """Tokens appended causally, one RoPE position each, markers included."""

    token_ids: Annotated[tuple[Index, ...], Meta(min_length=1)]


class _ImageSegment(Message, frozen=True):
    """An image: bidirectional attention, one RoPE position; ``pixels`` are uint8 [height, width, 3]."""

    height: Count
    width: Count
    pixels: bytes

    def __post_init__(self) -> None:
        if len(self.pixels) != self.height * self.width * 3:
            raise ValueError(f"{len(self.pixels)} bytes are not {self.height}x{self.width} pixels")


class VitSegment(_ImageSegment, frozen=True, tag="vit"):
    """An image for understanding, already resized for the ViT."""


class VaeSegment(_ImageSegment, frozen=True, tag="vae"):
    """An image for generation, already resized for the autoencoder."""


Segment = TextSegment | VitSegment | VaeSegment


class BranchPlan(Message, frozen=True):
    """One branch's context. With ``same_as`` it equals another branch's and needs no forward;
    ``segments`` is empty then."""

    branch: Branch
    segments: tuple[Segment, ...] = ()
    same_as: Branch | None = None


class FlowSettings(Message, frozen=True):
    """A request's parameters for denoising; names and meaning as in the model authors' code.

    ``height`` and ``width`` are pixels. ``num_inference_steps`` counts sample points
    (N points are N-1 updates). Guidance acts where ``lo < t <= hi`` of ``cfg_interval``.
    ``partial_images`` counts the previews of each image.
    """

    height: Count
    width: Count
    num_inference_steps: Annotated[int, Meta(ge=MIN_STEPS, le=MAX_STEPS)]
    seed: Seed
    timestep_shift: Annotated[float, Meta(ge=MIN_SHIFT, le=MAX_SHIFT)]
    cfg_text_scale: Scale
    cfg_img_scale: Scale
    cfg_interval: tuple[Share, Share]
    cfg_renorm_type: Literal["global", "channel", "text_channel"]
    cfg_renorm_min: Share
    num_images: Annotated[int, Meta(ge=1, le=MAX_RESULTS)] = 1
    cache: Literal["none", "taylorseer"] = "none"
    partial_images: Annotated[int, Meta(ge=0, le=MAX_PARTIAL_IMAGES)] = 0

    def __post_init__(self) -> None:
        for name in ("timestep_shift", "cfg_text_scale", "cfg_img_scale", "cfg_renorm_min"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed an image: ``seed``, ``seed`` + 1, ..."""
        return tuple(range(self.seed, self.seed + self.num_images))


class Decoding(Message, frozen=True):
    """Settings of text decoding, and its purpose.

    ``first_token`` is fed first: the start token, or the last token of a prompt taken
    verbatim. With ``purpose`` "think" the text becomes a further segment of the ``gen``
    context, which is lent afterwards; with "answer" it is the result, once per seed.
    ``temperature`` 0 is greedy. ``frequency_penalty`` and ``presence_penalty`` concern the
    decoded tokens, ``repetition_penalty`` the context's as well. ``top_logprobs`` requests
    each token's log-probability and those of this many alternatives. The end token is not
    chosen before ``min_new_tokens``. ``max_think_tokens``
    bounds the tokens before a ``</think>`` where ``split_thinking`` is set.
    """

    purpose: Literal["answer", "think"]
    first_token: Index
    max_new_tokens: Annotated[int, Meta(ge=1, le=MAX_NEW_TOKENS)]
    min_new_tokens: Annotated[int, Meta(ge=0, le=MAX_NEW_TOKENS)] = 0
    temperature: Annotated[float, Meta(ge=0)] = 0.0
    top_p: Annotated[float, Meta(gt=0)] = 1.0
    top_k: Index = 0
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: dict[Index, Annotated[float, Meta(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]] = msgspec.field(
        default_factory=dict
    )
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stop: tuple[str, ...] = ()
    seeds: Annotated[tuple[Seed, ...], Meta(min_length=1, max_length=MAX_RESULTS)] = (0,)
    split_thinking: bool = False
    max_think_tokens: Count | None = None


class TokenLogprob(Message, frozen=True, omit_defaults=True):
    """A token and the natural logarithm of its probability.

    The probability is the model's own: softmax of the logits before penalties, bias and
    temperature. ``bytes`` are the token's UTF-8; ``token`` is their text, with U+FFFD for a
    part of a character. ``top`` holds the most probable tokens at the same place, best first.
    """

    token: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Usage(Message, frozen=True):
    """Token counts of a request: its context, decoded text, generated latents.

    ``reasoning_tokens`` is the part of ``text_tokens`` that was thinking, ``prompt_image_tokens``
    the part of ``prompt_tokens`` that stands for images.
    """

    prompt_tokens: Index = 0
    text_tokens: Index = 0
    image_tokens: Index = 0
    reasoning_tokens: Index = 0
    prompt_image_tokens: Index = 0


class Plan(Message, frozen=True):
    """The answer of ``cfg_expand``: everything that the later stages need. ``lora`` names an adapter, if it is not
    empty."""

    request_id: str
    branches: tuple[BranchPlan, ...]
    usage: Usage
    flow: FlowSettings | None = None  # None where no image is wanted
    decoding: Decoding | None = None
    scheduling: SchedulingParams = SchedulingParams()
    lora: str = ""

    def __post_init__(self) -> None:
        own = [plan.branch for plan in self.branches if plan.same_as is None]
        if own[:1] != [Branch.GEN] or len({plan.branch for plan in self.branches}) != len(self.branches):
            raise ValueError("branches must begin with gen and name none twice")
        if lost := [plan.same_as for plan in self.branches if plan.same_as not in (None, *own)]:
            raise ValueError(f"a branch is the same as {lost[0]}, which has no context")


LEASE_SLOTS = 4096  # leases at a time


class KVGeometry(Message, frozen=True):
    """A block is ``[layers, 2, block_tokens, kv_heads, head_dim]`` of ``dtype`` (a torch dtype's name)."""

    layers: Count
    kv_heads: Count
    head_dim: Count
    block_tokens: Count
    dtype: str


class MooncakeAddress(Message, frozen=True, tag="mooncake"):
    """The address of a pool of ``slots`` tokens for a transfer engine.

    ``peer`` is the engine, ``host:port``; ``store`` and ``words`` are addresses in its
    process.
    """

    peer: str
    store: int
    words: int
    slots: int


class CudaAddress(Message, frozen=True, tag="cuda_ipc"):
    """A pool of ``slots`` tokens on the GPU ``device`` (its UUID); ``memory`` is its CUDA IPC handle."""

    device: str
    memory: bytes
    slots: int


Address = MooncakeAddress | CudaAddress


class KVHandle(Message, frozen=True):
    """A lease on one branch's context: enough to map and check it, without any KV.

    ``blocks`` are block indices in the pool named ``pool`` of generation
    ``generation``; an empty context has none and needs no lease (``lease`` 0).
    ``expires_at`` is ``time.monotonic()`` seconds, which only processes of one host can
    compare. ``address`` is what a connector needs beyond the pool's name.
    """

    request_id: str
    branch: Branch
    connector: str
    pool: str
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
        if "\0" in self.pool or "\0" in self.request_id:
            raise ValueError("a name holds a NUL")
        if len(self.blocks) != -(-self.tokens // self.geometry.block_tokens):
            raise ValueError(f"{len(self.blocks)} blocks do not hold {self.tokens} tokens")


def encode_handle(handle: KVHandle) -> bytes:
    """JSON of ``handle``, for the connector's self-test."""
    return msgspec.json.encode(handle)


def decode_handle(data: bytes) -> KVHandle:
    """The handle in JSON ``data``; raises ``msgspec.ValidationError``."""
    return msgspec.json.decode(data, type=KVHandle)


class BranchKV(Message, frozen=True):
    """The handle that a branch reads: its own, or another branch's."""

    branch: Branch
    handle: Index


class DenoiseJob(Message, frozen=True):
    """The DiT's input: flow settings and leased contexts, and the adapter that those were computed with."""

    request_id: str
    flow: FlowSettings
    handles: tuple[KVHandle, ...]
    branches: tuple[BranchKV, ...]
    scheduling: SchedulingParams = SchedulingParams()
    lora: str = ""

    def __post_init__(self) -> None:
        if {context.branch for context in self.branches} != set(Branch):
            raise ValueError(f"branches must have a context for each of {', '.join(Branch)}")
        if any(context.handle >= len(self.handles) for context in self.branches):
            raise ValueError(f"a branch reads a handle beyond the {len(self.handles)} there are")


class Answer(Message, frozen=True):
    """One decoded text: thinking, answer, and the reason why it ended.

    ``logprobs`` has an entry for each token of the answer, those of the thinking left out.
    """

    content: str
    reasoning: str
    finish_reason: Literal["stop", "length"]
    tokens: int
    reasoning_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


class ThinkerOutput(Message, frozen=True):
    """The thinker's answer: decoded texts, and the DiT's job if an image follows."""

    answers: tuple[Answer, ...] = ()
    job: DenoiseJob | None = None
