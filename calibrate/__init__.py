"""Profile how sensitive each global attention layer is, and search a schedule within a limit.

``calibrate.calibrate(model, clips, budget="2.5x")`` returns the profile of a live model, `run`
everything that was measured for it. The command ``calibrate`` does the same for models and clips
by name. Names and submodules are resolved on first use, so that ``import calibrate`` does not wait
for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spark3r.lazy import lazy_names

if TYPE_CHECKING:
    from .budget import BudgetError as BudgetError
    from .budget import UnreachableBudgetError as UnreachableBudgetError
    from .measure.probe import SensitivityError as SensitivityError
    from .pipeline import calibrate as calibrate
    from .pipeline import run as run
    from .report.result import Calibration as Calibration
    from .search.storage_errors import StudyError as StudyError
    from .settings import Settings as Settings

_HOME_OF = {
    "BudgetError": "budget",
    "Calibration": "report.result",
    "SensitivityError": "measure.probe",
    "Settings": "settings",
    "StudyError": "search.storage_errors",
    "UnreachableBudgetError": "budget",
    "calibrate": "pipeline",
    "run": "pipeline",
}

__all__ = sorted(_HOME_OF)

__getattr__, __dir__ = lazy_names(__name__, __path__, _HOME_OF, __all__)
