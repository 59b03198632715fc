"""The treatments of a benchmark: dense, wall, paper, two factors, fastvggt, a profile.

Every treatment comes with the family's memory saver, dense and wall too, so that a speed-up is one
over the best dense run and not over a wasteful one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..errors import ScheduleError
from ..patching.apply import apply
from ..patching.patch import Patch
from ..patching.wall import apply_wall
from ..reduction.operators import Operators, TokenStride
from ..runner import Runner
from ..schedule import PAPER_SENSITIVE_LAYERS, Schedule, paper_schedule
from .fastvggt import apply_fastvggt

Apply = Callable[[], Patch]
"""Puts a treatment on the model that it was made for; the patch removes it."""

ACCEPTED = (
    "dense, wall, paper, fastvggt, uniform:QUERY:KEY_VALUE (such as uniform:4:16), "
    "token_stride:QUERY:KEY_VALUE (the same factors, with mass correction), a shipped profile's "
    "name, or a profile's path (with a separator, or ending in .json)"
)

THINNED = Operators(key_value=TokenStride(keep_special=True, keep_anchor=True, mass_correction=1.0))
"""Operators of ``token_stride``; those of ``uniform`` are the paper's. Both unmerge by copying, so
that a benchmark shows pruning and merging by themselves."""

REFERENCE_SENSITIVE = (1, 2, 6)
"""Sensitive layers of the reference model, for its ``paper`` schedule. The paper does not cover
this model; these are the layers that bear pruning least by docs/reference-model.md."""


def treatments(
    names: Sequence[str], runner: Runner, sensitive: Sequence[int] | None = None
) -> dict[str, Apply]:
    """Return treatments by name, each once and tried on the model.

    Args:
        names: Names as in `ACCEPTED`.
        runner: The model to treat; left as it was.
        sensitive: Sensitive layers of ``paper``; None takes the paper's, or the reference model's.

    Raises:
        ScheduleError: If a name is unknown, or the paper's schedule needs ``sensitive``.
        ProfileError: If a profile is malformed or unknown.
        PatchError: If a treatment does not fit the model.
    """
    if not names:
        raise ScheduleError(f"no schedule was named, expected some of: {ACCEPTED}")
    found = {}
    for name in dict.fromkeys(names):
        found[name] = _treatment(name, runner, sensitive)
        found[name]().remove()
    return found


def _treatment(name: str, runner: Runner, sensitive: Sequence[int] | None) -> Apply:
    depth = runner.depth
    if name == "wall":
        return partial(apply_wall, runner)
    if name == "fastvggt":
        return partial(apply_fastvggt, runner)
    if name == "dense":
        schedule = Schedule.dense(depth)
    elif name == "paper":
        schedule = _paper(runner.family.name, depth, sensitive)
    elif name.startswith("uniform"):
        schedule = Schedule.uniform(depth, *_factors(name))
    elif name.startswith(THINNED.key_value.name):
        schedule = Schedule.uniform(depth, *_factors(name), operators=THINNED)
    elif name.endswith(".json") or "/" in name or "\\" in name or name in _shipped():
        return partial(apply, runner.model, name, family=runner.family, guard=False)
    else:
        raise ScheduleError(f"no schedule is called '{name}', expected {ACCEPTED}")
    return partial(apply, runner.model, schedule, family=runner.family, guard=False)


def _shipped() -> tuple[str, ...]:
    from ..profile import shipped_names

    return tuple(shipped_names())


def _paper(family: str, depth: int, sensitive: Sequence[int] | None) -> Schedule:
    if sensitive is None and family == "reference":
        sensitive = [layer for layer in REFERENCE_SENSITIVE if layer < depth]
    if sensitive is None and (family, depth) not in PAPER_SENSITIVE_LAYERS:
        raise ScheduleError(
            f"schedule 'paper': the paper names no sensitive layers for family '{family}' "
            f"with {depth} global layers: give them, counted from 0 (--sensitive 3,4)"
        )
    return paper_schedule(family, depth, sensitive=sensitive)


def _factors(name: str) -> tuple[int, int]:
    parts = name.split(":")[1:]
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ScheduleError(
            f"schedule '{name}', expected {name.partition(':')[0]}:QUERY:KEY_VALUE with two "
            "integers of at least 1, such as uniform:4:16"
        )
    return int(parts[0]), int(parts[1])
