"""The known families, and the recognition of a model's family.

A new family is one file that ends in ``FAMILY = Family(...)`` and one entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from ..errors import FamilyError
from . import da3, mapanything, omega, panovggt, pi3, reference, vggt, worldmirror
from .base import Family, unwrap

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (reference, vggt, pi3, da3, omega, mapanything, worldmirror, panovggt)
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
    """Return the family of a model, which may be inside wrappers.

    Raises:
        FamilyError: If no family knows the architecture. The message has the reason if the model
            resembles a family.
    """
    root = unwrap(model)
    for family in FAMILIES.values():
        if family.matches(root):
            return family
    _refuse_look_alike(root, FAMILIES.values())
    inside = _inside(root, lambda module: any(each.matches(module) for each in FAMILIES.values()))
    if inside is not None:
        return next(family for family in FAMILIES.values() if family.matches(inside))
    raise FamilyError(
        f"{type(root).__name__} is of no family that spark3r knows ({', '.join(FAMILIES)}). "
        "For another architecture, name its global attention modules: "
        "spark3r.apply(model, schedule, family=spark3r.families.generic("
        "'blocks.*.attn', patch_size=14, special=5))"
    )


def root_of(model: nn.Module, family: Family) -> nn.Module:
    """Return the model of a family: what was given without its wrappers, or a module inside it.

    Raises:
        FamilyError: If the family matches neither, or several modules inside.
    """
    root = unwrap(model)
    if family.matches(root):
        return root
    _refuse_look_alike(root, (family,))
    inside = _inside(root, family.matches)
    if inside is not None:
        return inside
    other = next((each.name for each in FAMILIES.values() if each.matches(root)), None)
    raise FamilyError(
        f"{type(root).__name__} does not have the structure of family '{family.name}', nor has "
        "anything inside it: "
        + (f"it is of family '{other}'" if other else "describe it with spark3r.generic(...)")
    )


def _refuse_look_alike(root: nn.Module, families: Iterable[Family]) -> None:
    """Raise an error if a model, or the only module of a wrapper, resembles a family."""
    module = root
    while True:
        if type(module).__name__ == "DataParallel":
            raise FamilyError(
                "DataParallel copies modules to each device, and copies do not follow a schedule: "
                "use one process per device (DistributedDataParallel)"
            )
        if any(family.matches(module) for family in FAMILIES.values()):
            return
        for family in families:
            reason = family.explain_mismatch(module)
            if reason is not None:
                raise FamilyError(f"{type(root).__name__} cannot be reduced: {reason}")
        children = list(module.children())
        if len(children) != 1:
            return
        module = children[0]


def _inside(root: nn.Module, matches: Callable[[nn.Module], bool]) -> nn.Module | None:
    """Return the one module inside a model that matches, or None.

    Raises:
        FamilyError: If there are several. What lies inside of one does not count.
    """
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting = list(root.named_children())
    while waiting:
        name, module = waiting.pop(0)
        module = unwrap(module)
        if module in seen:
            continue
        seen.add(module)
        if matches(module):
            found[name] = module
        else:
            waiting += [(f"{name}.{each}", child) for each, child in module.named_children()]
    if len(found) > 1:
        raise FamilyError(
            f"{type(root).__name__} holds {len(found)} models that spark3r knows, "
            f"{', '.join(found)}: apply to each of them"
        )
    return next(iter(found.values()), None)
