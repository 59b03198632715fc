"""Translation of version 1 profiles to version 2.

Version 2 has the same sections. It writes operators as one object each instead of one flat object,
names the roles of clips differently, and lists the attention backend among the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_Object = dict[str, Any]

_OPERATOR_FIELDS = {
    "query": ("group", "merge_anchor", "unmerge"),
    "key_value": ("keep_special", "keep_anchor", "mass_correction"),
}
_ROLES = {"calibration": "search", "selection": "validation"}


def upgrade(document: _Object) -> _Object:
    """Return a parsed document of version 1 as version 2.

    The document itself is changed. A malformed part stays as it is, and validation reports it.
    """
    for schedule in _objects(document, "schedules"):
        _split_operators(schedule)
        for layer in _objects(schedule, "layers"):
            _split_operators(layer)
    for measurement in _objects(document, "measurements"):
        for baseline in _objects(measurement, "baselines"):
            _split_operators(baseline)
        for clip in _objects(measurement, "clips"):
            for old, new in _ROLES.items():
                if clip.get("role") == old:
                    clip["role"] = new
        if "attention_backend" in measurement:
            backend = measurement.pop("attention_backend")
            measurement["kernels"] = [{"operation": "attention", "implementation": backend}]
    for table in _objects(document, "sensitivity"):
        _split_operators(table)
    return document | {"$schema": "schema/profile-v2.schema.json", "version": 2}


def _objects(parent: _Object, key: str) -> Iterator[_Object]:
    """Yield the objects in a list of a document."""
    entries = parent.get(key)
    if isinstance(entries, list):
        yield from (entry for entry in entries if isinstance(entry, dict))


def _split_operators(parent: _Object) -> None:
    """Replace a flat object of operators by one object per operator."""
    flat = parent.get("operators")
    if not isinstance(flat, dict):
        return
    flat.setdefault("unmerge", "copy")  # the meaning of profiles from before the field existed
    for axis, fields in _OPERATOR_FIELDS.items():
        own = {field: flat.pop(field) for field in fields if field in flat}
        if axis in flat:
            flat[axis] = {"name": flat[axis], **own}
