"""What several ranks that share a clip send one another, for ``spark3r show --ranks``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import ProfileError

if TYPE_CHECKING:
    from ..layout import TokenLayout
    from ..profile import Profile

LINKS: Mapping[str, float] = MappingProxyType(
    {"NVLink 4": 450e9, "PCIe 5.0 x16": 64e9, "100 GbE": 12.5e9}
)
"""Bytes per second that a rank can receive by a link, from its data sheet."""

ITEMSIZE = 2
"""Bytes of a number in the precision of the count, bfloat16."""


def count_traffic(profile: Profile, name: str, layout: TokenLayout, ranks: int) -> dict[str, Any]:
    """Return what each rank receives in one pass over a clip, and how long that takes at least.

    Keys and values of global attention are counted, and the sums of linear unmerging. Special
    tokens of heads and register attention, which are small, are not.

    Args:
        profile: The profile.
        name: Name of one of its schedules.
        layout: Token layout of the whole clip.
        ranks: Number of ranks.

    Raises:
        LayoutError: If there are fewer query groups than ranks.
        ProfileError: If the profile does not record the width of the layers.
    """
    from ..reduction.gathering import received_bytes
    from ..reduction.sharding import Shard, deal, unit

    width = profile.model.width
    if width is None:
        raise ProfileError("the profile does not record the width of its layers, which bytes need")
    rules = profile.schedule(name).resolve_within(layout)
    shard = Shard(layout, deal(layout.frames, ranks, unit(rules)))
    layers = [received_bytes(shard, rule, width, ITEMSIZE) for rule in rules]
    fits = sum(rule.query > 1 and rule.operators.query.unmerging.fits_map for rule in rules)
    # A ring of ranks sends two matrices of float32, C x C, and one number, twice.
    sums = 2 * fits * (ranks - 1) * 4 * (2 * width**2 + 1) // ranks
    received = sum(layers) + sums
    return {
        "ranks": ranks,
        "frames": list(shard.counts),
        "layers_bytes": layers,
        "sums_bytes": sums,
        "received_bytes": received,
        "seconds": {link: received / rate for link, rate in LINKS.items()},
    }


def print_traffic(traffic: Mapping[str, Any]) -> None:
    """Print what `count_traffic` returned."""
    frames, layers = traffic["frames"], traffic["layers_bytes"]
    few, many = min(frames), max(frames)
    held = f"{many}" if few == many else f"{few} to {many}"
    print(f"\nover {traffic['ranks']} ranks, which hold {held} frames each, in bfloat16:")
    print(
        f"  each receives {_size(traffic['received_bytes'])} in a pass, "
        f"{_size(min(layers))} to {_size(max(layers))} in a layer"
    )
    times = [
        f"{link} ({LINKS[link] / 1e9:g} GB/s) {s:.2g} s" for link, s in traffic["seconds"].items()
    ]
    print(f"  which takes at least: {', '.join(times)}")


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
