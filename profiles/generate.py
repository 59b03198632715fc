"""Write the shipped profiles, their table, the JSON Schema and the fields in docs/profile.md.

    python profiles/generate.py

The schedules written here are those of the Spark3R paper, or follow a stated rule; none is
measured. `calibrate` makes the measured profiles of this folder, and the table lists them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from spark3r.profile import STATUS_WORDS, ModelRecord, Profile
from spark3r.profile.document import SCHEMA_NAME, json_schema
from spark3r.profile.files import render
from spark3r.profile.model import Section, section_in
from spark3r.schedule import Schedule, paper_schedule

FOLDER = Path(__file__).parent
FORMAT_PAGE = "docs/profile.md"
FIELDS_MARK = "<!-- fields: written by profiles/generate.py -->\n"
PAPER = "Spark3R, arXiv 2605.06270 v2"
OMEGA_REGISTER_BLOCKS = (2, 6, 9, 14, 20)  # their attention is over registers only


def _record(
    family: str,
    name: str,
    weights: str,
    layers: str,
    blocks: Iterable[int],
    *,
    width: int = 1024,
    patch_size: int = 14,
    special_tokens: int = 5,
) -> ModelRecord:
    """Return the record of a model with heads of 64 channels.

    Args:
        family: Name of the family.
        name: Name of the model.
        weights: Hub id of the weights.
        layers: Module name of a global layer, with ``*`` for the number of its block.
        blocks: Numbers of the blocks with a global layer.
        width: Channels of a token.
        patch_size: Side of a patch in pixels.
        special_tokens: Special tokens per frame.
    """
    return ModelRecord(
        family=family,
        name=name,
        weights=weights,
        width=width,
        heads=width // 64,
        patch_size=patch_size,
        special_tokens=special_tokens,
        global_layers=tuple(layers.replace("*", str(block)) for block in blocks),
    )


VGGT = _record("vggt", "VGGT-1B", "facebook/VGGT-1B", "aggregator.global_blocks.*.attn", range(24))
PI3 = _record("pi3", "Pi3", "yyfz233/Pi3", "decoder.*.attn", range(1, 36, 2))
PI3X = PI3.model_copy(update={"name": "Pi3X", "weights": "yyfz233/Pi3X"})
DA3 = partial(_record, "da3", layers="backbone.pretrained.blocks.*.attn", special_tokens=1)
DA3_GIANT = DA3("DA3-Giant", "depth-anything/DA3-GIANT-1.1", blocks=range(13, 40, 2), width=1536)
DA3_LARGE = DA3("DA3-Large", "depth-anything/DA3-LARGE-1.1", blocks=range(9, 24, 2))
OMEGA = _record(
    "omega",
    "VGGT-Omega-1B",
    "facebook/VGGT-Omega/vggt_omega_1b_512.pt",
    "aggregator.inter_frame_blocks.*.attn",
    (block for block in range(24) if block not in OMEGA_REGISTER_BLOCKS),
    patch_size=16,
    special_tokens=17,
)

MAP_ANYTHING = _record(
    "mapanything",
    "MapAnything",
    "facebook/map-anything-apache",
    "info_sharing.self_attention_blocks.*.attn",
    range(0, 16, 2),
    width=1536,
    special_tokens=1,
)

WORLD_MIRROR = partial(
    _record,
    "worldmirror",
    layers="visual_geometry_transformer.global_blocks.*.attn",
    blocks=range(24),
    special_tokens=7,
)
WORLD_MIRROR_2 = WORLD_MIRROR(
    "WorldMirror-2", "tencent/HY-World-2.0/HY-WorldMirror-2.0/model.safetensors"
)
WORLD_MIRROR_1 = WORLD_MIRROR("WorldMirror-1", "tencent/HunyuanWorld-Mirror")
PANO_VGGT = _record(
    "panovggt",
    "PanoVGGT",
    "YijingGuo/PanoVGGT/model.pt",
    "aggregator.decoder.*.attn",
    range(1, 36, 2),
)


def paper_profile(model: ModelRecord, schedule: Schedule, notes: str = "") -> Profile:
    """Return the profile of a schedule that the paper states for this model."""
    rule = (
        "The query factor is r_Q of eq. 4. The key-value factor is r_KV of eq. 5 in the sensitive "
        "layers and three times as much in the others."
    )
    return Profile.create(
        model,
        {"paper": schedule},
        status="paper",
        source=f"{PAPER}, section IV (eq. 4 and 5; sensitive layers of section IV-D)",
        notes=f"{rule} {notes}".strip(),
    )


def uniform_profile(model: ModelRecord) -> Profile:
    """Return the profile of a rule of thumb: the paper's lower tier in every layer."""
    layers = len(model.global_layers)
    return Profile.create(
        model,
        {"uniform": paper_schedule(model.family, layers, sensitive=range(layers))},
        status="prior",
        source=f"{PAPER}, section IV, eq. 4 and 5",
        notes="Every layer has the factors r_Q of eq. 4 and r_KV of eq. 5, the lower of the "
        "paper's two tiers, because nobody has probed which layers of this model are "
        f"sensitive. The paper did not run {model.name}.",
    )


def shipped_profiles() -> dict[str, Profile]:
    """Return the paper and prior profiles, by name."""
    return {
        "vggt-1b": paper_profile(VGGT, paper_schedule("vggt")),
        "pi3": paper_profile(PI3, paper_schedule("pi3")),
        "da3-giant": paper_profile(DA3_GIANT, paper_schedule("da3")),
        "vggt-omega-1b": paper_profile(
            OMEGA,
            paper_schedule("omega"),
            "The paper counts all blocks. Here the register-attention blocks 2, 6, 9, 14 and 20 "
            "are not counted and not changed.",
        ),
        "pi3x": Profile.create(
            PI3X,
            {"pi3-rule": paper_schedule("pi3")},
            status="prior",
            source=f"{PAPER}, section IV, for Pi3",
            notes="This is the schedule of Pi3, because Pi3X has the same 18 global layers. The "
            "paper did not run Pi3X.",
        ),
        "da3-large": uniform_profile(DA3_LARGE),
        "map-anything": uniform_profile(MAP_ANYTHING),
        "worldmirror-2": uniform_profile(WORLD_MIRROR_2),
        "worldmirror-1": uniform_profile(WORLD_MIRROR_1),
        "panovggt": uniform_profile(PANO_VGGT),
    }


def measured_profiles() -> dict[str, Profile]:
    """Return the profiles of this folder that `calibrate` made, by name."""
    stored = {path.stem: Profile.load(path) for path in sorted(FOLDER.glob("*.json"))}
    return {name: each for name, each in stored.items() if each.status == "measured"}


def origin(profile: Profile) -> str:
    """Return the origin of a profile's schedules, for the table."""
    if profile.status != "measured":
        return str(profile.source)
    return "; ".join(
        f"{entry.device}, {entry.dtype}, {entry.frames} frames, {entry.date}"
        for entry in profile.measurements
    )


def table(profiles: dict[str, Profile]) -> str:
    """Return the README of the folder."""
    lines = [
        "# Shipped profiles",
        "",
        "`python profiles/generate.py` writes this page: change the script, and not the page.",
        "`calibrate` makes measured profiles, which are only listed here.",
        "",
        "| profile | status | model | weights | global layers | source |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{name}` | {STATUS_WORDS[profile.status]} | {profile.model.name} | "
            f"`{profile.model.weights}` | {len(profile.model.global_layers)} | {origin(profile)} |"
            for name, profile in sorted(profiles.items())
        ),
        "",
        "- **measured**: the schedules were run on the model, and the evidence is in the file.",
        "- **paper, not measured**: a publication states this schedule for this model.",
        "- **prior, not measured**: a rule of thumb, which the file's `notes` state.",
        "",
        "`spark3r show NAME` prints a profile. `calibrate` measures one on your own weights.",
        f"[docs/profile.md](../{FORMAT_PAGE}) describes the format.",
    ]
    return "\n".join(lines) + "\n"


def sections(section: type[Section] = Profile) -> list[type[Section]]:
    """Return the classes of the objects in a document, outer ones first."""
    found = [section]
    for field in section.model_fields.values():
        inner = section_in(field.annotation)
        if inner is not None:
            found += [each for each in sections(inner) if each not in found]
    return found


def field_reference() -> str:
    """Return the tables of all fields, from the classes that validate them."""
    lines = []
    for section in sections():
        lines += ["", f"### {section.__name__}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        lines += ["| field | default | meaning |", "|---|---|---|"]
        for name, field in section.model_fields.items():
            inner = section_in(field.annotation)
            link = "" if inner is None else f" ([{inner.__name__}](#{inner.__name__.lower()}))"
            default = "required" if field.is_required() else f"`{_json(field.default)}`"
            meaning = " ".join((field.description or "").split())
            lines.append(f"| `{field.alias or name}`{link} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _json(default: object) -> str:
    if isinstance(default, Section):
        return default.model_dump_json(exclude_defaults=True)
    return json.dumps(default)


def format_page() -> str:
    """Return the page about the format, with its tables of fields renewed."""
    page = (FOLDER.parent / FORMAT_PAGE).read_text(encoding="utf-8")
    prose, mark, _ = page.partition(FIELDS_MARK)
    return prose + mark + field_reference()


def contents() -> dict[str, str]:
    """Return the text of every generated file, by its path in this folder."""
    profiles = shipped_profiles() | measured_profiles()
    return {
        f"../{FORMAT_PAGE}": format_page(),
        **{f"{name}.json": profile.text() for name, profile in profiles.items()},
        "README.md": table(profiles),
        f"schema/{SCHEMA_NAME}": render(json_schema()),
    }


if __name__ == "__main__":
    for name, text in contents().items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
    print("\n".join(sorted(contents())))
