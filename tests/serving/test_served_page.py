"""The page in a real browser, in front of a whole server."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.serving.test_together import until_idle
from tests.support.browser import choose, chromium, open_page, send, settings
from tests.support.serving import Server, data_url, decode_data_url

SIZE = {"Width": "64", "Height": "48", "Steps": "4", "Seed": "5"}
FIELDS = {"width": 64, "height": 48, "num_inference_steps": 4, "seed": 5}


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    with chromium() as browser, open_page(browser, server.url) as page:
        yield page


def body(prompt: str, output: str, image: bytes | None = None, **fields: object) -> dict[str, object]:
    content: list[dict[str, object]] = [{"type": "text", "text": prompt}]
    if image is not None:
        content.append({"type": "image_url", "image_url": {"url": data_url(image)}})
    return {"messages": [{"role": "user", "content": content}], "modalities": [output], **fields}


def image_of(turn: Locator) -> str:
    result = turn.get_by_role("img", name="Result")
    expect(result).to_be_visible()
    url = result.get_attribute("src")
    assert url is not None
    return url


def test_an_image_is_made_edited_and_described(server: Server, page: Page) -> None:
    settings(page, SIZE)
    send(page, "A cute cat")
    turn = page.get_by_role("article", name="Text to image: A cute cat")
    url = image_of(turn)
    [same] = server.images(body("A cute cat", "image", **FIELDS))
    np.testing.assert_array_equal(decode_data_url(url), same)
    turn.get_by_role("button", name="Timings").click()
    expect(turn.get_by_role("row", name="dit")).to_contain_text(" s")

    turn.get_by_role("button", name="Edit this result").click()
    send(page, "Make it night")
    edited = page.get_by_role("article", name="Edit an image: Make it night")
    url = image_of(edited)
    assert decode_data_url(url).shape == (48, 64, 3)

    edited.get_by_role("button", name="Edit this result").click()
    choose(page, "Text")
    settings(page, {"Longest answer": "8"})
    send(page, "What is this?")
    described = page.get_by_role("article", name="Describe an image: What is this?")
    expect(described.get_by_role("button", name="Timings")).to_be_visible()
    page.get_by_role("button", name="New session").click()


def test_a_chat_is_answered_as_the_api_answers(server: Server, page: Page) -> None:
    choose(page, "Text")
    settings(page, {"Longest answer": "8", "Seed": "5"})
    send(page, "What is the capital of France?")
    turn = page.get_by_role("article", name="Chat: What is the capital of France?")
    expect(turn.get_by_role("button", name="Timings")).to_be_visible()
    reply = server.chat(body("What is the capital of France?", "text", max_tokens=8, seed=5)).json()
    assert turn.locator(".answer").text_content() == reply["choices"][0]["message"]["content"]


def test_a_stopped_request_leaves_the_server_idle(server: Server, page: Page) -> None:
    choose(page, "Image")
    settings(page, SIZE | {"Steps": "1000"})
    send(page, "A cute cat")
    expect(page.get_by_text("Drawing, step")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.").first).to_be_visible()
    until_idle(server)


def test_what_the_server_refuses_is_shown_in_its_words(page: Page) -> None:
    choose(page, "Image")
    settings(page, SIZE | {"Height": "17"})
    send(page, "A cute cat")
    failure = page.get_by_role("alert").filter(has_text="The server refused this (400)")
    expect(failure).to_contain_text("height=17 is not allowed; allowed: a multiple of 16")
