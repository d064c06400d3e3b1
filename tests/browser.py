"""Debian's chromium, driven by playwright's Python package; never one that playwright downloads."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """A browser; skips where there is none, and fails in CI, where there must be one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        reason = "no chromium on PATH: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Browser, url: str, width: int = 1200, height: int = 900, **context: Any) -> Iterator[Page]:
    """A page that must write nothing to the console, open no dialog, and ask nothing but where it came from."""
    troubles: list[str] = []
    with browser.new_context(viewport={"width": width, "height": height}, **context) as opened:
        page = opened.new_page()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith((url, "data:")) or troubles.append(request.url))
        page.goto(url)
        yield page
    assert troubles == []


def violations(page: Page) -> list[str]:
    """What axe finds: contrast, alt texts, names of controls."""
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html'][:200]} ({len(one['nodes'])})" for one in found]


def overflows(page: Page) -> bool:
    """Whether the page is wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))
