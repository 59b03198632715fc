"""The script of malformed footage runs, finds nothing, and would report what it finds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from benchmark_scripts import script

from spark3r.io import decoding

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.slow
def test_malformed_footage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    footage = script(monkeypatch, "faults.footage")
    images = footage.run_images(200, 3, tmp_path)
    videos = footage.run_videos(18, 3, tmp_path)
    assert images["faults"] == videos["faults"] == []
    assert images["outcomes"]["whole: read, by ffmpeg read"] > 5
    assert images["outcomes"]["damaged: refused, by ffmpeg refused"] > 50
    assert videos["outcomes"]["damaged: refused, by ffmpeg refused"] > 3


@pytest.mark.slow
def test_a_fault_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    footage = script(monkeypatch, "faults.footage")
    monkeypatch.setattr(decoding, "check_image", lambda data, decoder: None)
    faults = footage.run_images(100, 3, tmp_path)["faults"]
    assert {fault["fault"] for fault in faults} == {"fault: ffmpeg refuses it"}
    monkeypatch.setattr(decoding, "check_image", lambda data, decoder: 1 / 0)
    faults = footage.run_images(10, 3, tmp_path)["faults"]
    assert any("a whole file, refused" in fault["fault"] for fault in faults)


def test_a_case_that_dies_or_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    footage = script(monkeypatch, "faults.footage")
    monkeypatch.setattr(footage, "HANG_SECONDS", 0.5)

    def work(number: int) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == 2:
            time.sleep(60)
        return number

    results = list(footage.in_children(4, work))
    died = f"fault: died of {int(signal.SIGTERM)}"
    assert results == [0, died, "fault: no end after 0.5 s", 3]
