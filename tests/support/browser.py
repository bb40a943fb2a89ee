"""The system's headless Chromium for the tests of the page, which are skipped without one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own. While it runs, its thread cannot call ``asyncio.run``."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("the page's tests need a Chromium on PATH, for example: apt-get install chromium")
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Browser, url: str, state: str = "ready") -> Iterator[Page]:
    """The page at ``url`` in a fresh session, once it shows the server as ``state``.

    Raises:
        AssertionError: a script raised, or the policy blocked something.
    """
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    try:
        page.goto(url)
        expect(page.locator(f"#dot[data-state={state}]")).to_be_attached()
        yield page
        assert faults == []
    finally:
        context.close()


def send(page: Page, prompt: str) -> None:
    """Write ``prompt`` and press Enter, as a user does."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Enter")


def attach(page: Page, *files: Path) -> None:
    """Add image ``files`` by the button."""
    page.get_by_label("Add images").set_input_files(files)
    expect(page.get_by_role("list", name="Images of the request").get_by_role("img")).to_have_count(len(files))


def choose(page: Page, output: str) -> None:
    """Choose the output: ``Image`` or ``Text``."""
    page.get_by_role("radio", name=output).check(force=True)


def settings(page: Page, values: Mapping[str, str]) -> None:
    """Fill the settings' fields by their labels."""
    button = page.get_by_role("button", name="Settings")
    if button.get_attribute("aria-expanded") == "false":
        button.click()
    for label, value in values.items():
        page.get_by_label(label, exact=True).fill(value)
