"""The known families, and the recognition of a model's family.

A new family is one file that ends in ``FAMILY = Family(...)`` and one entry in `FAMILIES`.
"""

from __future__ import annotations

from torch import nn

from ..errors import FamilyError
from . import da3, mapanything, omega, pi3, reference, vggt
from .base import Family, unwrap

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (reference, vggt, pi3, da3, omega, mapanything)
}


def named_family(name: str) -> Family:
    """Return a family by its name.

    Raises:
        FamilyError: If there is no such family.
    """
    if name not in FAMILIES:
        raise FamilyError(f"no family is named '{name}', expected one of: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def detect(model: nn.Module) -> Family:
    """Return the family of a model, which may be inside compile and data-parallel wrappers.

    Raises:
        FamilyError: If no family knows the architecture. The message has the reason if the model
            resembles a family.
    """
    root = unwrap(model)
    for family in FAMILIES.values():
        if family.matches(root):
            return family
    for family in FAMILIES.values():
        reason = family.explain_mismatch(root)
        if reason is not None:
            raise FamilyError(f"{type(root).__name__} cannot be reduced: {reason}")
    if type(root).__name__ == "DataParallel":
        raise FamilyError(
            "DataParallel copies modules to each device, and copies do not follow a schedule: use "
            "one process per device (DistributedDataParallel)"
        )
    raise FamilyError(
        f"{type(root).__name__} is of no family that spark3r knows ({', '.join(FAMILIES)}). "
        "For another architecture, name its global attention modules: "
        "spark3r.apply(model, schedule, family=spark3r.families.generic("
        "'blocks.*.attn', patch_size=14, special=5))"
    )
