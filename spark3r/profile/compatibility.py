"""Comparison of a profile and its evidence with a model at hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..env import device_name
from ..errors import printable
from ..reduction.operators import OPERATORS_REVISION
from .document import Profile
from .model import ModelRecord

BY_CHECKPOINT = ("vggt", "pi3", "da3", "omega", "mapanything", "worldmirror", "panovggt")
"""Families that ``--model FAMILY:WEIGHTS`` loads."""

_SHOWN_HEX = 12


@dataclass(frozen=True)
class Compatibility:
    """The result of comparing a profile with a model.

    Attributes:
        errors: Reasons why the profile cannot be applied to the model.
        warnings: Reasons why its evidence may not hold for the model.
    """

    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def compare(
    profile: Profile,
    record: ModelRecord,
    *,
    name: str | None = None,
    device: object = None,
    dtype: object = None,
    frames: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Compatibility:
    """Return why a profile cannot be applied to a model, or why its evidence may not hold there.

    Only what is known of the model is compared.

    Args:
        profile: The profile.
        record: Record of the model, from `identity.describe`.
        name: Name of the model for ``--model``; None when unknown.
        device: Device of the model, as torch accepts it; None when unknown.
        dtype: Precision of its passes; None when unknown.
        frames: Length of the clips it will see; None when unknown.
        grid: Rows and columns of patches per frame; None when unknown.
    """
    errors = tuple(_mismatches(profile.model, record))
    if errors:
        return _printable(errors, ())
    warnings = [
        *_other_architecture(profile.model, record),
        *_operators(profile),
        *_execution(profile),
    ]
    if profile.status == "measured":
        warnings += _evidence(profile, record, name, device, dtype, frames, grid)
    else:
        taken = "a rule of thumb" if profile.status == "prior" else "a paper's schedule"
        warnings.append(
            f"the profile is {taken} and was not measured on your weights; "
            f"{calibrate_line(record.family, name)} measures one"
        )
    return _printable(errors, warnings)


def _printable(errors: Iterable[str], warnings: Iterable[str]) -> Compatibility:
    """Return the reasons without control characters, which names in a profile may hold."""
    return Compatibility(tuple(map(printable, errors)), tuple(map(printable, warnings)))


def calibrate_line(family: str, name: str | None, *, own_clip: bool = False) -> str:
    """Return the command that measures a profile for a model.

    Args:
        family: Family of the model.
        name: Name of the model for ``--model``; None puts a placeholder there and explains it.
        own_clip: True adds ``--clip`` with a placeholder.
    """
    rest = "--clip CLIP --budget 50%" if own_clip else "--budget 50%"
    if name is not None:
        return f"`calibrate --model {shlex.quote(name)} {rest}`"
    if family in BY_CHECKPOINT:
        return f"`calibrate --model {family}:WEIGHTS {rest}` (WEIGHTS: your checkpoint)"
    return (
        f"`calibrate --model PACKAGE.MODULE:FACTORY {rest}` (FACTORY: a function of yours "
        "that returns the model)"
    )


def _mismatches(expected: ModelRecord, found: ModelRecord) -> Iterator[str]:
    if found.family != expected.family:
        yield f"the profile is for family '{expected.family}', the model's is '{found.family}'"
        return
    ours, theirs = expected.global_layers, found.global_layers
    if len(ours) != len(theirs):
        yield (
            f"the profile is for {len(ours)} global layers ({expected.name}), "
            f"the model has {len(theirs)}"
        )
    elif not _same_modules(ours, theirs):
        first = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len({*pair}) > 1)
        yield (
            f"global layer {first} of the profile is '{ours[first]}', "
            f"the model's is '{theirs[first]}'"
        )


def _same_modules(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether module names agree, apart from one outer module around the whole network.

    Depth-Anything-3's network is called ``model.`` inside its API object, and ``da3.`` inside the
    nested model.
    """
    longer, shorter = (ours, theirs) if len(ours[0]) >= len(theirs[0]) else (theirs, ours)
    outer = longer[0].removesuffix(shorter[0])
    if outer and not outer.endswith("."):
        return False
    return all(a == outer + b for a, b in zip(longer, shorter, strict=True))


def _other_architecture(expected: ModelRecord, found: ModelRecord) -> Iterator[str]:
    for field, words in (
        ("width", "width"),
        ("heads", "attention heads"),
        ("patch_size", "patch size"),
        ("special_tokens", "special tokens per frame"),
    ):
        ours, theirs = getattr(expected, field), getattr(found, field)
        if None not in (ours, theirs) and ours != theirs:
            yield f"the profile is for {expected.name}: {words} {ours}, the model's {theirs}"


def _operators(profile: Profile) -> Iterator[str]:
    revisions = {
        operators.revision
        for record in profile.schedules
        for operators in (record.operators, *(layer.operators for layer in record.layers))
        if operators is not None
    }
    for revision in sorted(revisions - {OPERATORS_REVISION}):
        yield (
            f"the profile was made with operators of revision {revision}, this spark3r has "
            f"revision {OPERATORS_REVISION}: the results may differ"
        )


def _execution(profile: Profile) -> Iterator[str]:
    for record in profile.schedules:
        if choices := record.execution.describe():
            yield (
                f"schedule '{record.name}' is for a model with {choices}; spark3r changes only "
                "attention, so make these choices yourself or expect another latency and quality"
            )


def _evidence(
    profile: Profile,
    record: ModelRecord,
    name: str | None,
    device: object,
    dtype: object,
    frames: int | None,
    grid: tuple[int, int] | None,
) -> Iterator[str]:
    ours, theirs = profile.model.fingerprint, record.fingerprint
    if ours is not None and theirs is not None and ours != theirs:
        yield (
            f"the profile was measured on other weights (fingerprint {ours[:_SHOWN_HEX]}, yours "
            f"{theirs[:_SHOWN_HEX]}); {calibrate_line(record.family, name)} measures one on yours"
        )
    measurements = profile.measurements
    devices = sorted({entry.device for entry in measurements})
    if device is not None and (found := device_name(device)) not in devices:
        yield f"the profile was measured on {_either(devices)}, the model is on {found}"
    dtypes = sorted({entry.dtype for entry in measurements})
    if dtype is not None and (found := str(dtype).removeprefix("torch.")) not in dtypes:
        yield f"the profile was measured in {_either(dtypes)}, the model runs in {found}"
    grids = sorted({entry.grid for entry in measurements})
    if grid is not None and grid not in grids:
        measured = _either([f"{rows}x{columns}" for rows, columns in grids])
        yield f"the profile was measured on grids of {measured}, the clip's is {grid[0]}x{grid[1]}"
    longest = max(entry.frames for entry in measurements)
    if frames is not None and frames > longest:
        yield f"the profile was measured on clips of up to {longest} frames, this one has {frames}"


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)
