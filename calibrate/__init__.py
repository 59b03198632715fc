"""Profile how sensitive each global attention layer is, and search a schedule within a limit.

``calibrate.calibrate(model, clips, budget="2.5x")`` returns the profile of a live model, `run`
everything that was measured for it. The command ``calibrate`` does the same for models and clips
by name. Names and submodules are resolved on first use, so that ``import calibrate`` does not wait
for torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import BudgetError as BudgetError
    from .budget import UnreachableBudgetError as UnreachableBudgetError
    from .measure.probe import SensitivityError as SensitivityError
    from .pipeline import calibrate as calibrate
    from .pipeline import run as run
    from .report.result import Calibration as Calibration
    from .search.storage import StudyError as StudyError
    from .settings import Settings as Settings

_HOME_OF = {
    "BudgetError": "budget",
    "Calibration": "report.result",
    "SensitivityError": "measure.probe",
    "Settings": "settings",
    "StudyError": "search.storage",
    "UnreachableBudgetError": "budget",
    "calibrate": "pipeline",
    "run": "pipeline",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":  # a module that the submodule needs
                raise
    raise AttributeError(f"module 'calibrate' has no attribute '{name}'")


def __dir__() -> list[str]:
    submodules = (each.name for each in pkgutil.iter_modules(__path__))
    return sorted({*__all__, *(name for name in submodules if not name.startswith("_"))})
