#!/usr/bin/env python3
"""Run BAGEL on a batch of prompts in this process, without a server.

python end2end.py --model checkpoints/BAGEL-7B-MoT --prompts "A cute cat" "A red fox"
python end2end.py --model ... --modality img2img --image-path photo.jpg --prompts "Make it night"
python end2end.py --model ... --modality img2text --image-path photo.jpg --prompts "What is this?"
python end2end.py --model ... --modality text2text --txt-prompts prompts.txt --enable-stats
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from common import ProgressBar, print_any_text

from bagel_triton.pipeline.pipeline import GeneratedImage, Item
from bagel_triton.protocol.errors import BagelError, InvalidRequest
from bagel_triton.protocol.events import AnswerEvent, DoneEvent, ProgressEvent
from bagel_triton.protocol.request import TEXT2IMG, GenerationRequest
from bagel_triton.serving import CommandError, flags, memory
from bagel_triton.serving.flags import add_deploy_config, add_revision, checkpoint, deploy_file

# Heavy modules are imported after the arguments are checked: --help must not wait for torch.
if TYPE_CHECKING:
    from torch import Tensor

    from bagel_triton.deploy.config import DeployConfig

HUB_NAME = "ByteDance-Seed/BAGEL-7B-MoT"
OUTPUT_OF = {"text2img": "image", "img2img": "image", "img2text": "text", "text2text": "text"}
FLOW = TEXT2IMG
# Fields of the request by option. An option that is not given leaves the server's default for the modality.
REQUEST_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "--steps": ("num_inference_steps", {"type": int, "help": f"denoising steps (default: {FLOW.num_inference_steps})"}),
    "--height": ("height", {"type": int, "help": f"pixels (default: {FLOW.side}, or the resized input's)"}),
    "--width": ("width", {"type": int, "help": f"pixels (default: {FLOW.side}, or the resized input's)"}),
    "--negative": ("negative_prompt", {"metavar": "TEXT", "help": "negative prompt"}),
    "--lora": ("lora", {"metavar": "NAME", "help": "an adapter of --lora-modules"}),
    "--seed": ("seed", {"type": int, "help": "of every prompt's first result (default: a random one each)"}),
    "--n": ("n", {"type": int, "help": "images or sampled answers a prompt (default: 1)"}),
    "--cfg-text-scale": ("cfg_text_scale", {"type": float, "metavar": "SCALE", "help": "guidance by the text"}),
    "--cfg-img-scale": ("cfg_img_scale", {"type": float, "metavar": "SCALE", "help": "guidance by the image"}),
    "--cfg-interval": ("cfg_interval", {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}),
    "--cfg-renorm-type": ("cfg_renorm_type", {"metavar": "TYPE", "help": "global, channel or text_channel"}),
    "--cfg-renorm-min": ("cfg_renorm_min", {"type": float, "metavar": "MIN", "help": "from 0 to 1"}),
    "--timestep-shift": ("timestep_shift", {"type": float, "metavar": "SHIFT", "help": "of the flow's schedule"}),
    "--cache": ("cache", {"metavar": "KIND", "help": "taylorseer, or none (default)"}),
    "--max-think-tokens": ("max_think_tokens", {"type": int, "metavar": "N", "help": "bound of the thinking"}),
    "--max-tokens": ("max_tokens", {"type": int, "metavar": "N", "help": "bound of an answer"}),
    "--temperature": ("temperature", {"type": float, "metavar": "T", "help": "0, greedy, is the default"}),
    "--top-p": ("top_p", {"type": float, "metavar": "P"}),
    "--top-k": ("top_k", {"type": int, "metavar": "K"}),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print_error(f"{message} (see {self.prog} --help)")
        sys.exit(2)


def print_error(message: str) -> None:
    for line in message.splitlines():  # a deploy file's errors come all at once
        print(f"end2end: error: {line}", file=sys.stderr)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="end2end.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default=HUB_NAME, help="folder, or name at the Hugging Face hub (%(default)s)")
    add_revision(parser)
    parser.add_argument("--modality", default="text2img", choices=OUTPUT_OF, help="default: %(default)s")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", nargs="+", metavar="PROMPT")
    prompts.add_argument("--txt-prompts", type=Path, metavar="FILE", help="one prompt a line; empty lines are skipped")
    parser.add_argument("--image-path", type=Path, nargs="+", metavar="FILE", help="input, for img2img and img2text")
    parser.add_argument("--think", action="store_true", default=None, help="think before each image or answer")
    parser.add_argument("--output", "-o", type=Path, default="bagel_output", help="images' folder (%(default)s)")
    for option, (field, how) in REQUEST_OPTIONS.items():
        parser.add_argument(option, dest=field, **how)
    add_deploy_config(parser)
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the deploy YAML's, or auto)")
    parser.add_argument("--dtype", help="auto, float32 or bfloat16 (default: the deploy YAML's, or auto)")
    parser.add_argument("--enable-stats", action="store_true", help="print each prompt's time in each stage")
    parser.add_argument("--init-timeout", type=float, default=300, metavar="S", help="for loading (%(default)s)")
    silence = "stop when no prompt makes progress for so long (default: the stages' own timeout, 600)"
    parser.add_argument("--batch-timeout", type=float, metavar="S", help=silence)
    flags.add_arguments(parser, exclude=("init_timeout", "batch_timeout"))
    args = parser.parse_args(argv)
    takes_image = args.modality.startswith("img2")
    if takes_image != (args.image_path is not None):
        parser.error(f"--modality {args.modality} {'needs' if takes_image else 'takes no'} --image-path")
    for name in ("init_timeout", "batch_timeout"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')}={value} is not allowed; allowed: seconds > 0")
    return args


def file_bytes(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"{option} {path}: {error.strerror}") from error


def prompts_of(args: argparse.Namespace) -> list[str]:
    if args.prompts:
        return list(args.prompts)
    try:
        lines = file_bytes("--txt-prompts", args.txt_prompts).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CommandError(f"--txt-prompts {args.txt_prompts} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise CommandError(f"--txt-prompts {args.txt_prompts} has no prompt in it")
    return prompts


def common_request(args: argparse.Namespace) -> GenerationRequest:
    """The request of every prompt, without the prompt."""
    fields = {field: getattr(args, field) for field, _ in REQUEST_OPTIONS.values()}
    if fields["cfg_interval"] is not None:
        fields["cfg_interval"] = tuple(fields["cfg_interval"])
    images = tuple(file_bytes("--image-path", path) for path in args.image_path or ())
    return GenerationRequest(image=images or None, modality=OUTPUT_OF[args.modality], think=args.think, **fields)


def configuration(args: argparse.Namespace) -> DeployConfig:
    from bagel_triton.deploy import yaml as deploy_yaml

    config = deploy_yaml.resolve(deploy_file(args.deploy_config), args.model, flags.flags_of(args)).config
    if config.addresses:
        raise CommandError(
            f"--deploy-config {args.deploy_config} puts stages on other hosts; this script runs in one process"
        )
    # Last, as it may be a download.
    config = msgspec.structs.replace(config, checkpoint=str(checkpoint(args.model, args.revision)))
    return config if config.thinker.gpu_memory_utilization is None else memory.require(config)


def option_of(param: str) -> str:
    """The option behind an error's ``param``."""
    field, _, _ = param.partition("[")
    options = {field: option for option, (field, _) in REQUEST_OPTIONS.items()}
    return {**options, "image": "--image-path"}.get(field, f"--{field}")


class Results:
    """Writes images and prints results as they come; ``steps`` is the number of progress steps of a prompt."""

    def __init__(self, prompts: list[str], steps: int, save: Callable[[str, Tensor], Path], bar: ProgressBar) -> None:
        self.done: dict[int, DoneEvent] = {}
        self._steps, self._save, self._bar = steps, save, bar
        self._lines = [[f"[{index}] {prompt}"] for index, prompt in enumerate(prompts)]
        self._step = [0] * len(prompts)

    def take(self, index: int, item: Item[Tensor] | BagelError) -> None:
        lines = self._lines[index]
        if isinstance(item, ProgressEvent) and item.stage == "dit":
            self._advance(index, item.step)
        elif isinstance(item, AnswerEvent):
            texts = {"thinking": item.reasoning.strip(), "answer": item.content.strip()}
            lines.extend(f"{name:<9} {text}" for name, text in texts.items() if text)
        elif isinstance(item, DoneEvent):
            self.done[index] = item
            self._advance(index, self._steps)
            self._bar.write("\n".join(lines))
        elif isinstance(item, BagelError):
            self._bar.write(f"end2end: error: prompt {index}: {item.message}", file=sys.stderr)
            self._advance(index, self._steps)
        elif isinstance(item, GeneratedImage):
            event = item.event  # a file an image: INDEX.png, then INDEX_1.png, ...
            path = self._save(f"{index}_{event.index}" if event.index else f"{index}", item.pixels)
            lines.append(f"image   {path}, {event.width}x{event.height} pixels, seed {event.seed}")

    def _advance(self, index: int, step: int) -> None:
        self._step[index] = step
        self._bar.show("batch", sum(self._step), self._steps * len(self._step))


def run(args: argparse.Namespace) -> int:
    """The exit status: 0, or 1 where a prompt failed."""
    prompts, common = prompts_of(args), common_request(args)
    config = configuration(args)
    if common.modality == "image":
        args.output.mkdir(parents=True, exist_ok=True)

    from bagel_triton.pipeline import offline

    try:
        offline.check(config, common)
    except InvalidRequest as error:
        raise CommandError(f"{option_of(error.param or '')}: {error.message}") from error
    start = time.monotonic()
    with contextlib.closing(offline.load(config, args.init_timeout)) as stages:
        loaded = time.monotonic()
        silence_s = args.batch_timeout or config.bagel.stage_timeout_s
        requests = [msgspec.structs.replace(common, prompt=prompt) for prompt in prompts]
        steps = (common.num_inference_steps or FLOW.num_inference_steps) - 1 if common.modality == "image" else 1
        unit = "step" if common.modality == "image" else "prompt"
        with (
            contextlib.closing(ProgressBar(unit)) as bar,
            contextlib.closing(offline.run_batch(stages, requests, silence_s, config.bagel.max_inflight)) as items,
        ):
            results = Results(prompts, steps, partial(offline.save_png, args.output), bar)
            for index, item in items:
                results.take(index, item)
    if args.enable_stats:
        print(f"loaded in {loaded - start:.1f} s, {len(prompts)} prompts in {time.monotonic() - loaded:.1f} s")
        if results.done:
            print(offline.stats_table(results.done))
    return 0 if len(results.done) == len(prompts) else 1


def main(argv: list[str] | None = None) -> int:
    print_any_text()
    args = arguments(argv)
    try:
        return run(args)
    except (CommandError, OSError, TimeoutError, ValueError) as error:  # ValueError: a checkpoint or a configuration
        print_error(
            f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        )
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
