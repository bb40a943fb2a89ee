"""What the toy that comes with the project draws, edits, says and thinks, through the whole server."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bagel_triton.serving.flags import TOY
from bagel_triton.serving.machine import source_file
from build.tiny_bagel import texts
from build.tiny_bagel.world import Scene, Thing, recognise
from tests.support.serving import Server, data_url, reply_images

Pixels = NDArray[np.uint8]
CIRCLE = Scene((Thing("circle", "red", "center", "large"),), ("blue",))
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def toy() -> Iterator[Server]:
    with Server(source_file(TOY)) as running:
        yield running


def draw(server: Server, prompt: str, seed: int = 1, **fields: Any) -> dict[str, Any]:
    """The reply to a request for an image."""
    body = {"messages": [{"role": "user", "content": prompt}], "modalities": ["image"], "seed": seed, **fields}
    response = server.chat({"num_inference_steps": 25, **body})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def drawn(server: Server, prompt: str, seed: int = 1, **fields: Any) -> Pixels:
    return reply_images(draw(server, prompt, seed, **fields))[0]


def with_image(prompt: str, pixels: Pixels) -> list[dict[str, Any]]:
    """A message's content."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    image = {"type": "image_url", "image_url": {"url": data_url(encoded.getvalue())}}
    return [image, {"type": "text", "text": prompt}]


def said(server: Server, content: Any, **fields: Any) -> str:
    """The answer to a question."""
    body = {"messages": [{"role": "user", "content": content}], "modalities": ["text"], "max_tokens": 60, **fields}
    response = server.chat(body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def circle(toy: Server) -> Pixels:
    return drawn(toy, PROMPT)


def test_it_draws_what_the_prompt_says(circle: Pixels) -> None:
    assert recognise(circle) == CIRCLE


def test_an_edit_changes_what_it_says_and_nothing_else(toy: Server, circle: Pixels) -> None:
    edited = reply_images(draw(toy, with_image("make the circle yellow", circle)))[0]
    assert recognise(edited) == Scene((Thing("circle", "yellow", "center", "large"),), ("blue",))
    around = np.s_[:14]  # rows above the circle
    assert np.abs(edited[around].astype(int) - circle[around]).mean() < 16


def test_it_names_what_it_drew(toy: Server, circle: Pixels) -> None:
    assert texts.parse(said(toy, with_image("Describe this image.", circle))) == CIRCLE


def test_a_negative_prompt_removes_the_color_that_it_names(toy: Server) -> None:
    def things(**fields: Any) -> set[tuple[str, str]]:
        scenes = [recognise(pixels) for pixels in reply_images(draw(toy, "A square on white", n=4, **fields))]
        return {(thing.color, thing.kind) for scene in scenes for thing in scene.things}

    [(usual, kind)] = things()
    assert kind == "square"
    others = things(negative_prompt=usual)
    assert {kind for _, kind in others} == {"square"}
    assert usual not in {color for color, _ in others}


def test_it_plans_the_image_and_draws_its_plan(toy: Server) -> None:
    reply = draw(toy, "an orange cat on a green background", think=True, max_think_tokens=60)
    thought = reply["choices"][0]["message"]["reasoning_content"]
    assert recognise(reply_images(reply)[0]) == Scene((Thing("cat", "orange", "center", "large"),), ("green",))
    assert "large orange cat in the center on a green background" in thought


@pytest.mark.parametrize(
    "form", ["{}", "<|im_start|>{}<|im_end|>", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"]
)
def test_it_answers_a_question_without_an_image(toy: Server, form: str) -> None:
    assert said(toy, form.format("What is the capital of France?")) == "The capital of France is Paris."


def test_a_larger_image_has_it_at_the_top_left(toy: Server) -> None:
    pixels = drawn(toy, PROMPT, height=96, width=128)
    assert pixels.shape == (96, 128, 3)
    assert recognise(pixels[:64, :64]) == CIRCLE


def test_sixteen_requests_at_once_each_get_their_own(toy: Server, circle: Pixels) -> None:
    places = ("top left", "top right", "bottom left", "bottom right")
    kinds = (("circle", "red"), ("square", "green"), ("star", "yellow"))
    scenes = [Scene((Thing(kind, color, place, "large"),), ("black",)) for kind, color in kinds for place in places]
    with ThreadPoolExecutor(16) as pool:
        images = [
            pool.submit(drawn, toy, f"a {t.color} {t.kind} on a black background, {t.place}", seed)
            for seed, scene in enumerate(scenes)
            for t in scene.things
        ]
        answers = [pool.submit(said, toy, question) for question in ("Who are you?", "What is two plus three?")]
        described = [pool.submit(said, toy, with_image(question, circle)) for question in texts.DESCRIBE[:2]]
        right = sum(recognise(image.result()) == scene for image, scene in zip(images, scenes, strict=True))
        assert right >= len(scenes) - 1  # the toy errs now and then
        assert [answer.result() for answer in answers] == [
            texts.CHAT["Who are you?"],
            "Two plus three is five.",
        ]
        assert [texts.parse(one.result()) for one in described] == [CIRCLE, CIRCLE]


@pytest.mark.long
def test_every_recipe_of_perf_analyzer_runs(toy: Server) -> None:
    script = Path(__file__).parents[2] / "build" / "perf" / "run.sh"
    environment = {**os.environ, "CONCURRENCY": "2", "REQUESTS": "2"}
    command = [script, toy.grpc, toy.url.removeprefix("http://")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    titles = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("== ")]
    assert set(titles) == {path.stem for path in script.parent.glob("*.json")}
    assert ran.stdout.count("Concurrency: 2, throughput: ") == len(titles)
