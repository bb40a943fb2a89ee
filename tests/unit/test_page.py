"""The page in a real browser, in front of the proxy with a scripted Triton."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from proxy_fake import (
    DONE,
    IMAGE,
    ONE_ANSWER,
    PIXELS,
    PROGRESS,
    SETTINGS,
    SILENCE,
    THOUGHT_IMAGES,
    TWO_ANSWERS,
    FakeClient,
    http,
    live_proxy,
    text,
)

from bagel_triton.openai.settings import HttpOptions
from bagel_triton.protocol.errors import InvalidRequest, Overloaded
from bagel_triton.protocol.events import PartialImageEvent
from bagel_triton.protocol.request import ImageRef, TextPart
from bagel_triton.triton.client import StageResponse
from tests.support.browser import attach, choose, chromium, open_page, send, settings

Open = Callable[[FakeClient], Page]
PREVIEW = StageResponse(PartialImageEvent(0, 0, 1, 3, 32, 48), PIXELS[::-1])
SERVED = replace(SETTINGS, max_body_bytes=1_000_000)  # a browser's images are larger than the other tests' bodies


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_for(browser: Browser) -> Iterator[Open]:
    with ExitStack() as stack:

        def opened(client: FakeClient) -> Page:
            return stack.enter_context(open_page(browser, stack.enter_context(live_proxy(client, settings=SERVED))))

        yield opened


def pixels(url: str | None) -> np.ndarray:
    assert url is not None
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image)


def saved(path: Path) -> Path:
    Image.fromarray(PIXELS).save(path)
    return path


def test_the_page_and_its_files_come_from_the_package_under_a_strict_policy() -> None:
    with http(FakeClient()) as api:
        index = api.get("/")
        assert (index.status_code, index.headers["content-type"]) == (200, "text/html; charset=utf-8")
        paths = re.findall(r'(?:src|href)="([^"#]+)"', index.text)
        assert {"page/app.js", "page/page.css", "page/icon.svg", "page/sample.svg"} <= set(paths)
        for reply in (index, *(api.get(f"/{path}") for path in paths)):
            assert reply.status_code == 200, reply.url
            assert "default-src 'none'; script-src 'self'; style-src 'self'" in reply.headers["content-security-policy"]
            assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in reply.text
        assert api.get("/page/none.js").status_code == 404
        assert api.get("/page/%2e%2e/__init__.py").status_code == 404


def test_an_image_comes_with_its_size_seed_and_timings(open_for: Open) -> None:
    client = FakeClient()
    page = open_for(client)
    expect(page.get_by_role("status").first).to_have_text("bagel")
    settings(page, {"Width": "48", "Steps": "4", "Negative prompt": "blurry"})
    send(page, "A cute cat")
    turn = page.get_by_role("article", name="Text to image: A cute cat")
    result = turn.get_by_role("img", name="Result: A cute cat")
    expect(result).to_be_visible()
    np.testing.assert_array_equal(pixels(result.get_attribute("src")), PIXELS)
    expect(turn).to_contain_text("48 \u00d7 32")
    turn.get_by_role("button", name="Timings").click()
    expect(turn.get_by_role("row", name="dit")).to_contain_text("2.000 s")
    [request] = client.requests
    assert (request.modality, request.width, request.height) == ("image", 48, None)
    assert (request.num_inference_steps, request.negative_prompt, request.seed) == (4, "blurry", None)
    turn.get_by_role("button", name="seed 7").click()
    expect(page.get_by_label("Seed")).to_have_value("7")
    with page.expect_download() as download:
        turn.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "bagel-7.png"


def test_steps_advance_and_escape_stops_the_request(open_for: Open) -> None:
    client = FakeClient(PROGRESS[0], PREVIEW, PROGRESS[1], SILENCE)
    page = open_for(client)
    send(page, "A cute cat")
    expect(page.get_by_text("Drawing, step 2 of 3")).to_be_visible()
    preview = page.locator("figure img")
    expect(preview).to_be_visible()
    np.testing.assert_array_equal(pixels(preview.get_attribute("src")), PIXELS[::-1])
    assert client.requests[0].partial_images == 3
    bar = page.get_by_role("progressbar")
    assert (bar.get_attribute("value"), bar.get_attribute("max")) == ("2", "3")
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.").first).to_be_visible()
    assert client.cancelled.wait(20)
    expect(page.get_by_role("button", name="Generate")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


def test_the_stop_button_keeps_the_text_so_far(open_for: Open) -> None:
    client = FakeClient(text(0, "content", "Par"), SILENCE)
    page = open_for(client)
    choose(page, "Text")
    send(page, "Where?")
    expect(page.locator(".answer")).to_have_text("Par")
    page.get_by_role("button", name="Stop").click()
    assert client.cancelled.wait(20)
    expect(page.locator(".answer")).to_have_text("Par")


def test_a_result_is_edited(open_for: Open) -> None:
    client = FakeClient()
    page = open_for(client)
    send(page, "A cute cat")
    page.get_by_role("button", name="Edit this result").click()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.get_by_role("button", name="Edit", exact=True)).to_be_visible()
    send(page, "Make it night")
    expect(page.get_by_role("img", name="Result: Make it night")).to_be_visible()
    _, edit = client.requests
    assert edit.messages is not None
    assert edit.messages[0].parts == (TextPart("Make it night"), ImageRef(0))
    with Image.open(io.BytesIO(edit.image[0])) as image:  # type: ignore[index]
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_several_images_are_described_and_one_can_be_removed(open_for: Open, tmp_path: Path) -> None:
    client = FakeClient(*ONE_ANSWER)
    page = open_for(client)
    choose(page, "Text")
    attach(page, *(saved(tmp_path / name) for name in ("cat.png", "dog.webp", "owl.gif")))
    page.get_by_role("button", name="Remove owl.gif").click()
    send(page, "What is different?")
    expect(page.get_by_role("article", name="Describe an image: What is different?")).to_contain_text("Paris")
    [request] = client.requests
    assert request.image == tuple((tmp_path / name).read_bytes() for name in ("cat.png", "dog.webp"))


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_images_are_dropped_or_pasted(open_for: Open, event: str) -> None:
    page = open_for(FakeClient())
    page.evaluate(
        """([kind, data]) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "cat.png", { type: "image/png" }));
            transfer.items.add(new File(["x"], "notes.txt", { type: "text/plain" }));
            const options = { bubbles: true, cancelable: true };
            const event = kind === "drop" ? new DragEvent("drop", { ...options, dataTransfer: transfer })
                : new ClipboardEvent("paste", { ...options, clipboardData: transfer });
            document.body.dispatchEvent(event);
        }""",
        [event, base64.b64encode(png()).decode()],
    )
    expect(page.get_by_role("img", name="cat.png")).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="notes.txt is not an image")).to_be_visible()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "png")
    return buffer.getvalue()


def test_a_chat_streams_and_goes_on_until_it_starts_over(open_for: Open) -> None:
    client = FakeClient(*ONE_ANSWER)
    page = open_for(client)
    choose(page, "Text")
    for question in ("Where?", "And then?"):
        send(page, question)
        expect(page.get_by_role("article", name=f"Chat: {question}")).to_contain_text("Paris")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.get_by_role("button", name="Start over").click()
    send(page, "Where now?")
    expect(page.get_by_role("article", name="Chat: Where now?")).to_contain_text("Paris")
    conversations = [[turn.role for turn in request.messages or ()] for request in client.requests]
    assert conversations == [["user"], ["user", "assistant", "user"], ["user"]]


def test_the_thought_is_shown_folded_and_every_image_below_it(open_for: Open) -> None:
    client = FakeClient(*THOUGHT_IMAGES)
    page = open_for(client)
    page.get_by_label("Think").check(force=True)
    settings(page, {"Results": "2"})
    send(page, "A cute cat")
    expect(page.get_by_role("img", name="Result: A cute cat")).to_have_count(2)
    thought = page.get_by_text("A cat, in snow.")
    expect(thought).to_be_hidden()
    page.get_by_text("Thought for").click()
    expect(thought).to_be_visible()
    expect(page.get_by_role("button", name="seed 8")).to_be_visible()
    [request] = client.requests
    assert (request.think, request.n) == (True, 2)


def test_several_answers_stay_apart_and_a_cut_one_says_so(open_for: Open) -> None:
    page = open_for(FakeClient(*TWO_ANSWERS))
    choose(page, "Text")
    send(page, "Where?")
    expect(page.locator(".answer")).to_have_text(["Paris.", "It is Lyon"])
    expect(page.get_by_text("The answer was cut")).to_have_count(1)


@pytest.mark.parametrize(
    ("script", "title", "message"),
    [
        ((InvalidRequest("height=17 is not allowed"),), "The server refused this (400)", "height=17 is not allowed"),
        ((*PROGRESS, Overloaded("the pool is full")), "No result", "the pool is full"),
    ],
)
def test_an_error_has_the_servers_message_and_the_request_can_be_tried_again(
    open_for: Open, script: tuple[object, ...], title: str, message: str
) -> None:
    client = FakeClient(*script)
    page = open_for(client)
    send(page, "A cute cat")
    failure = page.get_by_role("alert").filter(has_text=title)
    expect(failure).to_contain_text(message)
    client.script = (IMAGE, DONE)
    failure.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("img", name="Result: A cute cat")).to_be_visible()
    expect(failure).to_have_count(0)


def test_a_server_that_wants_a_key_gets_one(browser: Browser) -> None:
    client = FakeClient()
    locked = replace(SERVED, http=HttpOptions(api_keys=("secret",)))
    with live_proxy(client, settings=locked) as url, open_page(browser, url, "down") as page:
        key = page.get_by_label("API key", exact=True)
        key.fill("wrong")
        page.get_by_role("button", name="Use key").click()
        expect(key).to_be_empty()
        expect(page.get_by_role("status").filter(has_text="API key needed")).to_be_visible()
        key.fill("secret")
        page.get_by_role("button", name="Use key").click()
        expect(key).to_be_hidden()
        send(page, "A cute cat")
        expect(page.get_by_role("img", name="Result: A cute cat")).to_be_visible()
        page.get_by_role("button", name="curl").click()
        expect(page.locator("pre")).to_contain_text("$BAGEL_API_KEY")
        assert "secret" not in page.locator("pre").inner_text()


PROMPT = 'It\'s "so" $HOME `id` \\n 50%\nnext é'


def test_the_code_shown_sends_the_same_request(open_for: Open, tmp_path: Path) -> None:
    client = FakeClient()
    page = open_for(client)
    attach(page, saved(tmp_path / "a cat's.png"))
    settings(page, {"Seed": "7", "Image guidance": "1.5"})
    send(page, PROMPT)
    page.get_by_role("button", name="curl").click()
    curl = page.locator("pre").inner_text()
    page.get_by_role("button", name="Python").click()
    script = page.locator("pre").inner_text()
    for command in (["bash", "-ec", curl], [sys.executable, "-c", script]):
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60, capture_output=True)
    shown, *others = client.requests
    same = msgspec.structs.replace(shown, partial_images=None)  # the code does not stream
    assert others == [same, same]
    for name in ("image.png", "image-0.png"):
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_the_code_of_a_text_sends_the_same_request(open_for: Open, tmp_path: Path) -> None:
    client = FakeClient(*ONE_ANSWER)
    page = open_for(client)
    choose(page, "Text")
    for question in ("Where?", PROMPT):
        send(page, question)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.locator(".answer").last).to_have_text("Paris")
    turn = page.get_by_role("article").last
    turn.get_by_role("button", name="curl").click()
    reply = subprocess.run(
        ["bash", "-ec", turn.locator("pre").inner_text()], check=True, timeout=60, capture_output=True, cwd=tmp_path
    )
    assert json.loads(reply.stdout)["choices"][0]["message"]["content"] == "Paris"
    turn.get_by_role("button", name="Python").click()
    script = turn.locator("pre").inner_text()
    said = subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True, text=True)
    assert said.stdout == "Paris\n"
    _, first, *others = client.requests
    assert others == [first, first]


@pytest.mark.parametrize(
    ("name", "modality", "images", "think"),
    [
        ("Text to image", "image", 0, None),
        ("Edit an image", "image", 1, None),
        ("Describe an image", "text", 1, None),
        ("Chat, thinking first", "text", 0, True),
    ],
)
def test_the_examples_show_what_can_be_done(
    open_for: Open, name: str, modality: str, images: int, think: bool | None
) -> None:
    client = FakeClient(*(ONE_ANSWER if modality == "text" else (IMAGE, DONE)))
    page = open_for(client)
    page.get_by_role("button", name=name).click()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.get_by_label("Prompt", exact=True)).not_to_be_empty()
    page.keyboard.press("Enter")
    expect(page.get_by_role("article")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    [request] = client.requests
    assert (request.modality, len(request.image or ()), request.think) == (modality, images, think)
    page.get_by_role("button", name="New session").click()
    expect(page.get_by_role("heading", name="Draw, edit, describe, chat.")).to_be_visible()


def test_shift_enter_is_a_new_line_and_an_empty_prompt_is_not_sent(open_for: Open) -> None:
    client = FakeClient()
    page = open_for(client)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="Write a prompt first.")).to_be_visible()
    page.keyboard.type("A cat")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("in snow")
    page.keyboard.press("Enter")
    expect(page.get_by_role("img", name="Result")).to_be_visible()
    [request] = client.requests
    assert request.messages is not None
    assert request.messages[0].parts == (TextPart("A cat\nin snow"),)


@pytest.mark.parametrize(
    ("value", "message"),
    [("-", "Seed is not a number."), ("9007199254740993", "Seed is larger than this page can send.")],
)
def test_a_setting_that_cannot_be_sent_as_written_is_not_sent(open_for: Open, value: str, message: str) -> None:
    client = FakeClient()
    page = open_for(client)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").press_sequentially(value)
    send(page, "A cute cat")
    expect(page.get_by_role("alert").filter(has_text=message)).to_be_visible()
    expect(page.get_by_label("Seed")).to_be_focused()
    assert client.requests == []


def test_a_result_is_announced_and_every_control_has_a_name(open_for: Open) -> None:
    page = open_for(FakeClient())
    announcer = page.locator("#announcer")
    send(page, "A cute cat")
    expect(announcer).to_have_text("The image is ready.")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, a, summary")].filter((element) =>
            !(element.getAttribute("aria-label") || element.labels?.length || element.textContent.trim())).length"""
    )
    assert unnamed == 0


def test_a_server_that_still_loads_is_shown_as_loading_until_it_is_ready(browser: Browser) -> None:
    client = FakeClient(ready={"thinker": False})
    with live_proxy(client) as url, open_page(browser, url, "loading") as page:
        expect(page.get_by_text("Loading the model")).to_be_visible()
        client.ready = {"thinker": True}
        expect(page.locator("#dot[data-state=ready]")).to_be_attached()


def test_nothing_is_cut_off_on_a_phone(open_for: Open) -> None:
    page = open_for(FakeClient(*THOUGHT_IMAGES))
    page.set_viewport_size({"width": 360, "height": 640})
    settings(page, {"Results": "2"})
    wide = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > 360.5).length"
    assert page.evaluate(wide) == 0
    send(page, "A" * 200)
    expect(page.get_by_role("img", name="Result")).to_have_count(2)
    page.get_by_role("button", name="Timings").click()
    assert page.evaluate(wide) == 0
    page.get_by_role("button", name="curl").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
