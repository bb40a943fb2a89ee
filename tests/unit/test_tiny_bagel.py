"""The toy: its world, and a training forward that computes what the served model computes."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from bagel_triton.engine.preprocess.image_input import image_segments
from bagel_triton.model.autoencoder import Autoencoder, decode, encode, sample, unpack_latents
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.flow import initial_noise
from bagel_triton.model.image import normalised
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.weights.checkpoint import Checkpoint
from build.tiny_bagel import autoencoder as toy_autoencoder
from build.tiny_bagel import checkpoint, data, evaluate, forward, texts
from build.tiny_bagel.optimizer import Muon
from build.tiny_bagel.parallel import Ranks
from build.tiny_bagel.world import COLORS, KINDS, PLACES, Scene, Thing, random_scene, recognise, render

RED_CIRCLE = Scene((Thing("circle", "red", "center"),), ("blue",))


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def test_a_scene_has_its_colors_where_it_says() -> None:
    pixels = render(RED_CIRCLE)
    assert pixels.shape == (64, 64, 3)
    assert tuple(pixels[32, 32]) == COLORS["red"]
    assert tuple(pixels[2, 2]) == tuple(pixels[60, 32]) == COLORS["blue"]
    edge = pixels[:, 32, 0].astype(int)
    assert any(COLORS["blue"][0] + 20 < value < COLORS["red"][0] - 20 for value in edge), "the edge is not smooth"


def test_scenes_are_read_back_from_their_pixels() -> None:
    for scene in scenes(25):
        assert recognise(render(scene)) == scene


@pytest.mark.parametrize("kind", KINDS)
def test_no_thing_looks_like_another(kind: str) -> None:
    assert recognise(render(Scene((Thing(kind, "green", "top left", "small"),)))).things[0].kind == kind


def test_noise_is_no_thing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert all(thing.kind == "?" for thing in recognise(noise).things)


def test_descriptions_are_read_back() -> None:
    for scene in scenes(200):
        assert texts.parse(texts.description(scene)) == scene
    assert texts.parse("A large red circle on the moon on a blue background.") is None
    assert texts.parse("Hello!") is None


def test_an_edit_changes_what_it_names() -> None:
    rng = random.Random(0)
    for scene in scenes(200):
        instruction, after = texts.edit(rng, scene)
        assert after != scene, instruction
        if "background" in instruction:
            assert after.things == scene.things, instruction


def test_held_out_things_are_in_no_training_scene() -> None:
    rng = random.Random(0)
    shown = {thing for _ in range(3000) for thing in data.training_scene(rng).things}
    assert not any(data.held_out(thing) for thing in shown)
    everything = [Thing(kind, color, place) for kind in KINDS for color in COLORS for place in PLACES]
    assert 0.1 < sum(map(data.held_out, everything)) / len(everything) < 0.2
    assert not data.held_out(RED_CIRCLE.things[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the toy's geometry whose weights are random, its llm2vae included."""
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("toy")
    model, autoencoder = checkpoint.new(), toy_autoencoder.new()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    torch.nn.init.normal_(model.language_model.lm_head.weight, std=0.3)
    toy_autoencoder.normalise(autoencoder, toy_autoencoder.as_input(np.stack([render(s) for s in scenes(8)])))
    checkpoint.write_tokenizer(target / "tokenizer")
    checkpoint.write(target, model, autoencoder, target / "tokenizer")
    return target


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Bagel, Autoencoder, Tokenizer]:
    opened = Checkpoint(folder)
    cpu = torch.device("cpu")
    return (
        opened.load_bagel(cpu, torch.float32),
        opened.load_autoencoder(cpu, torch.float32),
        Tokenizer(folder, checkpoint.VOCABULARY),
    )


def batch_of(loaded: tuple[Bagel, Autoencoder, Tokenizer], *samples: data.Sample) -> forward.Batch:
    deviation = toy_autoencoder.deviation(loaded[1]).numpy()
    return forward.Collator(loaded[2], deviation, shift=3.0, seed=0)(samples)


def text(tokenizer: Tokenizer, words: str) -> data.Piece:
    return data.Piece("text", (tokenizer.start, *tokenizer.encode_text(words), tokenizer.end))


def test_the_training_forward_has_the_served_velocity(
    folder: Path, loaded: tuple[Bagel, Autoencoder, Tokenizer]
) -> None:
    """One update from noise to image, of an edit: every kind of segment is in its context."""
    bagel, autoencoder, tokenizer = loaded
    pixels = render(RED_CIRCLE)
    with evaluate.opened(folder) as stages:
        request = evaluate.drawing(
            "make it green", 7, image=(evaluate.png(pixels),), num_inference_steps=2, cfg_text_scale=1.0
        )
        served = evaluate.run(stages, [request])[0].pixels

    image = normalised(pixels.tobytes(), 64, 64)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator("cpu").manual_seed(7))
    before = sample(encode(autoencoder, image), noise)[0]
    picture = data.Picture(RED_CIRCLE, before.numpy())
    batch = batch_of(
        loaded,
        (
            data.Piece("vae", picture=picture),
            data.Piece("vit", picture=picture),
            text(tokenizer, "make it green"),
            data.Piece("query", picture=picture),
        ),
        (text(tokenizer, "a cat"), data.Piece("query", picture=picture)),
    )
    # The context's image without the collator's own noise, and the query at the beginning of the flow.
    start = initial_noise(7, 16, 64)
    clean = forward.pack_latents(before, 2)
    latents, times = batch.latents.clone(), batch.times.clone()
    latents[:16], latents[16:32], times[16:32] = clean, start, 1.0
    changed = forward.Batch(**{**vars(batch), "latents": latents, "times": times})
    velocity, _ = forward.forward(bagel, changed)
    latent = unpack_latents(start - velocity[:16], 4, 4, 2)
    expected = decode(autoencoder, latent[None])[0].numpy()
    assert served is not None
    assert np.abs(served.astype(int) - expected).max() <= 2
    assert served.std() > 1, "a constant image would prove nothing"


def test_the_training_forward_knows_the_places_of_a_larger_image(
    folder: Path, loaded: tuple[Bagel, Autoencoder, Tokenizer]
) -> None:
    bagel, autoencoder, tokenizer = loaded
    with evaluate.opened(folder) as stages:
        request = evaluate.drawing("a cat", 7, height=96, width=112, num_inference_steps=2, cfg_text_scale=1.0)
        served = evaluate.run(stages, [request])[0].pixels
    picture = data.Picture(RED_CIRCLE, np.zeros((16, 12, 14), np.float32))
    batch = batch_of(loaded, (text(tokenizer, "a cat"), data.Piece("query", picture=picture)))
    start = initial_noise(7, 42, 64)
    changed = forward.Batch(**{**vars(batch), "latents": start, "times": torch.ones_like(batch.times)})
    velocity, _ = forward.forward(bagel, changed)
    expected = decode(autoencoder, unpack_latents(start - velocity, 6, 7, 2)[None])[0].numpy()
    assert served is not None
    assert np.abs(served.astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("form", "prompt"),
    [
        ("bare", "What is it?"),
        ("wrapped", "<|im_start|>What is it?<|im_end|>"),
        ("template", "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"),
        ("marked", "<|im_start|>user\n<|image_pad|>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_the_training_forward_has_the_served_next_tokens(
    folder: Path, loaded: tuple[Bagel, Autoencoder, Tokenizer], form: data.Form, prompt: str
) -> None:
    bagel, _, tokenizer = loaded
    pixels = render(RED_CIRCLE)
    with evaluate.opened(folder) as stages:
        request = evaluate.asking(prompt, pixels, logit_bias={tokenizer.end: -100.0})
        answer = evaluate.run(stages, [replace(request, max_tokens=6)])[0].text
    picture = data.Picture(RED_CIRCLE, np.zeros((16, 8, 8), np.float32))
    decoded: list[int] = []
    for _ in range(6):
        *before, last = data.exchange(tokenizer, form, "What is it?", "", picture)
        known = (*last.ids[: last.given], *decoded, tokenizer.end)
        batch = batch_of(loaded, (*before, data.Piece("text", known, last.given)))
        _, logits = forward.forward(bagel, batch)
        scores = logits[-1].clone()
        scores[tokenizer.end] -= 100
        decoded.append(int(scores.argmax()))
    assert answer == tokenizer.decode(decoded).strip()


def test_what_is_padded_or_beside_changes_nothing(loaded: tuple[Bagel, Autoencoder, Tokenizer]) -> None:
    bagel, _, tokenizer = loaded
    said = data.exchange(tokenizer, "bare", "Hello", "Hello! I draw.")
    longer = data.exchange(tokenizer, "bare", "What can you do?", texts.CHAT["What can you draw?"])
    _, alone = forward.forward(bagel, batch_of(loaded, said))
    _, beside = forward.forward(bagel, batch_of(loaded, said, longer, longer, longer))
    torch.testing.assert_close(alone, beside[: len(alone)], rtol=1e-4, atol=1e-5)


def test_images_reach_the_model_as_training_prepared_them() -> None:
    pixels = render(RED_CIRCLE)
    (segments,), size = image_segments([evaluate.png(pixels)], "image", 64, data.VAE_SIDES, data.VIT_SIDES)
    assert size == (64, 64)
    assert [part.pixels for part in segments] == [pixels.tobytes(), data.vit_pixels(pixels).tobytes()]  # type: ignore[union-attr]


def test_the_shipped_checkpoint_draws_a_red_circle_on_blue() -> None:
    with evaluate.opened(evaluate.CHECKPOINT) as stages:
        request = evaluate.drawing("a red circle on a blue background", 42, num_inference_steps=15)
        pixels = evaluate.run(stages, [request])[0].pixels
    assert pixels is not None
    red, _, blue = (pixels[:, :, channel].astype(int) for channel in range(3))
    disc = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 9
    frame = np.hypot(*(np.mgrid[:64, :64] - 31.5)) > 20
    assert (red > blue + 60)[disc].mean() > 0.95
    assert (blue > red + 60)[frame].mean() > 0.95


def _stepped(ranks: Ranks) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (4, 6), (5, 3, 3, 3))
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    muon = Muon(parameters, ranks)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        muon.step(0.1)
    return [parameter.detach() for parameter in parameters]


def test_training_in_two_processes_steps_as_in_one() -> None:
    buffers, barrier = torch.zeros(2, 2, 300), threading.Barrier(2)
    alone = _stepped(Ranks(0, torch.zeros(2, 1, 300), threading.Barrier(1)))  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda rank: _stepped(Ranks(rank, buffers, barrier)), range(2)))  # type: ignore[arg-type]
    for stepped in both:
        for one, other in zip(stepped, alone, strict=True):
            torch.testing.assert_close(one, other)
