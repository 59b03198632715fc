"""Estimates for GPUs: the arithmetic behind them, and that the pages show what the script says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmark_scripts import FOLDER, script

from spark3r import TokenLayout, load_profile
from spark3r.reduction.plans import key_value_length, query_length


def test_attention_is_counted_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = script(monkeypatch, "cards")
    layout = TokenLayout(290, 28, 37, special=5, anchor_frame=0)
    rules = load_profile("vggt-1b").schedule().resolve_within(layout)
    lengths = [(query_length(layout, rule), key_value_length(layout, rule)) for rule in rules]
    flop = sum(2 * 2 * queries * keys * 1024 for queries, keys in lengths)  # scores, then values
    assert cards.global_attention(290, True) == pytest.approx(flop / 1e12)
    assert cards.global_attention(290, False) == pytest.approx(24 * 4 * layout.tokens**2 * 1.024e-9)


def test_a_part_takes_its_arithmetic_and_its_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = script(monkeypatch, "cards")
    slow = cards.Card("slow", 100, 50, 10, 1.0, 24, 100)
    twice = cards.Card("twice as fast", 200, 100, 20, 2.0, 24, 100)
    for reduced in (True, False):
        assert cards.seconds(slow, 100, reduced) == pytest.approx(
            2 * cards.seconds(twice, 100, reduced)
        )
        assert cards.seconds(slow, 100, reduced, True) < cards.seconds(slow, 100, reduced)


def test_a_row_has_the_longest_round_clip_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = script(monkeypatch, "cards")
    card = cards.Card("small", 100, 50, 10, 1.0, 24, 1000)
    for per_frame, expected in ((62_600_000, 270), (16_900_000, 1000), (200_000_000, 80)):
        assert cards.frames_on(card, lambda n, each=per_frame: 6_500_000_000 + n * each) == expected


def test_the_pages_show_the_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = script(monkeypatch, "cards")
    stored = json.loads((FOLDER / "results" / "cards.json").read_text(encoding="utf-8"))
    pages = {
        page: (FOLDER.parent / page).read_text(encoding="utf-8")
        for page in ("README.md", "docs/benchmarks.md")
    }
    assert stored["status"] == "estimated"
    for row, card in zip(stored["rows"], cards.CARDS, strict=True):
        assert row["frames"] <= card.frames
        assert row["counted_gb"] <= card.memory - cards.CONTEXT_GB
        for key, reduced in (("reduced_s", True), ("dense_s", False)):
            found = cards.seconds(card, row["frames"], reduced)
            assert row[key] == pytest.approx(found, rel=0.01, abs=0.06)
    for page, text in pages.items():
        table = re.findall(
            r"^\| ([\w ]+), (\d+) GB \| ([\d,]+) \| ([\d.]+) \| (\d+) s \| (\d+) s \|", text, re.M
        )
        assert len(table) >= 4, page
        for name, memory, frames, *shown in table:
            (row,) = (
                row
                for row in stored["rows"]
                if row["card"].startswith(name)
                and row["memory_gb"] == int(memory)
                and row["frames"] == int(frames.replace(",", ""))
            )
            values = (row["counted_gb"], row["reduced_s"], row["dense_s"])
            for text_shown, value in zip(shown, values, strict=True):
                assert float(text_shown) == pytest.approx(value, rel=0.03, abs=0.51), (page, name)


def test_the_picture_is_drawn_from_the_stored_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overview = script(monkeypatch, "overview")
    monkeypatch.setattr("sys.argv", ["overview.py", "--output", str(tmp_path / "a.svg")])
    overview.main()
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
