"""The recorded requests of ``tests/data/cases-a`` and their expected numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bagel_triton.protocol.request import GenerationRequest

# A field that a case leaves out has the authors' default, which is not always the server's.
LIBRARY_DEFAULTS: dict[str, object] = {
    "cfg_img_scale": 1.5,
    "cfg_interval": [0.4, 1.0],
    "cfg_renorm_type": "global",
    "cfg_renorm_min": 0.0,
    "timestep_shift": 3.0,
    "num_timesteps": 50,
}


@dataclass(frozen=True)
class Case:
    """One recorded request; ``height`` and ``width`` are the image's pixels, 0 for text output.

    Of recorded keys and values, tokens 0, ``kv_token_stride``, ... are kept.
    """

    name: str
    task: str
    prompt: str
    prompt_ids: tuple[int, ...]
    height: int
    width: int
    request: GenerationRequest
    text: str | None
    kv_token_stride: int
    images: tuple[Path, ...]
    directory: Path

    @property
    def plain(self) -> bool:
        """Text to image, without think and without TaylorSeer."""
        return self.task == "text2img" and not self.request.think and self.request.cache is None

    def tensors(self) -> dict[str, Tensor]:
        """The recorded intermediate tensors by name."""
        return load_file(self.directory / f"{self.name}.safetensors")

    def image(self) -> Tensor:
        """The recorded image, uint8 [height, width, 3]."""
        with Image.open(self.directory / f"{self.name}.expected.png") as image:
            return torch.from_numpy(np.array(image.convert("RGB")))


def load_cases(directory: Path) -> tuple[Case, ...]:
    """Every request recorded in ``directory``."""
    return tuple(_case(fields, directory) for fields in json.loads((directory / "cases.json").read_text())["cases"])


def _case(fields: dict[str, Any], directory: Path) -> Case:
    makes_image = fields["task"] in ("text2img", "img2img")
    images = tuple(directory / name for name in fields.get("input_images", ()))
    options = _image_options(fields) if makes_image else _text_options(fields)
    if images:
        options["image"] = tuple(path.read_bytes() for path in images)
    if fields["kw"].get("think"):
        options["think"] = True
    height, width = fields.get("output_size_hw", (0, 0))
    return Case(
        name=fields["name"],
        task=fields["task"],
        prompt=fields["prompt"],
        prompt_ids=tuple(fields["prompt_ids"]),
        height=height,
        width=width,
        request=GenerationRequest(prompt=fields["prompt"], **options),
        text=fields.get("expected_text"),
        kv_token_stride=fields.get("kv_token_stride", 1),
        images=images,
        directory=directory,
    )


def _image_options(fields: dict[str, Any]) -> dict[str, Any]:
    options = LIBRARY_DEFAULTS | fields["kw"]
    options.pop("think", None)
    options["num_inference_steps"] = options.pop("num_timesteps")
    options["cfg_interval"] = tuple(options["cfg_interval"])
    if options.pop("enable_taylorseer", False):
        options["cache"] = "taylorseer"
    if "max_think_token_n" in options:
        options["max_think_tokens"] = options.pop("max_think_token_n") - 1  # the recorded one counts the start token
    if "size" in fields:
        options["height"], options["width"] = fields["size"]
    settings: dict[str, Any] = options | {"seed": fields["seed"], "modality": "image"}
    return settings


def _text_options(fields: dict[str, Any]) -> dict[str, Any]:
    recorded = fields["kw"]
    tokens: int = recorded["max_new_tokens"] if "max_new_tokens" in recorded else recorded["max_think_token_n"] - 1
    return {"max_tokens": tokens, "modality": "text"}
