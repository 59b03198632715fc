"""Asymmetric token reduction for feed-forward 3D reconstruction transformers.

An independent implementation of Spark3R (arXiv 2605.06270), with operators and tools beyond it.
Names and submodules are resolved on first use, so that ``import spark3r`` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spark3r.lazy import lazy_names

if TYPE_CHECKING:
    from .clips import Clip as Clip
    from .errors import ClipError as ClipError
    from .errors import FamilyError as FamilyError
    from .errors import LayoutError as LayoutError
    from .errors import PatchError as PatchError
    from .errors import ProfileError as ProfileError
    from .errors import ScheduleError as ScheduleError
    from .errors import Spark3rError as Spark3rError
    from .errors import Spark3rWarning as Spark3rWarning
    from .errors import WeightsError as WeightsError
    from .families import generic as generic
    from .fitting import Plan as Plan
    from .fitting import fit as fit
    from .io import load_clip as load_clip
    from .layout import TokenLayout as TokenLayout
    from .loading import load_model as load_model
    from .patching.apply import apply as apply
    from .patching.apply import is_applied as is_applied
    from .patching.apply import remove as remove
    from .patching.handle import Handle as Handle
    from .prediction import Prediction as Prediction
    from .profile import Profile as Profile
    from .profile import load_profile as load_profile
    from .reconstruction import reconstruct as reconstruct
    from .reduction.operators import DiverseFrames as DiverseFrames
    from .reduction.operators import Operators as Operators
    from .reduction.operators import QueryMerging as QueryMerging
    from .reduction.operators import TemporalStride as TemporalStride
    from .reduction.operators import TokenStride as TokenStride
    from .schedule import LayerRule as LayerRule
    from .schedule import LengthRule as LengthRule
    from .schedule import Schedule as Schedule
    from .schedule import paper_schedule as paper_schedule

__version__ = "0.1.0"

_HOMES = {
    "clips": ("Clip",),
    "errors": (
        "ClipError",
        "FamilyError",
        "LayoutError",
        "PatchError",
        "ProfileError",
        "ScheduleError",
        "Spark3rError",
        "Spark3rWarning",
        "WeightsError",
    ),
    "families": ("generic",),
    "fitting": ("Plan", "fit"),
    "io": ("load_clip",),
    "layout": ("TokenLayout",),
    "loading": ("load_model",),
    "patching": ("Handle", "apply", "is_applied", "remove"),
    "prediction": ("Prediction",),
    "profile": ("Profile", "load_profile"),
    "reconstruction": ("reconstruct",),
    "reduction.operators": (
        "DiverseFrames",
        "Operators",
        "QueryMerging",
        "TemporalStride",
        "TokenStride",
    ),
    "schedule": ("LayerRule", "LengthRule", "Schedule", "paper_schedule"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted((*_HOME_OF, "__version__"))

__getattr__, __dir__ = lazy_names(__name__, __path__, _HOME_OF, __all__)
