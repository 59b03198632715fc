"""The ``spark3r`` command as users call it."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run, store
from profile_documents import measured, paper, reference_profile

from spark3r import __version__, cli
from spark3r.cli.tables import folded_names, print_table
from spark3r.profile import Profile, shipped_folder, shipped_names


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
    assert sum("prior, not measured" in line for line in lines) == 6


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
