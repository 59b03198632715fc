"""Profile how much each global attention layer bears, and search a schedule under a budget.

``calibrate.calibrate(model, clips, budget="2.5x")`` returns the profile of a live model; the
command ``calibrate`` does the same for models and clips by name. Names are resolved on first use,
so that the command's help does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import calibrate as calibrate

__all__ = ["calibrate"]


def __getattr__(name: str) -> Any:
    if name != "calibrate":
        raise AttributeError(f"module 'calibrate' has no attribute '{name}'")
    from .pipeline import calibrate

    globals()[name] = calibrate
    return calibrate
