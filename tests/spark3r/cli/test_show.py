"""`spark3r show`: a profile's schedule, its cost, and what is known of its time and memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run, store
from profile_documents import Document, copied, measured, paper, reference_profile

from spark3r.latency import FORM, TERMS


@pytest.fixture
def no_vggt_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the code of VGGT, of which memory would be counted."""
    monkeypatch.setitem(sys.modules, "vggt", None)


def test_show_a_paper_schedule(no_vggt_code: None) -> None:
    out = run("show", "vggt-1b", "--frames", "300", "--grid", "4x5").out
    assert "status: paper, not measured\n" in out
    assert "source: Spark3R, arXiv 2605.06270 v2" in out
    assert "on 300 frames of 4x5 patches and 5 special tokens, 7500 tokens in all" in out
    # 300 frames: r_Q = 2, r_KV = 8 in sensitive layers, else 24; frames 0, 24, ... keep 25 tokens.
    modules = "aggregator.global_blocks.{0-10, 17-23}.attn"
    assert f"0-10, 17-23  {modules}      2         24     4500   325" in out
    modules = "aggregator.global_blocks.{11-16}.attn"
    assert f"11-16        {modules}            2          8     4500   950" in out
    assert "no latency or quality of this schedule was measured" in out
    assert out.endswith(
        "at 300 frames:\n"
        "  time and speed-up are not known: the profile has no measurement of this "
        "schedule; `calibrate` measures your model on your device\n"
        "  memory: `spark3r memory vggt:facebook/VGGT-1B --frames 300 --profile vggt-1b` counts "
        "it where the model's code is installed\n"
    )


def test_show_as_json() -> None:
    answer = run("show", "vggt-1b", "--frames", "300", "--grid", "4x5", "--json")
    shown = answer.object
    assert answer.err == ""
    assert (shown["frames"], shown["grid"], shown["tokens"]) == (300, [4, 5], 7500)
    assert len(shown["layers"]) == 24
    assert shown["layers"][0] == {
        "index": 0,
        "module": "aggregator.global_blocks.0.attn",
        "query": 2,
        "key_value": 24,
        "query_length": 4500,
        "key_value_length": 325,
        "share": 4500 * 325 / 7500**2,
        "operators": {},
    }
    mean = sum(layer["share"] for layer in shown["layers"]) / 24
    assert shown["share"] == pytest.approx(mean)


@pytest.mark.slow
def test_show_counts_memory_as_the_command_for_it_does() -> None:
    counted = run(
        "memory",
        "reference",
        "--frames",
        "40",
        "--size",
        "64x64",
        "--profile",
        "reference",
        "--json",
    )
    shown = run("show", "reference", "--frames", "40", "--json")
    assert shown.object["counted_peak_bytes"] == counted.object["bytes"]
    gb = counted.object["bytes"] / 1e9
    assert (
        f"{gb:.3g} GB at the peak, with weights (counted"
        in run("show", "reference", "--frames", "40").out
    )
    assert run("show", "reference", "--json").object["counted_peak_bytes"] is None


def test_show_counts_no_memory_of_a_model_with_other_patches(folder: Path) -> None:
    document = copied(reference_profile())
    document["model"]["patch_size"] += 1  # its grid would be of images that the model refuses
    answer = run("show", store(document), "--frames", "40", "--json")
    assert answer.status == 0
    assert answer.object["counted_peak_bytes"] is None


def test_show_counts_no_memory_of_a_model_with_other_layers(folder: Path) -> None:
    document = copied(reference_profile())
    document["model"]["global_layers"][0] = "another.attn"
    for schedule in document["schedules"]:
        schedule["layers"][0]["module"] = "another.attn"
    answer = run("show", store(document), "--frames", "40", "--json")
    assert answer.status == 0
    assert answer.object["counted_peak_bytes"] is None


def test_show_opens_no_weights_that_a_profile_names(folder: Path) -> None:
    (folder / "model.pt").write_bytes(b"not a checkpoint")
    document = estimated()
    document["model"] |= {"family": "vggt", "weights": "model.pt"}
    answer = run("show", store(document), "--frames", "40", "--json")
    assert answer.object["counted_peak_bytes"] is None


def test_show_a_measured_profile(folder: Path) -> None:
    document = measured()
    own = copied(document["schedules"][0]["operators"])
    own["key_value"] |= {"name": "token_stride", "keep_anchor": True}
    document["schedules"][0]["layers"][1]["operators"] = own
    bare = {"query": {"name": "intra_group"}, "key_value": {"name": "temporal_stride"}}
    document["schedules"][0]["layers"][0]["operators"] = {**bare, "revision": 3}
    answer = run("show", store(document))
    assert answer.err == ""
    assert "status: measured\n" in answer.out
    assert "on 48 frames of 8x10 patches" in answer.out  # as calibrated and as measured
    assert "own operators\n" in answer.out
    assert "key_value token_stride, keep_anchor true\n" in answer.out
    assert (
        "operators: query intra_group, group 20, merge_anchor true, unmerge copy; key_value "
        "temporal_stride, keep_special false, keep_anchor false, mass_correction 0.5; revision 3\n"
    ) in answer.out
    assert answer.out.endswith(
        "latency in ms per clip:\n\n"
        "device       dtype    frames  grid  dense  wall  predicted  measured\n"
        "a processor  float32      48  8x10   12.5  12.5       12.0      12.5\n"
        "\nat 48 frames:\n"
        "  0.0125 s per clip, dense 0.0125 s, 1.00x end to end\n"
        "  (measured, on a processor in float32, 2026-11-22)\n"
        "  1.02e-06 GB peak memory (measured at 48 frames)\n"
    )
    layers = json.loads(run("show", "mine.json", "--json").out)["layers"]
    assert [layer["operators"] for layer in layers] == [
        {"key_value": {"mass_correction": 0.0}},
        {"key_value": {"name": "token_stride", "keep_anchor": True}},
    ]


def estimated(frames: int = 96) -> Document:
    """Return a measured document whose latency model the installed spark3r knows."""
    document = measured()
    model = document["measurements"][0]["latency_model"]
    model["form"], model["fitted_frames"], model["extended_to"] = FORM, [16, 48], frames
    model["constants"] = {"frames": 48.0, "rest_ms": 480.0}
    model["constants"] |= {f"{term}_ms": 0.0 for term in TERMS} | {"attention_ms": 2.0}
    return document


def test_show_estimates_another_length_and_says_from_what(folder: Path) -> None:
    name = store(estimated())
    # 96 frames of 85 tokens. Layer 0 keeps 24 of 96 frames. Layer 1 keeps 12, and merges in groups
    # of 20 frames, each with half of its patches rounded up to stay.
    tokens, attention_ms = 96 * 85, 0.0
    for queries, keys in ((tokens, 24 * 85), (96 * 5 + 96 * 40, 12 * 85)):
        attention_ms += 2.0 * queries * keys / 1e6
    seconds, dense = (960 + attention_ms) / 1e3, (960 + 2 * 2.0 * tokens**2 / 1e6) / 1e3
    out = run("show", name, "--frames", "96").out
    assert out.endswith(
        "at 96 frames:\n"
        f"  {seconds:.3g} s per clip, dense {dense:.3g} s, {dense / seconds:.2f}x end to end\n"
        "  (estimated, on a processor in float32, 2026-11-22: by the profile's latency model, "
        "which was fitted to clips of 16, 48 frames and is off by up to 2 % on its checks)\n"
        "  1.02e-06 GB peak memory (measured at 48 frames); the profile does not tell the memory "
        "of 96 frames\n"
    )
    found = run("show", name, "--frames", "96", "--json").object["estimate"]
    assert (found["measured"], found["measured_frames"], found["device"]) == (
        False,
        48,
        "a processor",
    )
    assert found["seconds"] == pytest.approx(seconds)
    assert found["speed_up"] == pytest.approx(dense / seconds)
    assert "beyond" not in out
    out = run("show", name, "--frames", "97").out
    assert "(97 frames lie beyond the 96 that the latency model is known to hold for" in out


def test_show_says_what_it_cannot_estimate(folder: Path) -> None:
    def why(*arguments: str, **changes: Any) -> str:
        document = estimated()
        document["measurements"][0]["latency_model"] |= changes
        name = store(document)
        shown = run("show", name, *arguments, "--json").object
        assert shown["estimate"] is None
        reason: str = shown["not_estimated"]
        assert f"time and speed-up are not known: {reason}\n" in run("show", name, *arguments).out
        return reason

    assert why("--grid", "9x9") == "the profile is measured on 8x10 patches a frame only"
    assert why("--frames", "961") == (
        "961 frames are more than 10 times the 48 that its latency model was fitted to"
    )
    assert why("--frames", "49", form="separable-9") == (
        "its latency model has the form 'separable-9', expected 'separable-2'"
    )
    assert "cannot be used: " in why("--frames", "49", constants={"frames": 1.0})


def test_show_says_when_a_clip_is_outside_the_schedule(folder: Path) -> None:
    document = measured()
    document["schedules"][0]["length"] |= {"min_frames": 20, "max_frames": 60}
    name = store(document)
    for frames, word in (("61", "61 frames are beyond the schedule's max_frames (60)"), ("60", "")):
        out = run("show", name, "--frames", frames).out
        assert ("max_frames (" in out) == bool(word)
        assert word in out
    assert "fewer than 20 frames run dense" in run("show", name, "--frames", "19").out


def test_show_refuses_a_length_that_it_could_not_count(folder: Path) -> None:
    document = paper()
    document["schedules"][0]["length"]["calibrated_frames"] = 10**30
    for arguments in ((store(document),), ("pi3", "--frames", "1000000000")):
        answer = run("show", *arguments)
        assert answer.status == 1
        assert "are more than 100000000 tokens: give fewer --frames" in answer.err


def test_nothing_in_a_profile_steers_the_terminal(folder: Path) -> None:
    document = measured()
    evil = "\x1b[2J\x9b31m"
    document["notes"] = document["model"]["name"] = document["schedules"][0]["name"] = evil
    document["default"] = document["measurements"][0]["device"] = evil
    document["measurements"][0]["schedules"][0]["schedule"] = evil
    document["measurements"][0]["baselines"][0]["against"] = evil
    document["model"]["global_layers"][0] = document["schedules"][0]["layers"][0]["module"] = evil
    answer = run("show", store(document))
    assert answer.status == 0
    assert "\\x1b[2J" in answer.out
    assert all(letter.isprintable() or letter == "\n" for letter in answer.out)
    for arguments in (("show", "mine.json", "--schedule", evil + "x"), ("check", evil)):
        answer = run(*arguments)
        assert answer.status == 1
        assert all(letter.isprintable() or letter == "\n" for letter in answer.err)


def test_factors_beyond_the_clip_are_shown_as_they_act(folder: Path) -> None:
    document = paper()
    document["schedules"][0]["layers"][1]["key_value"] = 1000
    layer = json.loads(run("show", store(document), "--frames", "5", "--json").out)["layers"][1]
    assert layer["key_value"] == 5


def test_show_what_ranks_send_one_another() -> None:
    words = ("show", "vggt-1b", "--frames", "300", "--grid", "4x5", "--ranks", "3")
    out = run(*words).out
    shown = run(*words, "--json").object["ranks"]
    # Of 38 kept frames (0, 8, 16 ...) the ranks with 100 frames have 13, 12 and 13; of 13 (0, 24,
    # ...) they have 5, 4 and 4. A frame has 25 tokens, a token 2 x 1024 numbers of 2 bytes.
    frame = 25 * 2 * 1024 * 2
    assert shown["frames"] == [100, 100, 100]
    assert set(shown["layers_bytes"]) == {2 * 13 * frame, 2 * 5 * frame}
    received = (6 * 13 + 18 * 5) * 2 * frame
    assert shown["received_bytes"] == received
    assert shown["seconds"]["100 GbE"] == received / 12.5e9
    assert "over 3 ranks, which hold 100 frames each, in bfloat16" in out
    assert f"each receives {received / 1e6:.3g} MB in a pass, 1.02 MB to 2.66 MB in a layer" in out
    assert "15 groups of 20 frames, fewer than the 16 ranks" in run(*words[:-1], "16").err


def test_what_differs_between_two_profiles(folder: Path) -> None:
    store(reference_profile(), "a.json")
    other = copied(reference_profile())
    other["notes"] = "not compared"
    first = other["schedules"][0]
    first["layers"][1]["key_value"] += 3
    first["length"]["min_frames"] = 17
    store(other, "b.json")
    same = run("show", "a.json", "--diff", "a.json")
    assert (same.status, same.out) == (0, "no layer differs\n")
    name = first["name"]
    answer = run("show", "a.json", "--diff", "b.json", "--schedule", name, "--json").object
    assert [layer["index"] for layer in answer["layers"]] == [1]
    one, two = answer["layers"][0]["rules"]
    assert two["key_value"] == one["key_value"] + 3
    assert list(answer["fields"]) == ["length"]
    assert answer["fields"]["length"][1]["min_frames"] == 17
    text = run("show", "a.json", "--diff", "b.json", "--schedule", name).out
    assert f"a.json, '{name}'" in text
    assert "min_frames 17" in text


def test_a_difference_of_profiles_for_other_models(folder: Path) -> None:
    answer = run("show", "vggt-1b", "--diff", "reference", "--json")
    assert answer.status == 0, answer.err
    assert answer.object["fields"]["family"] == ["vggt", "reference"]
    assert answer.object["layers"][-1]["rules"][1] is None
