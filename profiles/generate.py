"""Regenerate the shipped profiles, their table and the JSON Schema.

    python profiles/generate.py

Nothing here is measured: the schedules are those of the Spark3R paper, or follow a stated rule.
"""

from __future__ import annotations

from pathlib import Path

from spark3r.profile import STATUS_WORDS, ModelRecord, Profile
from spark3r.profile.document import SCHEMA_NAME, json_schema
from spark3r.profile.files import render
from spark3r.schedule import Schedule, paper_schedule

FOLDER = Path(__file__).parent
PAPER = "Spark3R, arXiv 2605.06270 v2"
OMEGA_REGISTER_BLOCKS = (2, 6, 9, 14, 20)  # attend over registers only, no global layers

VGGT = ModelRecord(
    family="vggt",
    name="VGGT-1B",
    weights="facebook/VGGT-1B",
    width=1024,
    heads=16,
    patch_size=14,
    special_tokens=5,
    global_layers=tuple(f"aggregator.global_blocks.{i}.attn" for i in range(24)),
)
PI3 = ModelRecord(
    family="pi3",
    name="Pi3",
    weights="yyfz233/Pi3",
    width=1024,
    heads=16,
    patch_size=14,
    special_tokens=5,
    global_layers=tuple(f"decoder.{i}.attn" for i in range(1, 36, 2)),
)
PI3X = PI3.model_copy(update={"name": "Pi3X", "weights": "yyfz233/Pi3X"})
DA3_GIANT = ModelRecord(
    family="da3",
    name="DA3-Giant",
    weights="depth-anything/DA3-GIANT-1.1",
    width=1536,
    heads=24,
    patch_size=14,
    special_tokens=1,
    global_layers=tuple(f"backbone.pretrained.blocks.{i}.attn" for i in range(13, 40, 2)),
)
DA3_LARGE = ModelRecord(
    family="da3",
    name="DA3-Large",
    weights="depth-anything/DA3-LARGE-1.1",
    width=1024,
    heads=16,
    patch_size=14,
    special_tokens=1,
    global_layers=tuple(f"backbone.pretrained.blocks.{i}.attn" for i in range(9, 24, 2)),
)
OMEGA = ModelRecord(
    family="omega",
    name="VGGT-Omega-1B",
    weights="vggt_omega_1b_512.pt",
    width=1024,
    heads=16,
    patch_size=16,
    special_tokens=17,
    global_layers=tuple(
        f"aggregator.inter_frame_blocks.{i}.attn"
        for i in range(24)
        if i not in OMEGA_REGISTER_BLOCKS
    ),
)


def paper_profile(model: ModelRecord, schedule: Schedule, notes: str = "") -> Profile:
    """Return the profile of a schedule that the paper states for this model."""
    rule = (
        "Queries take r_Q of eq. 4, keys and values r_KV of eq. 5 in the sensitive layers and "
        "three times as much in the others."
    )
    return Profile.create(
        model,
        {"paper": schedule},
        status="paper",
        source=f"{PAPER}, section IV (eq. 4 and 5; sensitive layers of section IV-D)",
        notes=f"{rule} {notes}".strip(),
    )


def shipped_profiles() -> dict[str, Profile]:
    """Return every shipped profile by name."""
    return {
        "vggt-1b": paper_profile(VGGT, paper_schedule("vggt")),
        "pi3": paper_profile(PI3, paper_schedule("pi3")),
        "da3-giant": paper_profile(DA3_GIANT, paper_schedule("da3")),
        "vggt-omega-1b": paper_profile(
            OMEGA,
            paper_schedule("omega"),
            "The paper counts blocks; here the register-attention blocks 2, 6, 9, 14 and 20 are "
            "left out of the count, and left alone.",
        ),
        "pi3x": Profile.create(
            PI3X,
            {"pi3-rule": paper_schedule("pi3")},
            status="prior",
            source=f"{PAPER}, section IV, for Pi3",
            notes="Pi3's schedule, carried over because Pi3X has the same 18 global layers. "
            "The paper did not run Pi3X.",
        ),
        "da3-large": Profile.create(
            DA3_LARGE,
            {"uniform": paper_schedule("da3", 8, sensitive=range(8))},
            status="prior",
            source=f"{PAPER}, section IV, eq. 4 and 5",
            notes="Every layer takes r_Q of eq. 4 and r_KV of eq. 5, the lower of the paper's two "
            "tiers, because nobody has probed which layers of this model are sensitive. The paper "
            "did not run DA3-Large.",
        ),
    }


def table(profiles: dict[str, Profile]) -> str:
    """Return the README of the folder."""
    lines = [
        "# Shipped profiles",
        "",
        "Written by `python profiles/generate.py`; change that, not this.",
        "",
        "| profile | status | model | weights | global layers | source |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{name}` | {STATUS_WORDS[profile.status]} | {profile.model.name} | "
            f"`{profile.model.weights}` | {len(profile.model.global_layers)} | {profile.source} |"
            for name, profile in sorted(profiles.items())
        ),
        "",
        "- **measured**: its schedules were run on the model; the evidence is in the file.",
        "- **paper, not measured**: the schedule that a publication states for this model.",
        "- **prior, not measured**: a rule of thumb, stated in the file's `notes`.",
        "",
        "`spark3r show NAME` prints one; `calibrate` measures one on your weights and device.",
        f"The format is [schema/{SCHEMA_NAME}](schema/{SCHEMA_NAME}).",
    ]
    return "\n".join(lines) + "\n"


def contents() -> dict[str, str]:
    """Return the text of every generated file, by its path in this folder."""
    profiles = shipped_profiles()
    return {
        **{f"{name}.json": profile.text() for name, profile in profiles.items()},
        "README.md": table(profiles),
        f"schema/{SCHEMA_NAME}": render(json_schema()),
    }


if __name__ == "__main__":
    for name, text in contents().items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
    print("\n".join(sorted(contents())))
