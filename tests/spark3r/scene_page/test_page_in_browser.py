"""The page of a scene in a real browser without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, opened, pixels
from command_line import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Debian's Chromium is tested with"),
]


BACKGROUND = (29, 32, 37)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    chromium()
    job = ("run", "--clip", "rendered:7", "--frames", "6", "--profile", "reference")
    answer = run(*job, "--compare-dense", "--output", str(tmp_path / "out"))
    assert answer.status == 0, answer.err
    return tmp_path / "out/scene.html"


def drawn(image: np.ndarray) -> float:
    """Return the share of pixels that are not background."""
    return float((np.abs(image.astype(int) - BACKGROUND).sum(axis=2) > 30).mean())


def wait_for_drawing(tab: Any, before: int = 0) -> int:
    """Wait until the page draws once more, and return how often it has drawn."""
    for _ in range(100):
        tab.wait_for_timeout(100)
        now = int(tab.evaluate("Number(document.body.dataset.drawn || 0)"))
        if now > before:
            tab.wait_for_timeout(200)
            return now
    pytest.fail("the page draws nothing within 10 seconds")


def test_it_draws_and_its_controls_work(page: Path) -> None:
    with opened(page) as tab:
        wait_for_drawing(tab)
        both = pixels(tab, "#canvas")
        half = both.shape[1] // 2
        assert drawn(both[:, :half]) > 0.02
        assert drawn(both[:, half:]) > 0.02

        def after(action: str) -> np.ndarray:
            before = wait_for_drawing(tab)
            tab.evaluate(action)
            wait_for_drawing(tab, before)
            return pixels(tab, "#canvas")

        tab.locator("#frame").fill("3")
        assert tab.locator("#label").inner_text() == "4 of 6"
        assert "frame 3" in tab.locator("#caption").inner_text()
        until = after("document.getElementById('until').click()")
        assert drawn(until) < drawn(both)
        assert tab.locator("#legend").is_hidden()
        coloured = after("document.getElementById('difference').click()")
        assert tab.locator("#legend").is_visible()
        assert (until != coloured).mean() > 0.01
        without = after("document.getElementById('cameras').click()")
        assert (without != coloured).any()

        # One camera draws both scenes, so that their views are the same.
        turned = after("document.getElementById('through').click()")
        for side in (slice(0, half), slice(half, None)):
            assert (turned[:, side] != without[:, side]).mean() > 0.01
        picture = tab.evaluate(
            "(() => { const i = document.getElementById('image'); return i.naturalWidth })()"
        )
        assert picture == 3 * 64
