"""A headless Chromium without a network, for the tests of the built pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage"
PATIENCE = 600_000  # ms, for a browser that hangs


@contextmanager
def chromium(**settings) -> Iterator:
    """-> a page of a fresh profile; skips the test where the browser is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium: `apt-get install chromium` (Debian) lets this test look at the pages")
    with sync_api.sync_playwright() as playwright:  # which brings --headless
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS.split(), timeout=PATIENCE)
        page = browser.new_page(**{"offline": True} | settings)
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()
