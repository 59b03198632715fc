"""A real browser without a network, for the pages that we write."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# WebGL is computed on the CPU, as no test machine has a GPU.
_FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def chromium() -> str:
    """Return the path of Chromium; skip the test without one, or fail it if CI asks for it."""
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if found is None:
        what = "NOT VERIFIED: there is no Chromium to open pages in (apt-get install chromium)"
        if "chromium" in os.environ.get("SPARK3R_REQUIRE", "").split(","):
            pytest.fail(what)
        pytest.skip(what)
    return found


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file in Chromium without a network; fail if it logs an error or asks for anything."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra test installs it")
    program, wrong = chromium(), []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=_FLAGS)
        page = browser.new_context(offline=True, viewport={"width": 1000, "height": 700}).new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith("http") and wrong.append(asked.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert wrong == []


def pixels(page: Any, selector: str) -> np.ndarray:
    """Return what an element shows, ``[H, W, 3]``."""
    with Image.open(io.BytesIO(page.locator(selector).screenshot())) as image:
        return np.asarray(image.convert("RGB"))
