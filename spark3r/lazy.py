"""Names of a package that resolve on first use, so that importing it stays cheap."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_names(
    package: str, path: Iterable[str], homes: Mapping[str, str], public: Iterable[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package's ``__init__.py``.

    Public names are imported from their submodule when they are first used, and so are all
    submodules that do not begin with an underscore.

    Args:
        package: Name of the package.
        path: The package's ``__path__``.
        homes: Submodule of each public name.
        public: Names that ``dir()`` lists beside the submodules.
    """

    def resolve(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(f".{homes[name]}", package), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f".{name}", package)
            except ModuleNotFoundError as error:
                if error.name != f"{package}.{name}":  # a module that the submodule needs
                    raise
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    def listing() -> list[str]:
        submodules = (each.name for each in pkgutil.iter_modules(path))
        return sorted({*public, *(name for name in submodules if not name.startswith("_"))})

    return resolve, listing
