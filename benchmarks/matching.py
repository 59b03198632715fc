"""Time of matching, merging and unmerging, step by step.

    python benchmarks/matching.py [--output benchmarks/results/matching.json]

The script times alternatives in turns, with the shape of the reference model (four heads of 32, 8x8
patches), 512 frames and query factor 4: what is compared, how similarities are searched, and how
queries are merged and unmerged. `benchmarks/operators.py` measures the quality of the features.
Times are process times on one thread, which a busy machine hardly disturbs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from operators import all_heads, first_head, random_projection
from results_io import write_result
from torch import Tensor

from spark3r import TokenLayout
from spark3r.cli.tables import print_table
from spark3r.reduction import merging, plans
from spark3r.reduction.operators import LinearUnmerging
from spark3r.reduction.rule import ResolvedRule
from spark3r.timing import Latency, Timer, Treatment

HEADS, DIM = 4, 32
LAYOUT = TokenLayout(512, 8, 8, special=5, anchor_frame=0)
RULE = ResolvedRule(4)


def in_bfloat16(source: Tensor, destination: Tensor, count: int) -> Tensor:
    """Search with similarities rounded to bfloat16; the first of many ties wins."""
    assert count == 1
    destination = F.normalize(destination, dim=-1)
    source, destination = source[0].bfloat16(), destination[0].bfloat16()
    return torch.bmm(source, destination.transpose(1, 2)).max(dim=-1, keepdim=True).indices[None]


def packed(source: Tensor, destination: Tensor, count: int) -> Tensor:
    """Search with the index in the lowest bits of a positive similarity, so that amax finds it."""
    assert count == 1
    source, destination = F.normalize(source[0], dim=-1), F.normalize(destination, dim=-1)
    places = destination.shape[2]
    mask = (1 << (places - 1).bit_length()) - 1
    index = torch.arange(places, dtype=torch.int32)
    best = []
    for i in range(0, len(source), 4):
        similarity = torch.bmm(source[i : i + 4], destination[0, i : i + 4].transpose(1, 2))
        bits = similarity.add_(2).view(torch.int32).bitwise_and_(~mask).bitwise_or_(index)
        best.append(bits.view(torch.float32).amax(dim=-1).view(torch.int32) & mask)
    return torch.cat(best)[None].long().unsqueeze(3)


def by_argmax(source: Tensor, destination: Tensor, count: int) -> Tensor:
    """Search with `torch.argmax`, which gives the same places as `torch.max`."""
    assert count == 1
    destination = F.normalize(destination, dim=-1).transpose(2, 3)
    groups = merging.SIMILARITY_ELEMENTS // (source.shape[2] * destination.shape[3])
    pieces = zip(source.split(groups, 1), destination.split(groups, 1), strict=True)
    return torch.cat([(s @ d).argmax(dim=-1, keepdim=True) for s, d in pieces], dim=1)


def scatter_merge(query: Tensor, plan: merging.MergePlan, places: Tensor) -> Tensor:
    """Merge as revision 1 did, with copies of destinations and sources and a scatter-add."""
    side_by_side = query.transpose(1, 2).flatten(2)
    kept = side_by_side.index_select(1, plan.kept)
    sources = side_by_side.index_select(1, plan.sources)
    joined = places.index_select(1, plan.sources)
    total = kept.scatter_add(1, joined.unsqueeze(2).expand(-1, -1, kept.shape[2]), sources)
    ones = torch.ones(1).expand(1, kept.shape[1])
    count = ones.scatter_add(1, joined, torch.ones(1).expand_as(joined))
    return (total / count.unsqueeze(2)).unflatten(2, (HEADS, DIM)).transpose(1, 2)


def calls(query: Tensor) -> dict[str, tuple[str, Callable[[], object]]]:
    """Return the candidates by name, each with its question and the call to time."""
    plan = plans.plan(LAYOUT, RULE, query.device)
    assert plan is not None
    places = merging.match(query, plan)
    length = plan.kept.shape[0]
    merged, linear = merging.merge(query, places, length), LinearUnmerging()
    match = partial(merging.match, query, plan)
    return {
        "all heads": ("features", partial(match, features=all_heads)),
        "head mean (ours)": ("features", match),
        "first head": ("features", partial(match, features=first_head)),
        "random projection": ("features", partial(match, features=random_projection)),
        **{
            f"chunks of 2^{power}": (
                "arg-max",
                partial(match, search=partial(merging.nearest, elements=2**power)),
            )
            for power in (18, 20, 22, 24)
        },
        "argmax in the place of max": ("arg-max", partial(match, search=by_argmax)),
        "bfloat16 product": ("arg-max", partial(match, search=in_bfloat16)),
        "index in the lowest bits": ("arg-max", partial(match, search=packed)),
        "scatter-add (revision 1)": ("merge", lambda: scatter_merge(query, plan, places)),
        "embedding bag (ours)": ("merge", lambda: merging.merge(query, places, length)),
        "copying, one index (ours)": ("unmerge", lambda: merging.copy_back(merged, places)),
        "linear: the fit": ("unmerge", lambda: linear.fit(merged, merged, plan)),
        "linear (ours)": (
            "unmerge",
            lambda: linear.unmerge(query, merged, merged, places, plan),
        ),
        "attention, r_KV = 39": ("beside it", attention(merged, 39)),
        "attention, r_KV = 13": ("beside it", attention(merged, 13)),
    }


def attention(merged: Tensor, factor: int) -> Callable[[], object]:
    frames = len(range(0, LAYOUT.frames, factor))
    key, value = torch.randn(2, 1, HEADS, frames * LAYOUT.tokens_per_frame, DIM).unbind(0)
    return lambda: F.scaled_dot_product_attention(merged, key, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="samples (default: 15)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        chosen = calls(torch.randn(1, HEADS, LAYOUT.tokens, DIM))
        timer = Timer(time.process_time, arguments.rounds, warm_up_s=0.01)
        taken = timer.time_in_turns([Treatment(name, call) for name, (_, call) in chosen.items()])
    rows = [row(name, chosen[name][0], latency) for name, latency in taken.items()]
    print_table(
        ("question", "candidate", "ms", "spread"),
        [(r["question"], r["candidate"], f"{r['ms']:.2f}", f"{r['spread_ms']:.2f}") for r in rows],
    )
    if arguments.output:
        record = {
            "threads": torch.get_num_threads(),
            "clock": "process",
            "rows": rows,
        }
        write_result(record, arguments.output)


def row(name: str, question: str, latency: Latency) -> dict[str, Any]:
    return {
        "question": question,
        "candidate": name,
        "ms": latency.median_ms,
        "spread_ms": latency.spread_ms,
        "n": latency.n,
    }


if __name__ == "__main__":
    main()
