"""Check that a built wheel holds the packages with their profiles and data, and nothing else."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(wheel: str) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    profiles = [path.relative_to(ROOT / "profiles") for path in (ROOT / "profiles").rglob("*.json")]
    expected = {f"spark3r/_profiles/{path.as_posix()}" for path in profiles}
    expected |= {
        path.relative_to(ROOT).as_posix()
        for package in ("spark3r", "calibrate")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".typed", ".safetensors", ".jinja", ".html", ".js", ".LICENSE")
    }
    missing = sorted(expected - names)
    if missing:
        raise SystemExit(f"{wheel} lacks {', '.join(missing)}")
    beside = sorted(n for n in names if n.startswith("spark3r/_profiles/") and n.endswith(".py"))
    if beside:
        raise SystemExit(f"{wheel} has scripts among the profiles: {', '.join(beside)}")
    folders = {name.partition("/")[0] for name in names} - {"spark3r", "calibrate"}
    others = sorted(folder for folder in folders if not folder.endswith(".dist-info"))
    if others:
        raise SystemExit(f"{wheel} also holds {', '.join(others)}")
    print(f"{Path(wheel).name}: {len(expected)} files checked")


if __name__ == "__main__":
    main(sys.argv[1])
