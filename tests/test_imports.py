"""Imports run one way, heavy ones late, and the public names are there."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spark3r

ROOT = Path(spark3r.__file__).parents[1]

# Each package from bottom to top. A part (a module or a folder) imports only parts of lower groups
# and its own files. A new part joins here.
ORDERS = {
    "spark3r": (
        "errors files lazy",
        "checks compiling geometry ranks rope memory sdpa transform",
        "kernels timing",
        "env layout clips",
        "reduction metrics prediction",
        "schedule",
        "latency",
        "profile reference",
        "families",
        "identity",
        "runner",
        "patching",
        "loading io meta",
        "memory_count scene_page",
        "fitting",
        "reconstruction benchmark",
        "evidence",
        "cli",
        "__main__",
    ),
    "calibrate": (
        "defaults",
        "budget clips plan progress ranks",
        "side_by_side",
        "settings",
        "measure",
        "search",
        "verify",
        "report",
        "dry_run",
        "pipeline",
        "cli",
        "__main__",
    ),
}
LEVELS = {
    package: {part: level for level, group in enumerate(order) for part in group.split()}
    for package, order in ORDERS.items()
}

# spark3r is the runtime; only the toolkit may need these.
TOOLKIT = {"calibrate", "optuna", "pandas", "scipy", "matplotlib", "plotly", "jinja2", "evo"}
# Libraries that only some parts may import.
CONFINED = {
    "pydantic": {"profile"},
    "rich": {"cli"},
    "argparse": {"cli"},
}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield line and full module name of every import, those inside functions too.

    ``from package import name`` yields ``package.name``, which may be a module.
    """
    module = module_of(path)
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            for alias in node.names:
                yield node.lineno, (*base, alias.name)


def part_of(module: tuple[str, ...]) -> str:
    """Return the part of its package that a module belongs to; "" for the package itself."""
    return module[1] if len(module) > 1 else ""


def is_part(package: str, name: str) -> bool:
    return (ROOT / package / name).is_dir() or (ROOT / package / f"{name}.py").is_file()


def test_spark3r_never_imports_the_toolkit() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {'.'.join(name)}"
        for path in files("spark3r")
        for line, name in imports(path)
        if name[0] in TOOLKIT
    ]
    assert not wrong


@pytest.mark.parametrize("package", ORDERS)
def test_every_part_has_its_place(package: str) -> None:
    parts = {part_of(module_of(path)) for path in files(package)} - {""}
    assert parts == set(LEVELS[package]), "give new parts a level in ORDERS, and remove old ones"


@pytest.mark.parametrize("package", ORDERS)
def test_imports_inside_a_package_run_one_way(package: str) -> None:
    levels, wrong = LEVELS[package], []
    for path in files(package):
        own = part_of(module_of(path))
        if own == "":
            continue  # the package resolves public names on first use
        for line, name in imports(path):
            if name[0] != package or not is_part(package, part_of(name)):
                continue
            other = part_of(name)
            if other != own and levels[other] >= levels[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {other}")
    assert not wrong


@pytest.mark.parametrize("package", ORDERS)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    modules = {module_of(path): path for path in files(package)}
    graph = {
        module: {
            target
            for _, name in imports(path)
            for target in (name, name[:-1])
            if target in modules and target != module
        }
        for module, path in modules.items()
        if path.name != "__init__.py"
    }
    sorter = graphlib.TopologicalSorter(graph)
    sorter.prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("package", ORDERS)
def test_package_faces_define_nothing(package: str) -> None:
    """An ``__init__.py`` holds imports, ``__all__`` and perhaps how names resolve late."""
    allowed = {"__getattr__", "__dir__"}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} defines {node.name}"
        for path in files(package)
        if path.name == "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in allowed
    ]
    assert not wrong


def test_confined_libraries() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name[0]}"
        for path in files("spark3r")
        for line, name in imports(path)
        if name[0] in CONFINED and part_of(module_of(path)) not in CONFINED[name[0]]
    ]
    assert not wrong


def test_the_walk_sees_what_it_must() -> None:
    found = {name for _, name in imports(ROOT / "spark3r" / "cli" / "check.py")}
    assert ("spark3r", "loading", "load", "load_model") in found  # inside a function
    assert ("spark3r", "runner", "Runner") in found


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import spark3r", {"torch", "numpy", "pydantic"}),
        ("from spark3r import Schedule, TokenLayout, paper_schedule", {"torch", "pydantic"}),
        ("import spark3r.profile", {"torch", "rich"}),
        ("import calibrate", {"torch", "numpy", "optuna"}),
        ("from calibrate import BudgetError, defaults", {"torch", "numpy", "optuna"}),
        # torch._dynamo is torch's compiler, which takes as long to import as torch.
        (
            "import spark3r.patching, spark3r.io.clips",
            {"pydantic", "rich", "av", "PIL", "torch._dynamo", *TOOLKIT},
        ),
        # The check of a first pass runs in this context.
        ("from spark3r.compiling import eagerly\nwith eagerly(): pass", {"torch._dynamo"}),
    ],
)
def test_imports_stay_light(statement: str, absent: set[str]) -> None:
    program = f"{statement}\nimport sys\nprint(sorted({absent!r} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "[]\n"


@pytest.mark.parametrize("name", spark3r.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(spark3r, name)
    assert value is not None
    if isinstance(value, type) and issubclass(value, Exception):
        assert value.__module__ == "spark3r"


def test_submodules_are_attributes_and_listed() -> None:
    """Each is an attribute after ``import spark3r`` alone."""
    names = sorted(LEVELS["spark3r"].keys() - {"__main__"})
    program = (
        "import spark3r\n"
        f"for name in {names!r}:\n"
        "    assert getattr(spark3r, name).__name__ == f'spark3r.{name}', name\n"
        "print(callable(spark3r.io.load_clip), callable(spark3r.reconstruction.reconstruct))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "True True\n"
    assert dir(spark3r) == sorted({*names, *spark3r.__all__})


def test_a_library_that_a_submodule_lacks_is_named() -> None:
    program = "import sys; sys.modules['pydantic'] = None; import spark3r; spark3r.profile"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "ModuleNotFoundError: import of pydantic halted" in answer.stderr


def test_public_names_are_listed_once_and_for_type_checkers_too() -> None:
    assert spark3r.__all__ == sorted(set(spark3r.__all__))
    assert {"load_clip", "load_model", "load_profile", "reconstruct", "generic"} <= set(
        spark3r.__all__
    )
    tree = ast.parse(Path(spark3r.__file__).read_text(encoding="utf-8"))
    declared = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert declared | {"__version__"} == set(spark3r.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'spark3r' has no attribute 'aply'"):
        spark3r.aply  # noqa: B018
