"""What a benchmark does to a model: dense, wall, paper, two factors, fastvggt, a profile.

Every treatment comes with the family's memory saver, dense and wall too, so that a speed-up is one
over the best dense run and not over a wasteful one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ScheduleError
from ..families.base import Family, unwrap
from ..families.registry import detect
from ..patching.handle import Patch
from ..patching.patch import apply
from ..patching.wall import apply_wall
from ..runner import Runner
from ..schedule import PAPER_SENSITIVE_LAYERS, Operators, Schedule, paper_schedule
from .fastvggt import apply_fastvggt

ACCEPTED = (
    "dense, wall, paper, fastvggt, uniform:QUERY:KEY_VALUE (such as uniform:4:16), "
    "token_stride:QUERY:KEY_VALUE (likewise with mass correction), a shipped profile's name, or a "
    "profile's path (with a separator, or ending in .json)"
)

THINNED = Operators(
    key_value="token_stride", keep_special=True, keep_anchor=True, mass_correction=1.0
)
"""Operators of ``token_stride``; those of ``uniform`` are the paper's. Both copy back what merged
queries gave, so that what pruning and merging do is seen by itself."""

REFERENCE_SENSITIVE = (1, 2, 6)
"""Sensitive layers of the reference model, for its `paper` schedule. The paper does not cover this
model: they are where docs/reference-model.md finds pruning to hurt most."""


@dataclass(frozen=True)
class Treatment:
    """What is done to a model before it is measured.

    Attributes:
        name: As it was asked for.
        put_on: Puts it on the model given; the handle takes it off.
    """

    name: str
    put_on: Callable[[nn.Module], Patch]


def treatments(
    names: Sequence[str],
    model: nn.Module,
    family: Family | None = None,
    sensitive: Sequence[int] | None = None,
) -> tuple[Treatment, ...]:
    """Return treatments by name, each once, made for this model and tried on it.

    Args:
        names: What `ACCEPTED` says.
        model: The model that will be treated; left as it was.
        family: What is known of it; None recognises it.
        sensitive: Sensitive layers of ``paper``; None takes the paper's, or the reference model's.

    Raises:
        ScheduleError: If a name is none, or the paper's schedule needs ``sensitive``.
        ProfileError: If a profile is malformed or unknown.
        PatchError: If one does not fit the model.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    if not names:
        raise ScheduleError(f"no schedule was named, expected some of: {ACCEPTED}")
    found = []
    for name in dict.fromkeys(names):
        treatment = Treatment(name, _putter(name, root, family, sensitive))
        treatment.put_on(model).remove()
        found.append(treatment)
    return tuple(found)


def _putter(
    name: str, root: nn.Module, family: Family, sensitive: Sequence[int] | None
) -> Callable[[nn.Module], Patch]:
    depth = len(family.attention(root))
    if name == "wall":
        return lambda model: apply_wall(Runner(model, family))
    if name == "fastvggt":
        return lambda model: apply_fastvggt(Runner(model, family))
    if name == "dense":
        schedule = Schedule.dense(depth)
    elif name == "paper":
        schedule = _paper(family, depth, sensitive)
    elif name.startswith("uniform"):
        schedule = Schedule.uniform(depth, *_factors(name))
    elif name.startswith("token_stride"):
        schedule = Schedule.uniform(depth, *_factors(name), operators=THINNED)
    elif name.endswith(".json") or "/" in name or "\\" in name or name in _shipped():
        return lambda model: apply(model, name, family=family)
    else:
        raise ScheduleError(f"no schedule is called '{name}', expected {ACCEPTED}")
    return lambda model: apply(model, schedule, family=family)


def _shipped() -> tuple[str, ...]:
    from ..profile import shipped_names

    return tuple(shipped_names())


def _paper(family: Family, depth: int, sensitive: Sequence[int] | None) -> Schedule:
    if sensitive is None and family.name == "reference":
        sensitive = [layer for layer in REFERENCE_SENSITIVE if layer < depth]
    if sensitive is None and (family.name, depth) not in PAPER_SENSITIVE_LAYERS:
        raise ScheduleError(
            f"schedule 'paper': the paper names no sensitive layers for family '{family.name}' "
            f"with {depth} global layers: give them, counted from 0 (--sensitive 3,4)"
        )
    return paper_schedule(family.name, depth, sensitive=sensitive)


def _factors(name: str) -> tuple[int, int]:
    parts = name.split(":")[1:]
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ScheduleError(
            f"schedule '{name}', expected {name.partition(':')[0]}:QUERY:KEY_VALUE with two "
            "integers of at least 1, such as uniform:4:16"
        )
    return int(parts[0]), int(parts[1])
