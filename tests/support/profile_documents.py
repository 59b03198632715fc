"""Profile documents as plain JSON values: one of each status by hand, and any by hypothesis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from spark3r.reduction.operators import OPERATORS_REVISION

Document = dict[str, Any]


def copied(value: Any) -> Any:
    """Return a copy in which, unlike a deepcopy's, no two places share anything."""
    return json.loads(json.dumps(value))


OPERATORS: Document = {
    "query": {"name": "intra_group", "group": 20, "merge_anchor": True, "unmerge": "copy"},
    "key_value": {
        "name": "temporal_stride",
        "keep_special": False,
        "keep_anchor": False,
        "mass_correction": 0.5,
    },
    "revision": OPERATORS_REVISION,
}
TIMING: Document = {"median_ms": 12.5, "spread_ms": 0.25, "n": 20}
ENVIRONMENT: Document = {
    "spark3r": "0.1.0",
    "python": "3.11.7",
    "os": "Linux 6 x86_64",
    "packages": {"torch": "2.13.0"},
    "cpu": "a processor",
    "cores": 2,
    "threads": 1,
    "gpus": [],
    "driver": None,
    "cuda": None,
    "sdpa_backends": ["math"],
    "matmul_precision": "highest",
}
MEASUREMENT: Document = {
    "device": "a processor",
    "dtype": "float32",
    "kernels": [
        {
            "operation": "attention",
            "implementation": "math",
            "refused": [{"implementation": "flash", "reason": "there is no GPU"}],
        }
    ],
    "frames": 48,
    "grid": [8, 10],
    "latency_model": {
        "form": "separable",
        "constants": {"a": 1.0},
        "relative_error": 0.02,
        "fitted_frames": [16, 32],
        "extended_to": 48,
        "target_error": -0.01,
    },
    "dense": {"latency": TIMING, "peak_memory_bytes": None, "figures": []},
    "wall": TIMING,
    "schedules": [
        {
            "latency": TIMING,
            "peak_memory_bytes": 1024,
            "figures": [
                {
                    "clip": "room",
                    "deviation": {"depth": 0.01},
                    "error": {"depth": 0.1},
                    "consistency": None,
                }
            ],
            "schedule": "fast",
            "predicted_ms": 12.0,
            "budget_ms": 13.0,
        }
    ],
    "baselines": [
        {
            "latency": TIMING,
            "peak_memory_bytes": None,
            "figures": [],
            "baseline": "uniform",
            "against": "fast",
            "predicted_ms": 12.0,
            "operators": OPERATORS,
            "factors": [[1, 4], [1, 4]],
        }
    ],
    "clips": [{"name": "room", "digest": "0123456789abcdef", "frames": 48, "role": "held_out"}],
    "environment": ENVIRONMENT,
    "seed": 0,
    "date": "2026-11-22",
}
SENSITIVITY: Document = {
    "axis": "key_value",
    "profiler": "probe",
    "metric": "deviation.depth",
    "clips": ["room"],
    "frames": 48,
    "operators": OPERATORS,
    "operating_point": [1, 1],
    "factors": [2, 4],
    "values": [[0.01, 0.02], [0.03, None]],
}


def paper() -> Document:
    """Return a small valid document of status ``paper``, with two global layers."""
    return copied(
        {
            "$schema": "schema/profile-v2.schema.json",
            "format": "spark3r-profile",
            "version": 2,
            "status": "paper",
            "source": "a paper, section 4",
            "notes": "",
            "model": {
                "family": "vggt",
                "name": "Small",
                "weights": "someone/small",
                "width": 64,
                "heads": 4,
                "patch_size": 14,
                "special_tokens": 5,
                "fingerprint": None,
                "global_layers": ["blocks.0.attn", "blocks.1.attn"],
            },
            "default": "fast",
            "schedules": [
                {
                    "name": "fast",
                    "length": {
                        "mode": "constant",
                        "calibrated_frames": 48,
                        "min_frames": 1,
                        "max_frames": None,
                    },
                    "operators": OPERATORS,
                    "layers": [
                        {"index": 0, "module": "blocks.0.attn", "query": 1, "key_value": 4},
                        {"index": 1, "module": "blocks.1.attn", "query": 2, "key_value": 8},
                    ],
                }
            ],
            "measurements": [],
            "sensitivity": [],
        }
    )


def reference_profile() -> Document:
    """Return a document that fits the reference model by its layers."""
    document = paper()
    modules = [f"aggregator.global_blocks.{index}.attn" for index in range(8)]
    document["model"].update(
        family="reference", name="reference", width=128, patch_size=8, global_layers=modules
    )
    document["schedules"][0]["layers"] = [
        {"index": index, "module": module, "query": 1, "key_value": 2}
        for index, module in enumerate(modules)
    ]
    return document


def measured() -> Document:
    """Return a small valid document of status ``measured``."""
    document = paper()
    document.update(status="measured", source=None)
    document["model"]["fingerprint"] = "ab" * 32
    document["measurements"] = [copied(MEASUREMENT)]
    document["sensitivity"] = [copied(SENSITIVITY)]
    return document


_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
_factors = st.integers(1, 4096)
_positive = st.floats(1e-3, 1e9, allow_nan=False)
_figures = st.none() | st.dictionaries(_names, st.floats(-1e3, 1e3), min_size=1, max_size=3)

_operators = st.fixed_dictionaries(
    {
        "query": st.fixed_dictionaries(
            {"name": st.just("intra_group")},
            optional={
                "group": _factors,
                "merge_anchor": st.booleans(),
                "unmerge": st.sampled_from(["copy", "linear"]),
            },
        ),
        "key_value": st.fixed_dictionaries(
            {"name": st.sampled_from(["temporal_stride", "token_stride"])},
            optional={
                "keep_special": st.booleans(),
                "keep_anchor": st.booleans(),
                "mass_correction": st.floats(0, 1) | st.integers(0, 1),
            },
        ),
        "revision": st.integers(1, 9),
    }
)
_execution = st.fixed_dictionaries(
    {},
    optional={
        "weights_dtype": st.none() | _names,
        "heads": st.none() | st.lists(_names, max_size=2),
        "compiled": st.lists(_names, max_size=2),
    },
)
_timing = st.fixed_dictionaries(
    {"median_ms": _positive, "spread_ms": st.floats(0, 100), "n": st.integers(1, 99)}
)


@st.composite
def _lengths(draw: st.DrawFn) -> Document:
    least = draw(st.integers(1, 500))
    return {
        "mode": draw(st.sampled_from(["constant", "constant_kept_frames", "paper"])),
        "calibrated_frames": draw(st.integers(1, 500)),
        "min_frames": least,
        "max_frames": draw(st.none() | st.integers(least, 2000)),
    }


@st.composite
def _measurements(draw: st.DrawFn, names: list[str], layers: int) -> Document:
    clips = draw(st.lists(_names, unique=True, max_size=2))

    def run() -> Document:
        return {
            "latency": draw(_timing),
            "peak_memory_bytes": draw(st.none() | st.integers(1, 2**40)),
            "figures": [
                {"clip": clip, "deviation": draw(_figures), "error": draw(_figures)}
                for clip in clips
            ],
        }

    return {
        **copied(MEASUREMENT),
        "device": draw(_names),
        "execution": draw(_execution),
        "grid": [draw(_factors), draw(_factors)],
        "dense": run(),
        "wall": draw(_timing),
        "schedules": [
            {**run(), "schedule": name, "predicted_ms": draw(_positive)} for name in names
        ],
        "baselines": [
            {
                **run(),
                "baseline": draw(st.sampled_from(["uniform", "paper"])),
                "against": names[0],
                "predicted_ms": draw(_positive),
                "operators": draw(_operators),
                "factors": [[draw(_factors), draw(_factors)] for _ in range(layers)],
            }
        ],
        "clips": [
            {
                "name": clip,
                "digest": "0" * 16,
                "frames": 8,
                "role": draw(st.sampled_from(["search", "validation", "held_out"])),
                "masked": draw(st.floats(0, 1)),
            }
            for clip in clips
        ],
        "date": draw(st.dates()).isoformat(),
    }


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Return any valid document."""
    modules = draw(st.lists(_names, min_size=1, max_size=4))
    names = draw(st.lists(_names, unique=True, min_size=1, max_size=3))
    document = paper()
    document["model"].update(
        family=draw(_names), global_layers=modules, width=draw(st.none() | _factors)
    )
    document["default"] = draw(st.sampled_from(names))
    document["schedules"] = [
        {
            "name": name,
            "length": draw(_lengths()),
            "operators": draw(_operators),
            "execution": draw(_execution),
            "layers": [
                {
                    "index": index,
                    "module": module,
                    "call": modules[:index].count(module),
                    "query": draw(_factors),
                    "key_value": draw(_factors),
                    **({"operators": draw(_operators)} if draw(st.booleans()) else {}),
                }
                for index, module in enumerate(modules)
            ],
        }
        for name in names
    ]
    document["status"] = draw(st.sampled_from(["measured", "paper", "prior"]))
    document["notes"] = draw(st.text(st.characters(codec="utf-8"), max_size=9)) + "."
    if document["status"] == "measured":
        document["source"] = None
        document["model"]["fingerprint"] = "0f" * 32
        document["measurements"] = [draw(_measurements(names, len(modules)))]
        table = copied(SENSITIVITY)
        value = st.none() | st.floats(0, 10)
        table["values"] = [[draw(value), draw(value)] for _ in modules]
        document["sensitivity"] = [table]
    return document


# Values that are wrong nearly everywhere. Not among them: integers written with a fraction, dates
# that do not exist and keys given twice, which JSON Schema does not tell from the right ones.
JUNK = (None, True, -1, 0, 1, 0.5, -0.5, "", "x", "2026-01-31", [], [1], [1, 2], {}, {"x": 1})


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key or index) of a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


@st.composite
def mutated(draw: st.DrawFn, document: Document) -> Document:
    """Return a copy of a document with one or two changes, after which it may be malformed."""
    value = copied(document)
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(_places(value))))
        change = draw(st.sampled_from(["replace", "remove", "repeat", "add"]))
        if change == "remove":
            del container[key]
        elif change == "repeat" and isinstance(container, list):
            container.append(container[key])
        elif change == "add" and isinstance(container, dict):
            container["x"] = copied(draw(st.sampled_from(JUNK)))
        else:
            container[key] = copied(draw(st.sampled_from(JUNK)))
        if not value:
            break
    return value
