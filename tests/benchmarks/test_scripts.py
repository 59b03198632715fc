"""Every script of ``benchmarks/`` imports, and explains its options."""

from __future__ import annotations

import sys

import pytest
from benchmark_scripts import FOLDER, script

SCRIPTS = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


def test_scripts_are_found() -> None:
    assert {"calibration", "scale"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script(monkeypatch, name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert module.__doc__ is not None
    assert module.__doc__.splitlines()[0] in printed
    assert f"python benchmarks/{name}.py" in module.__doc__
