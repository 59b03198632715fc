"""The pages: what they name exists, and the commands that they show are understood."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import calibrate
import spark3r
from calibrate.cli.arguments import parser as calibrate_parser
from spark3r.cli.main import parser as runtime_parser
from spark3r.families.base import Family

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for folder in (
        ".",
        "docs",
        "docs/method",
        "docs/families",
        "profiles",
        "profiles/evidence",
        "benchmarks",
    )
    for path in (ROOT / folder).glob("*.md")
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON_FILE = re.compile(r"(?<![\w./-])(?:[\w-]+/)+[\w-]+\.py\b")
PYTHON_MODULE = re.compile(r"python3? -m (\w[\w.]*)")
INLINE_COMMAND = re.compile(r"`(spark3r|calibrate)( [^`]+)`")
SCRIPT = re.compile(r"python3?\s+(?:-m\s+)?(benchmarks|training)[/.](\w+)(?:\.py)?([^`#|]*)")
OURS = ("spark3r", "calibrate", "training", "benchmarks", "tests", "examples", "profiles")
SHELL_ENDS = ("&&", "||", "|", ";")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(text_of(page)) if kind == language]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    prose = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: str) -> Iterator[list[str]]:
    """Yield the calls of `spark3r` and `calibrate` in a page's shell blocks, as words."""
    for code in blocks(page, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            call: list[str] = []
            for word in [*shlex.split(line, comments=True), ";"]:
                if word not in SHELL_ENDS:
                    call.append(word)
                    continue
                if call and Path(call[0]).name in ("spark3r", "calibrate"):
                    yield [Path(call[0]).name, *call[1:]]
                call = []


@cache
def parser_of(command: str) -> argparse.ArgumentParser:
    return {"spark3r": runtime_parser, "calibrate": calibrate_parser}[command]()


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a command and of its subcommands."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(options_of, action.choices.values()))
    return found


@pytest.mark.parametrize("page", NAMES)
def test_relative_links_lead_to_a_file_and_a_heading(page: str) -> None:
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(path), f"{page} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", NAMES)
def test_python_files_and_modules_that_a_page_names_exist(page: str) -> None:
    # The changelog names the places that things had before.
    text = text_of(page) if page != "CHANGELOG.md" else ""
    for name in PYTHON_FILE.findall(text):
        if name.startswith(OURS):
            assert (ROOT / name).exists(), f"{page} names {name}, which does not exist"
    for module in PYTHON_MODULE.findall(text):
        if module.startswith(OURS):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
                f"{page} names python -m {module}, which does not exist"
            )


@pytest.mark.parametrize("page", NAMES)
def test_the_commands_that_a_page_shows_are_understood(page: str) -> None:
    for name, *words in commands(page):
        try:
            parser_of(name).parse_args(words)
        except SystemExit:
            pytest.fail(f"{page} shows `{shlex.join([name, *words])}`, which {name} refuses")
    for name, rest in INLINE_COMMAND.findall(FENCE.sub("", text_of(page))):
        unknown = set(re.findall(r"--[a-z][\w-]*", rest)) - options_of(parser_of(name))
        assert not unknown, f"{page} shows `{name}{rest}`; {name} has no {sorted(unknown)}"


@pytest.mark.parametrize("page", NAMES)
def test_the_options_of_scripts_that_a_page_shows_exist(page: str) -> None:
    for folder, name, rest in SCRIPT.findall(text_of(page).replace("\\\n", " ")):
        sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py"))
        for option in re.findall(r"--[a-z][\w-]*", rest):
            assert f'"{option}"' in sources, f"{page} shows {option} of {folder}/{name}.py"


@pytest.mark.parametrize("page", NAMES)
def test_python_blocks_parse_and_import_what_exists(page: str) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS[:2]):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {ast.unparse(node)}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "spark3r":
                assert hasattr(spark3r, node.attr), f"{page} names spark3r.{node.attr}"


@pytest.mark.parametrize("package", [spark3r, calibrate])
def test_every_public_name_is_on_the_page_of_public_names(package: object) -> None:
    page = text_of("docs/public-api.md")
    named = set(re.findall(r"`(\w+)`", page))
    public = set(package.__all__)  # type: ignore[attr-defined]
    assert public <= named, f"docs/public-api.md lacks {sorted(public - named)}"


def test_the_threat_model_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", text_of("docs/security.md")))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named
    assert named <= defined, f"docs/security.md names {sorted(named - defined)}"


def test_every_field_of_a_family_is_on_the_page_that_adds_one() -> None:
    named = set(re.findall(r"`(\w+)[`(]", text_of("docs/adding-a-family.md")))
    lacking = {field.name for field in fields(Family)} - {"name", "reduced_forward"} - named
    assert not lacking, f"docs/adding-a-family.md lacks {sorted(lacking)}"


def test_the_citation_names_this_version() -> None:
    citation = text_of("CITATION.cff")
    assert f"\nversion: {spark3r.__version__}\n" in citation


def test_the_readme_has_the_test_command_where_ci_reads_it() -> None:
    _, _, rest = text_of("README.md").partition("<!-- test command -->\n")
    assert rest.startswith("```sh\n")
    command = rest.removeprefix("```sh\n").partition("\n```")[0]
    assert "pip install" in command
    assert command.endswith("-m pytest -n 2 --dist loadfile")
    assert "\n" not in command
