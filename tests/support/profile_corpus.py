"""Malformed profiles: how to make one out of a valid document, and the exact message it gets."""

from __future__ import annotations

from collections.abc import Callable

from profile_documents import OPERATORS, Document


def _set(*path: str | int, value: object) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        inner = document
        for step in path[:-1]:
            inner = inner[step]  # type: ignore[index]
        inner[path[-1]] = value  # type: ignore[index]

    return change


def _drop(*path: str | int) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        inner = document
        for step in path[:-1]:
            inner = inner[step]  # type: ignore[index]
        del inner[path[-1]]  # type: ignore[arg-type]

    return change


_OPERATORS = ("schedules", 0, "operators")
_LAYER = ("schedules", 0, "layers", 1)
_RUN = ("measurements", 0, "schedules", 0)

# Documents that the JSON Schema refuses as well.
MALFORMED: dict[str, tuple[Callable[[Document], None], str]] = {
    "another format": (
        _set("format", value="something"),
        'format is "something", expected "spark3r-profile"',
    ),
    "no format": (_drop("format"), 'format is missing, expected "spark3r-profile"'),
    "newer version": (
        _set("version", value=3),
        "version is 3, expected 1 or 2: a newer spark3r reads it",
    ),
    "version 0": (_set("version", value=0), "version is 0, expected 1 or 2"),
    "version as text": (_set("version", value="2"), 'version is "2", expected 1 or 2'),
    "version true": (_set("version", value=True), "version is true, expected 1 or 2"),
    "misspelt key": (
        _set("schedules", 0, "layres", value=[]),
        "schedules[0].layres is unknown, did you mean 'layers'?",
    ),
    "unknown key": (
        _set("measurements", 0, "wall", "foo", value=1),
        "measurements[0].wall.foo is unknown, expected only: median_ms, spread_ms, n",
    ),
    "unknown status": (
        _set("status", value="guessed"),
        "status is \"guessed\", expected 'measured', 'paper' or 'prior'",
    ),
    "factor 0": (
        _set(*_LAYER, "key_value", value=0),
        "schedules[0].layers[1].key_value is 0, expected 1 or more",
    ),
    "factor with a fraction": (
        _set(*_LAYER, "key_value", value=1.5),
        "schedules[0].layers[1].key_value is 1.5, expected an integer",
    ),
    "factor true": (
        _set(*_LAYER, "query", value=True),
        "schedules[0].layers[1].query is true, expected an integer",
    ),
    "factor as text": (
        _set(*_LAYER, "query", value="2"),
        'schedules[0].layers[1].query is "2", expected an integer',
    ),
    "factor null": (
        _set(*_LAYER, "query", value=None),
        "schedules[0].layers[1].query is null, expected an integer",
    ),
    "factor missing": (
        _drop(*_LAYER, "query"),
        "schedules[0].layers[1].query is missing, expected: Reduction factor of the queries, 1 for "
        "none",
    ),
    "operators without their revision": (
        _drop("schedules", 0, "operators", "revision"),
        "schedules[0].operators.revision is missing, expected: Revision of the operators' "
        "definitions",
    ),
    "operator of a layer": (
        _set(*_LAYER, "operators", value={"query": {}, "revision": 3}),
        "x.json: 2 problems\n"
        "  schedules[0].layers[1].operators.query.name is missing, expected: Registered name of "
        "the operator, such as `token_stride`\n"
        "  schedules[0].layers[1].operators.key_value is missing, expected: Operator that prunes "
        "the keys and values",
    ),
    "kernels of nothing": (
        _set("measurements", 0, "kernels", value=[]),
        "measurements[0].kernels is a list of 0, expected 1 or more entries",
    ),
    "role of version 1": (
        _set("measurements", 0, "clips", 0, "role", value="selection"),
        'measurements[0].clips[0].role is "selection", expected '
        "'search', 'validation' or 'held_out'",
    ),
    "a list for an object": (
        _set("model", value=[]),
        "model is a list of 0, expected an object",
    ),
    "an object for a list": (
        _set("schedules", value={}),
        "schedules is an object, expected a list",
    ),
    "no schedule": (
        _set("schedules", value=[]),
        "schedules is a list of 0, expected 1 or more entries",
    ),
    "fingerprint": (
        _set("model", "fingerprint", value="abc"),
        'model.fingerprint is "abc", expected a string that matches ^[0-9a-f]{64}$',
    ),
    "grid of three": (
        _set("measurements", 0, "grid", value=[1, 2, 3]),
        "measurements[0].grid is a list of 3, expected 2 or fewer entries",
    ),
    "grid of one": (
        _set("measurements", 0, "grid", value=[10]),
        "measurements[0].grid[1] is missing, expected: Rows and columns of patches per frame",
    ),
    "grid with a 0": (
        _set("measurements", 0, "grid", value=[0, 2]),
        "measurements[0].grid[0] is 0, expected 1 or more",
    ),
    "no latency": (
        _set(*_RUN, "predicted_ms", value=0),
        "measurements[0].schedules[0].predicted_ms is 0, expected more than 0",
    ),
    "no figures": (
        _set(*_RUN, "figures", 0, "error", value={}),
        "measurements[0].schedules[0].figures[0].error is an object, expected 1 or more entries",
    ),
    "date of the wrong kind": (
        _set("measurements", 0, "date", value=20261122),
        "measurements[0].date is 20261122, expected a string",
    ),
    "measured without measurements": (
        _set("measurements", value=[]),
        'schedules[0] "fast" is in no measurement, expected one with status "measured"',
    ),
    "measured without fingerprint": (
        _set("model", "fingerprint", value=None),
        'model.fingerprint is null, expected a fingerprint with status "measured"',
    ),
    "paper with measurements": (
        _set("status", value="paper"),
        "x.json: 2 problems\n"
        '  measurements is a list of 1, expected none with status "paper"\n'
        '  source is null, expected a citation with status "paper"',
    ),
    "several at once": (
        lambda document: (
            _set("default", value=3)(document),
            _set(*_LAYER, "query", value=-1)(document),
            _set("zebra", value=3)(document),
        )[0],
        "x.json: 3 problems\n"
        "  default is 3, expected a string\n"
        "  schedules[0].layers[1].query is -1, expected 1 or more\n"
        "  zebra is unknown, expected only: $schema, format, version, status, source, notes, "
        "model, default, schedules, measurements, sensitivity",
    ),
}

# Documents that only the class refuses: the JSON Schema cannot state these rules.
CONTRADICTORY: dict[str, tuple[Callable[[Document], None], str]] = {
    "version 2.0": (_set("version", value=2.0), "version is 2.0, expected 1 or 2"),
    "factor 1.0": (
        _set(*_LAYER, "key_value", value=1.0),
        "schedules[0].layers[1].key_value is 1.0, expected an integer",
    ),
    "default of no schedule": (
        _set("default", value="slow"),
        'default is "slow", expected one of: fast',
    ),
    "too few layers": (
        _drop(*_LAYER),
        "schedules[0].layers is a list of 1, expected one rule for each of the model's 2 global "
        "layers",
    ),
    "index out of order": (
        _set(*_LAYER, "index", value=0),
        "schedules[0].layers[1].index is 0, expected 1",
    ),
    "another module": (
        _set(*_LAYER, "module", value="blocks.7.attn"),
        'schedules[0].layers[1].module is "blocks.7.attn", expected "blocks.1.attn" as in '
        "model.global_layers[1]",
    ),
    "module twice": (
        lambda document: (
            _set("model", "global_layers", 1, value="blocks.0.attn")(document),
            _set(*_LAYER, "module", value="blocks.0.attn")(document),
        )[0],
        "schedules[0].layers[1].call is 0, expected 1, the number of entries "
        '"blocks.0.attn" before model.global_layers[1]',
    ),
    "strength above 1": (
        _set(*_OPERATORS, "key_value", "mass_correction", value=1.5),
        "schedules[0].operators: mass_correction is 1.5, expected a number from 0 to 1",
    ),
    "group as text": (
        _set(*_OPERATORS, "query", "group", value="20"),
        "schedules[0].operators: group is '20', expected an integer of at least 1",
    ),
    "way of unmerging": (
        _set(*_OPERATORS, "query", "unmerge", value="mean"),
        "schedules[0].operators: unmerge is 'mean', expected one of: copy, linear",
    ),
    "unknown operator": (
        _set(*_OPERATORS, "key_value", "name", value="nearest_frames"),
        "schedules[0].operators: key-value operator is 'nearest_frames', expected one of: "
        "temporal_stride, token_stride, diverse_frames",
    ),
    "unknown field of an operator": (
        _set(*_OPERATORS, "key_value", "group", value=20),
        "schedules[0].operators: key-value operator 'temporal_stride' has no field 'group', "
        "expected only: keep_special, keep_anchor, mass_correction",
    ),
    "unknown operator of a layer": (
        _set(*_LAYER, "operators", value={**OPERATORS, "query": {"name": "x"}}),
        "schedules[0].layers[1].operators: query operator is 'x', expected one of: intra_group",
    ),
    "unknown operator of a baseline": (
        _set("measurements", 0, "baselines", 0, "operators", "query", "name", value="x"),
        "measurements[0].baselines[0].operators: query operator is 'x', expected one of: "
        "intra_group",
    ),
    "unknown operator of sensitivities": (
        _set("sensitivity", 0, "operators", "query", "name", value="x"),
        "sensitivity[0].operators: query operator is 'x', expected one of: intra_group",
    ),
    "schedule twice": (
        lambda document: document["schedules"].append(document["schedules"][0]),
        'schedules[1].name is "fast" a second time, expected another name',
    ),
    "length rule": (
        _set("schedules", 0, "length", "max_frames", value=1),
        "schedules[0].length: max_frames is 1, expected an integer of at least 9",
    ),
    "measurement of no schedule": (
        _set(*_RUN, "schedule", value="slow"),
        "x.json: 2 problems\n"
        '  measurements[0].schedules[0].schedule is "slow", expected one of: fast\n'
        '  schedules[0] "fast" is in no measurement, expected one with status "measured"',
    ),
    "figures of no clip": (
        _set("measurements", 0, "clips", value=[]),
        'measurements[0].schedules[0].figures[0].clip is "room", expected a clip listed in clips',
    ),
    "baseline of no schedule": (
        _set("measurements", 0, "baselines", 0, "against", value="slow"),
        'measurements[0].baselines[0].against is "slow", expected one of: fast',
    ),
    "baseline of another model": (
        _set("measurements", 0, "baselines", 0, "factors", value=[[1, 4]]),
        "measurements[0].baselines[0].factors is a list of 1, expected 2 layers",
    ),
    "sensitivities of another model": (
        _set("sensitivity", 0, "values", value=[[0.1, 0.2]]),
        "sensitivity[0].values is a list of 1, expected 2 layers",
    ),
    "sensitivities of other factors": (
        _set("sensitivity", 0, "factors", value=[2]),
        "x.json: 2 problems\n"
        "  sensitivity[0].values[0] is a list of 2, expected one value for each of 1 factors\n"
        "  sensitivity[0].values[1] is a list of 2, expected one value for each of 1 factors",
    ),
}
