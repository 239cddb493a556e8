"""A browser without a window, a page in it, and a door that serves the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.tools import needs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")  # while Playwright runs, no other test of this process could have an event loop
def chromium() -> Iterator:
    """Playwright's browser. Skips where there is none."""
    if CHROMIUM is None:
        pytest.skip(needs("Chromium"))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium) -> Iterator:
    """A page in a profile of its own. Fails if the page logs an error or breaks its Content-Security-Policy."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    yield page
    context.close()
    # The browser itself logs every response of 400 or more.
    assert [error for error in errors if "Failed to load resource" not in error] == []
