"""The request as a user writes it: the one declaration of every field.

:class:`GenerationRequest` declares each field with its type, tensor, default, limits and
meaning. The OpenAI schema, the Triton tensors, ``config.pbtxt``, the clients and the table
in docs/api.md are derived from it or checked against it. ``None`` means "not given";
``validation.py`` fills in defaults and enforces limits.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from bagel_triton.protocol.messages import (
    LATENT_STRIDE,
    MAX_LOGIT_BIAS,
    MAX_NEW_TOKENS,
    MAX_PARTIAL_IMAGES,
    MAX_RESULTS,
    MAX_SCALE,
    MAX_SHIFT,
    MAX_STEPS,
    MAX_TOP_LOGPROBS,
    MIN_SHIFT,
    MIN_STEPS,
)

Renorm = Literal["global", "channel", "text_channel"]
Cache = Literal["none", "taylorseer"]
Modality = Literal["image", "text"]
MAX_SEED = 2**63 - 1 - 16  # leaves room for the seeds of further images
RANDOM_SEED = -1
MAX_INPUT_IMAGES, MAX_STOPS, MAX_BIASED_TOKENS = 10, 16, 1024
MAX_PRIORITY, MAX_TIMEOUT_S = 1000, 86400
ABORT = "abort"  # input of ``bagel`` beside a request's: a token to abort it by; alone: the token of one to abort
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 2
ASPECT_RATIO = r"\s*([1-9][0-9]{0,3}(?:\.[0-9]{1,4})?)\s*:\s*([1-9][0-9]{0,3}(?:\.[0-9]{1,4})?)\s*"


class FlowDefaults(msgspec.Struct, frozen=True):
    """Values of the image fields a request leaves out."""

    side: int = 512
    num_inference_steps: int = 50
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Renorm = "global"
    cfg_renorm_min: float = 0.0
    timestep_shift: float = 3.0


class TextDefaults(msgspec.Struct, frozen=True):
    """Values of the text fields a request leaves out; greedy without a temperature."""

    max_tokens: int = 2048
    max_think_tokens: int = 1000
    temperature_with_nucleus: float = 1.0  # if only top_p, top_k or min_p implies sampling


TEXT2IMG = FlowDefaults()
# The model authors' own settings for editing.
IMG2IMG = FlowDefaults(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
TEXT = TextDefaults()

_NUMPY_TYPES: dict[str, type[np.generic]] = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP64": np.float64,
}


class RequestField(msgspec.Struct, frozen=True):
    """The declaration of one request field.

    Attributes:
        datatype: Triton datatype of the field's tensor.
        doc: meaning, in one line.
        length: elements of that tensor, -1 for any number.
        affects: the requests the field has an effect on: all, those for an image, those
            for a text, those that decode text (an answer or a thought), or those that
            think. It is accepted beside all others.
        default: the value of a request that leaves the field out, as text.
        bounds: the least and the greatest value; the least is excluded if ``above`` is set.
        choices: every value of a field that takes only a few.
        limits: the allowed values in words, where bounds and choices do not say all of it.
        aliases: other names in a JSON body.
        unset: a value that means "not given", where clients have one.
        ensemble: whether ``bagel_text2img`` takes it.
    """

    datatype: str
    doc: str
    length: int = 1
    affects: Literal["all", "image", "text", "decoding", "thinking"] = "all"
    default: str = ""
    bounds: tuple[float, float] | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    limits: str = ""
    aliases: tuple[str, ...] = ()
    unset: int | None = None
    ensemble: bool = False

    @property
    def numpy_type(self) -> type[np.generic]:
        """The array type of ``datatype``."""
        return _NUMPY_TYPES[self.datatype]

    @property
    def allowed(self) -> str:
        """The allowed values in words; empty if every value of the type is."""
        if self.choices:
            return ", ".join(self.choices)
        if self.bounds is None:
            return self.limits
        noun = "an integer" if self.datatype.startswith("INT") else "a number"
        low, high = self.bounds
        return f"{noun} {f'above {low}, at most' if self.above else f'from {low} to'} {high}{self.limits}"

    def permits(self, value: Any) -> bool:
        """Whether ``value`` is one of ``choices`` or in the range; NaN is in none."""
        if self.choices:
            return value in self.choices
        if self.bounds is None or (self.unset is not None and value == self.unset):
            return True
        low, high = self.bounds
        return bool(low < value <= high if self.above else low <= value <= high)


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """A piece of text in a turn."""

    text: str


class ImageRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="image"):
    """An image in a turn, by its index in the request's ``image``."""

    index: int


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation.

    A last one of the assistant is continued by a text, unless it has ``ended``.
    """

    role: Literal["system", "user", "assistant"]
    parts: tuple[TextPart | ImageRef, ...]
    ended: bool = False


def _two(plain: object, editing: object) -> str:
    """A default that is another one for editing, as text."""
    return f"{plain}; editing {editing}"


_SIDE = RequestField(
    "INT32",
    "pixels; one side alone means a square",
    affects="image",
    default=f"{TEXT2IMG.side}, or the side that the checkpoint was trained for below it; editing the resized input's",
    limits=f"a multiple of {LATENT_STRIDE} from {LATENT_STRIDE} to the checkpoint's limit (1024 for the published one)",
    ensemble=True,
)


class GenerationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request: ``prompt`` and ``image``, or ``messages`` that refer to ``image``.

    Scales are FP64 tensors: a float32 4.1 is not the client's 4.1.
    """

    prompt: Annotated[str | None, RequestField("BYTES", "the prompt, unless messages are given", ensemble=True)] = None
    image: Annotated[
        tuple[bytes, ...] | None,
        RequestField(
            "BYTES",
            "encoded images, in order",
            length=-1,
            default="none",
            limits=f"at most {MAX_INPUT_IMAGES} encoded images",
        ),
    ] = None
    messages: Annotated[
        tuple[Turn, ...] | None,
        RequestField("BYTES", "a whole conversation, instead of prompt", limits="a list of turns as JSON"),
    ] = None
    modality: Annotated[
        str | None,
        RequestField("BYTES", "the kind of output to generate", default="image", choices=typing.get_args(Modality)),
    ] = None
    negative_prompt: Annotated[
        str | None,
        RequestField(
            "BYTES",
            "guidance leads away from it: it is appended to the context without the prompt",
            affects="image",
            default="none",
            ensemble=True,
        ),
    ] = None
    height: Annotated[int | None, _SIDE] = None
    width: Annotated[int | None, _SIDE] = None
    aspect_ratio: Annotated[
        str | None,
        RequestField(
            "BYTES",
            "width to height of an image of the default's area, or of one whose other side is given",
            affects="image",
            default="the default size's",
            limits="'W:H', such as '16:9'",
        ),
    ] = None
    num_inference_steps: Annotated[
        int | None,
        RequestField(
            "INT32",
            "sample points of the flow: N points are N - 1 updates",
            affects="image",
            default=str(TEXT2IMG.num_inference_steps),
            bounds=(MIN_STEPS, MAX_STEPS),
            aliases=("steps",),
            ensemble=True,
        ),
    ] = None
    seed: Annotated[
        int | None,
        RequestField(
            "INT64",
            "seed of the noise and of sampled text",
            default="drawn, and reported",
            bounds=(RANDOM_SEED, MAX_SEED),
            limits=f"; {RANDOM_SEED} draws one",
            ensemble=True,
        ),
    ] = None
    n: Annotated[
        int | None,
        RequestField(
            "INT32",
            "number of results",
            default="1",
            bounds=(1, MAX_RESULTS),
            aliases=("num_outputs_per_prompt", "num_images_per_prompt"),
        ),
    ] = None
    partial_images: Annotated[
        int | None,
        RequestField(
            "INT32",
            "at most so many previews of each image; those not decoded before the image are left out",
            affects="image",
            default="0",
            bounds=(0, MAX_PARTIAL_IMAGES),
        ),
    ] = None
    cfg_text_scale: Annotated[
        float | None,
        RequestField(
            "FP64",
            "guidance by the prompt; at most 1 switches all guidance off",
            affects="image",
            default=str(TEXT2IMG.cfg_text_scale),
            bounds=(0, MAX_SCALE),
            limits=" (at most 1 switches guidance off)",
            aliases=("guidance_scale", "cfg_scale"),
            ensemble=True,
        ),
    ] = None
    cfg_img_scale: Annotated[
        float | None,
        RequestField(
            "FP64",
            "guidance by the images; at most 1 switches it off",
            affects="image",
            default=_two(TEXT2IMG.cfg_img_scale, IMG2IMG.cfg_img_scale),
            bounds=(0, MAX_SCALE),
            limits=" (at most 1 switches guidance off)",
            aliases=("true_cfg_scale",),
            ensemble=True,
        ),
    ] = None
    cfg_interval: Annotated[
        tuple[float, float] | None,
        RequestField(
            "FP64",
            "flow times at which guidance acts: low < t <= high, t from 1 (noise) to 0",
            length=2,
            affects="image",
            default=_two(list(TEXT2IMG.cfg_interval), list(IMG2IMG.cfg_interval)),
            limits="[low, high] with 0 <= low <= high <= 1",
            ensemble=True,
        ),
    ] = None
    cfg_renorm_type: Annotated[
        str | None,
        RequestField(
            "BYTES",
            "scale the guided velocity back over the whole image, each token, or each token before image guidance",
            affects="image",
            default=_two(TEXT2IMG.cfg_renorm_type, IMG2IMG.cfg_renorm_type),
            choices=typing.get_args(Renorm),
            ensemble=True,
        ),
    ] = None
    cfg_renorm_min: Annotated[
        float | None,
        RequestField(
            "FP64",
            "least factor of that scaling",
            affects="image",
            default=str(TEXT2IMG.cfg_renorm_min),
            bounds=(0, 1),
            ensemble=True,
        ),
    ] = None
    timestep_shift: Annotated[
        float | None,
        RequestField(
            "FP64",
            "more than 1 spends more steps near the noise",
            affects="image",
            default=str(TEXT2IMG.timestep_shift),
            bounds=(MIN_SHIFT, MAX_SHIFT),
            aliases=("flow_shift",),
            ensemble=True,
        ),
    ] = None
    cache: Annotated[
        str | None,
        RequestField(
            "BYTES",
            "extrapolate some of the steps: faster, and another image",
            affects="image",
            default="none",
            choices=typing.get_args(Cache),
            ensemble=True,
        ),
    ] = None
    think: Annotated[
        bool | None, RequestField("BOOL", "think before the image or the answer", default="false; true in bagel_think")
    ] = None
    max_think_tokens: Annotated[
        int | None,
        RequestField(
            "INT32",
            "longest thinking, in new tokens",
            affects="thinking",
            default=str(TEXT.max_think_tokens),
            bounds=(1, MAX_NEW_TOKENS),
            aliases=("thinking_budget", "thinking_token_budget"),
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        RequestField(
            "INT32",
            "longest answer, in new tokens, thinking included",
            affects="text",
            default=str(TEXT.max_tokens),
            bounds=(1, MAX_NEW_TOKENS),
            limits="; -1 has the default",
            aliases=("max_completion_tokens",),
            unset=-1,
        ),
    ] = None
    temperature: Annotated[
        float | None,
        RequestField(
            "FP64",
            "divides the logits before sampling; less than 0.00001 is 0",
            affects="decoding",
            default=f"0; {TEXT.temperature_with_nucleus:g} with top_p, top_k or min_p",
            bounds=(0, 2),
            limits="; 0 is greedy",
            aliases=("text_temperature",),
        ),
    ] = None
    top_p: Annotated[
        float | None,
        RequestField(
            "FP64",
            "sample from the most probable tokens that reach this probability together",
            affects="decoding",
            default="1.0",
            bounds=(0, 1),
            limits="; 0 is greedy",
        ),
    ] = None
    top_k: Annotated[
        int | None,
        RequestField(
            "INT32",
            "sample from the k most probable tokens",
            affects="decoding",
            default="0",
            limits="an integer >= 1, or 0 or -1 for no limit",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        RequestField(
            "FP64",
            "sample from tokens at least this probable, relative to the most probable one",
            affects="decoding",
            default="0",
            bounds=(0, 1),
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        RequestField(
            "FP64",
            "above 1 makes tokens of the prompt and of the text so far less likely",
            affects="decoding",
            default="1.0",
            bounds=(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        RequestField(
            "FP64",
            "subtracted from a token's logit for each time the text so far has it",
            affects="decoding",
            default="0",
            bounds=(-2, 2),
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        RequestField(
            "FP64",
            "subtracted from a token's logit once the text so far has it",
            affects="decoding",
            default="0",
            bounds=(-2, 2),
        ),
    ] = None
    logit_bias: Annotated[
        Mapping[int, float] | None,
        RequestField(
            "BYTES",
            "added to the logits of these tokens; a JSON object as a tensor",
            affects="decoding",
            default="none",
            limits=f"an object of at most {MAX_BIASED_TOKENS} token ids, each with a number "
            f"from {-MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}",
        ),
    ] = None
    top_logprobs: Annotated[
        int | None,
        RequestField(
            "INT32",
            "report each token's log-probability, beside this many of the most probable",
            affects="text",
            default="none",
            bounds=(0, MAX_TOP_LOGPROBS),
        ),
    ] = None
    ignore_eos: Annotated[
        bool | None,
        RequestField(
            "BOOL", "the text runs to max_tokens: its end token is never chosen", affects="text", default="false"
        ),
    ] = None
    min_tokens: Annotated[
        int | None,
        RequestField(
            "INT32",
            "its end token is not chosen before so many new tokens",
            affects="text",
            default="0",
            bounds=(0, MAX_NEW_TOKENS),
        ),
    ] = None
    stop: Annotated[
        tuple[str, ...] | None,
        RequestField(
            "BYTES",
            "the text ends before the first of these",
            length=-1,
            affects="text",
            default="none",
            limits=f"at most {MAX_STOPS} texts, none empty",
        ),
    ] = None
    lora: Annotated[
        str | None,
        RequestField(
            "BYTES",
            "a LoRA adapter, by its name in lora_modules; also as model: NAME, or MODEL:NAME",
            default="none",
            limits="the name of an adapter of this server",
        ),
    ] = None
    priority: Annotated[
        int | None,
        RequestField(
            "INT32",
            "order of the requests that wait for a stage; equals by age",
            default="0",
            bounds=(-MAX_PRIORITY, MAX_PRIORITY),
            limits="; lower comes first",
            ensemble=True,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        RequestField(
            "FP64",
            "seconds until the request ends with DeadlineExceeded, wherever it is",
            default="3600 (request_timeout_s of the deploy YAML)",
            bounds=(0, MAX_TIMEOUT_S),
            above=True,
            ensemble=True,
        ),
    ] = None


def _declared() -> dict[str, RequestField]:
    hints = typing.get_type_hints(GenerationRequest, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


REQUEST_FIELDS: dict[str, RequestField] = _declared()
FIELD_TYPES: dict[str, Any] = typing.get_type_hints(GenerationRequest)  # ``T | None`` by field
FIELD_ALIASES: dict[str, str] = {alias: name for name, field in REQUEST_FIELDS.items() for alias in field.aliases}
ENSEMBLE_FIELDS: tuple[str, ...] = tuple(name for name, field in REQUEST_FIELDS.items() if field.ensemble)
