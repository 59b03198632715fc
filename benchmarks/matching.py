"""What matching and merging cost, step by step.

    python benchmarks/matching.py [--output benchmarks/results/matching.json]

The reference model's shape (four heads of 32, 8x8 patches), 512 frames, query factor 4, in turns:
what is compared, how similarities are searched, how queries are merged and copied back. Quality of
the features: `benchmarks/operators.py`. Times are process times on one thread, so that a busy
machine disturbs them little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from operators import all_heads, first_head, random_projection
from results_io import write_result
from torch import Tensor

from spark3r.cli.tables import print_table
from spark3r.layout import TokenLayout
from spark3r.reduction import merging, plans
from spark3r.reduction.operators import LinearUnmerging
from spark3r.reduction.rule import ResolvedRule
from spark3r.timing import Latency, interleaved

HEADS, DIM = 4, 32
LAYOUT = TokenLayout(512, 8, 8, special=5, anchor_frame=0)
RULE = ResolvedRule(4)


def matched(query: Tensor, plan: merging.MergePlan, **changes: object) -> Callable[[], object]:
    def call() -> object:
        with patch.multiple(merging, **changes) if changes else nullcontext():
            return merging.match(query, plan)

    return call


def in_bfloat16(source: Tensor, destination: Tensor, count: int) -> Tensor:
    """Similarities rounded to bfloat16, whose arg-max takes the first of many ties."""
    assert count == 1
    destination = F.normalize(destination, dim=-1)
    source, destination = source[0].bfloat16(), destination[0].bfloat16()
    return torch.bmm(source, destination.transpose(1, 2)).max(dim=-1, keepdim=True).indices[None]


def packed(source: Tensor, destination: Tensor, count: int) -> Tensor:
    """The index written over the lowest bits of a positive similarity, so that amax finds it."""
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


def scatter_merge(query: Tensor, plan: merging.MergePlan, places: Tensor) -> Tensor:
    """Merging of revision 1: copies of destinations and sources, sums by scattering."""
    side_by_side = query.transpose(1, 2).flatten(2)
    kept = side_by_side.index_select(1, plan.kept)
    sources = side_by_side.index_select(1, plan.sources)
    joined = places.index_select(1, plan.sources)
    total = kept.scatter_add(1, joined.unsqueeze(2).expand(-1, -1, kept.shape[2]), sources)
    ones = torch.ones(1).expand(1, kept.shape[1])
    count = ones.scatter_add(1, joined, torch.ones(1).expand_as(joined))
    return (total / count.unsqueeze(2)).unflatten(2, (HEADS, DIM)).transpose(1, 2)


def calls(query: Tensor) -> dict[str, tuple[str, Callable[[], object]]]:
    """Candidates by name: the question, and what to time."""
    plan = plans.plan(LAYOUT, RULE, query.device)
    assert plan is not None
    places = merging.match(query, plan)
    length = plan.kept.shape[0]
    merged, linear = merging.merge(query, places, length), LinearUnmerging()
    return {
        "all heads": ("features", matched(query, plan, features=all_heads)),
        "head mean (ours)": ("features", matched(query, plan)),
        "first head": ("features", matched(query, plan, features=first_head)),
        "random projection": ("features", matched(query, plan, features=random_projection)),
        **{
            f"chunks of 2^{power}": (
                "arg-max",
                matched(query, plan, SIMILARITY_ELEMENTS=2**power),
            )
            for power in (18, 20, 22, 24)
        },
        "bfloat16 product": ("arg-max", matched(query, plan, nearest=in_bfloat16)),
        "index in the lowest bits": ("arg-max", matched(query, plan, nearest=packed)),
        "scatter-add (revision 1)": ("merge", lambda: scatter_merge(query, plan, places)),
        "embedding bag (ours)": ("merge", lambda: merging.merge(query, places, length)),
        "copying, one index (ours)": ("unmerge", lambda: merging.unmerge(merged, places)),
        "linear: the fit": ("unmerge", lambda: linear.fit(merged, merged, plan)),
        "linear (ours)": (
            "unmerge",
            lambda: linear.restore(query, merged, merged, places, plan),
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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write all rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        chosen = calls(torch.randn(1, HEADS, LAYOUT.tokens, DIM))
        taken = interleaved(
            {name: call for name, (_, call) in chosen.items()},
            rounds=arguments.rounds,
            warm_up_s=0.01,
            clock=time.process_time,
        )
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


def row(name: str, question: str, latency: Latency) -> dict[str, object]:
    return {
        "question": question,
        "candidate": name,
        "ms": latency.median_ms,
        "spread_ms": latency.spread_ms,
        "n": latency.n,
    }


if __name__ == "__main__":
    main()
