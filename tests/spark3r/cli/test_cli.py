"""The ``spark3r`` command as users call it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from profile_documents import Document, copied, measured, paper, reference_profile

from spark3r import __version__, cli
from spark3r.cli.tables import folded_names, print_table
from spark3r.latency import FORM, TERMS
from spark3r.profile import Profile, shipped_folder, shipped_names


@pytest.fixture(autouse=True)
def _same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store(document: Document, name: str = "mine.json") -> str:
    Path(name).write_text(json.dumps(document))
    return name


def test_help_is_there_before_torch() -> None:
    program = (
        "import sys\n"
        "from spark3r.cli.main import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0
    assert answer.stderr == "heavy: []\n"
    for word in ("list", "show", "check", "examples:"):
        assert word in answer.stdout


def test_list_and_check_need_no_torch() -> None:
    for arguments in (["list"], ["check", "pi3"]):
        program = (
            f"import sys\nfrom spark3r.cli.main import main\nassert main({arguments}) == 0\n"
            "assert 'torch' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_as_a_module(folder: Path) -> None:
    for arguments, status in ((["--version"], 0), (["check", "no.json"], 1), (["show"], 2)):
        answer = subprocess.run(
            [sys.executable, "-m", "spark3r", *arguments], capture_output=True, text=True
        )
        assert answer.returncode == status
        assert "Traceback" not in answer.stderr
        assert answer.stdout == (f"spark3r {__version__}\n" if status == 0 else "")


def test_output_that_nobody_reads() -> None:
    command = [sys.executable, "-m", "spark3r", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # long before it writes
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_output_on_a_terminal_without_the_letters(folder: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "spark3r", "check", store(paper(), "π³.json")],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert answer.returncode == 0
    assert answer.stdout == b"??.json is valid; status: paper, not measured\n"


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("--verison",), ("list", "extra")])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith("spark3r")
    assert answer.err.count("\n") == 1
    assert "--help` shows the options)" in answer.err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--frames", "0", "'0', expected an integer of at least 1"),
        ("--frames", "1e3", "'1e3', expected an integer of at least 1"),
        ("--frames", "-5", "'-5', expected an integer of at least 1"),
        ("--frames", "²", "'²', expected an integer of at least 1"),
        ("--grid", "28", "'28', expected rows x columns such as 28x37"),
        ("--grid", "0x37", "'0x37', expected rows x columns such as 28x37"),
        ("--grid", "28x37x2", "'28x37x2', expected rows x columns such as 28x37"),
    ],
)
def test_values_that_make_no_sense(option: str, value: str, expected: str) -> None:
    answer = run("show", "pi3", f"{option}={value}")
    assert answer.status == 2
    assert answer.err.startswith(f"spark3r show: argument {option}: {expected} (")


def test_failures_are_one_paragraph(folder: Path) -> None:
    (folder / "broken.json").write_text("{")
    for arguments, message in (
        (("show", "vggt1b"), "no shipped profile is named 'vggt1b': did you mean vggt-1b"),
        (("show", "./none"), "none: no such file"),
        (("check", "broken.json"), "broken.json: not JSON: Expecting property"),
        (("show", "pi3", "--schedule", "x"), 'the profile has no schedule "x", expected one of: '),
        (("check", "pi3", "--model", "nope"), "no model is called 'nope', expected 'reference'"),
        (("check", "pi3", "--model", "os:getcwd"), "model 'os:getcwd': getcwd() returned an obj"),
        (
            ("check", "pi3", "--model", "reference:random"),
            "pi3 does not fit reference:random: the profile is for family 'pi3', the model's is "
            "'reference'",
        ),
    ):
        answer = run(*arguments)
        assert answer.status == 1
        assert answer.out == ""
        assert answer.err.startswith(f"spark3r: {message}")
        assert answer.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--debug", "show", "x"), ("show", "x", "--debug")])
def test_debug_shows_the_traceback(arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert answer.status == 1
    assert answer.err.startswith("Traceback (most recent call last)")
    assert "spark3r.ProfileError: no shipped profile is named 'x'" in answer.err


def test_defects_and_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> int:
        raise ZeroDivisionError("by zero")

    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    for action, status, said in (
        (fail, 1, "spark3r: internal error, ZeroDivisionError: by zero (--debug shows where;"),
        (interrupt, 130, "spark3r: interrupted"),
    ):
        monkeypatch.setattr(cli.listing, "_list", action)
        answer = run("list")
        assert answer.status == status
        assert answer.err.startswith(said)


def test_list() -> None:
    answer = run("list")
    lines = answer.out.splitlines()
    assert answer.status == 0
    assert lines[0].split("  ")[0] == "profile"
    assert [line.split()[0] for line in lines[1:]] == list(shipped_names())
    assert all(line == line.rstrip() for line in lines)
    assert sum("paper, not measured" in line for line in lines) == 4
    assert sum("prior, not measured" in line for line in lines) == 2


def test_list_as_json() -> None:
    answer = run("list", "--json")
    assert answer.err == ""
    profiles = {entry["profile"]: entry for entry in answer.object["profiles"]}
    assert list(profiles) == list(shipped_names())
    assert profiles["pi3x"] == {
        "profile": "pi3x",
        "status": "prior",
        "source": "Spark3R, arXiv 2605.06270 v2, section IV, for Pi3",
        "family": "pi3",
        "model": "Pi3X",
        "weights": "yyfz233/Pi3X",
        "global_layers": 18,
        "schedules": ["pi3-rule"],
        "default": "pi3-rule",
    }


def test_show_a_paper_schedule() -> None:
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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b", "a.10.b"], "a.{0-2, 10}.b"),
        (["a.7.b"], "a.7.b"),
        (["a.7.b", "a.7.b"], "a.7.b"),
        (["a.0.b.1", "a.1.b.2"], "a.0.b.1 and 1 more"),
        (["a.0.b", "c.1.b"], "a.0.b and 1 more"),
        (["a.0", "a.0.attn", "b"], "a.0 and 2 more"),
        (["a", "a1"], "a and 1 more"),
    ],
)
def test_names_that_differ_in_a_number_are_folded(names: list[str], expected: str) -> None:
    assert folded_names(names) == expected


def test_factors_beyond_the_clip_are_shown_as_they_act(folder: Path) -> None:
    document = paper()
    document["schedules"][0]["layers"][1]["key_value"] = 1000
    layer = json.loads(run("show", store(document), "--frames", "5", "--json").out)["layers"][1]
    assert layer["key_value"] == 5


def test_statuses_never_look_alike(folder: Path) -> None:
    documents = [measured(), paper(), paper() | {"status": "prior", "notes": "a rule"}]
    words = []
    for document in documents:
        name = store(document)
        words.append(run("check", name).out.rpartition("status: ")[2])
        assert f"status: {words[-1]}" in run("show", name).out
    assert words == ["measured\n", "paper, not measured\n", "prior, not measured\n"]


def test_check_without_a_model(folder: Path) -> None:
    name = store(measured())
    answer = run("check", name)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out == "mine.json is valid; status: measured\n"
    assert run("check", name, "--json").object == {
        "profile": "mine.json",
        "model": None,
        "valid": True,
        "status": "measured",
        "errors": [],
        "warnings": [],
    }


def test_check_an_invalid_profile_as_json(folder: Path) -> None:
    document = paper()
    document["schedules"][0]["layers"][0]["query"] = 0
    answer = run("check", store(document), "--json")
    message = "mine.json: schedules[0].layers[0].query is 0, expected 1 or more"
    assert answer.status == 1
    assert answer.object["valid"] is False
    assert answer.object["errors"] == [message]
    assert answer.err == f"spark3r: {message}\n"


def test_check_against_a_model(folder: Path) -> None:
    name = store(reference_profile())
    answer = run("check", name, "--model", "reference:random")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out == (
        "mine.json is valid and fits reference:random; status: paper, not measured\n"
        "warning: the profile is a paper's schedule and was not measured on your weights; "
        "`calibrate --model reference:random --budget 50%` measures one\n"
    )
    answer = run("check", "pi3", "--model", "reference:random", "--json")
    assert answer.status == 1
    assert answer.object["errors"] == [
        "the profile is for family 'pi3', the model's is 'reference'"
    ]


def test_check_against_a_model_beside_the_user(folder: Path) -> None:
    (folder / "beside.py").write_text(
        "def make():\n"
        "    from spark3r.loading.load import load_model\n"
        "    return load_model('reference:random')\n"
    )
    answer = run("check", store(reference_profile()), "--model", "beside:make")
    assert answer.status == 0
    assert "fits beside:make" in answer.out


def test_tables_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    with contextlib.redirect_stdout(out):
        assert cli.main(["list"]) == 0
    assert "━" in out.getvalue() or "─" in out.getvalue()
    assert "\x1b[33mpaper, not measured" in out.getvalue()
    assert "\x1b[35mprior, not measured" in out.getvalue()


def test_a_narrow_terminal_folds_texts_and_never_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    out, numbers = Terminal(), ["1234567.89", "22.5%", "333"]
    with contextlib.redirect_stdout(out):
        print_table(
            ("a long name", "wall ÷ ms", "of all", "n"), [["very long text " * 3, *numbers]]
        )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert any(all(number in line for number in numbers) for line in lines)


def test_shipped_profiles_are_the_ones_listed() -> None:
    for name in shipped_names():
        assert Profile.load(shipped_folder() / f"{name}.json")
        assert run("check", name).status == 0


class EntryPoint:
    """An entry point of an installed package."""

    def __init__(self, name: str, target: str) -> None:
        self.name, self._target = name, target

    def load(self) -> object:
        module, _, attribute = self._target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def declared() -> list[EntryPoint]:
    """Return the subcommands that pyproject.toml declares as entry points."""
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition('[project.entry-points."spark3r.commands"]\n')[2].partition("\n\n")[0]
    return [EntryPoint(*re.findall(r"[\w.:]+", line)) for line in table.splitlines()]


def test_spark3r_calibrate_is_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: declared())
    answer = run("calibrate", "--budget", "2.5x", "--dry-run", "--json")
    assert answer.status == 0
    assert answer.object["plan"][0].startswith("--budget 2.5x, judged by error")
    assert run("calibrate").status == 2
    unusable = run("calibrate", "--budget", "30")
    assert "spark3r calibrate: budget '30' has no unit" in unusable.err
    assert "calibrate" in run("--help").out
    job = ("calibrate", "--budget", "2x", "--dry-run", "--model", "reference")
    missing = run(*job, "--clip", "no/such.mp4", "--debug")
    assert missing.status == 1
    assert "Traceback" in missing.err


def test_a_subcommand_that_does_not_load_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("render", "no_such_package:add")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [broken])
    answer = run("list")
    assert answer.status == 0
    assert answer.err.startswith("spark3r: the command 'render' is missing: No module named")
