"""Reduced attention against dense attention, by number of tokens.

    python benchmarks/attention.py --output benchmarks/results/attention.json    # both of these:
    python benchmarks/attention.py length             # about 10 minutes on two quiet cores
    python benchmarks/attention.py mass_correction    # half a minute

For each number of tokens and each pair of factors, ``length`` times in turns: dense attention; ours
(matching, merging, attention over kept keys, unmerging); bare attention at the realised lengths;
and matching, merging and unmerging alone. Keys and values are given as they are after selection,
which is part of the projection. ``mass_correction`` compares ways to apply it.

Each part has its own command, day and environment in the file. One that is not run stays as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A thread that waits busily distorts the times of everything that runs beside it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from results_io import provenance, store_json

from spark3r import Operators, TokenLayout, TokenStride
from spark3r.benchmark.result import growth_exponent
from spark3r.kernels import grouped_attention
from spark3r.memory import peak_extra_mb
from spark3r.reduction import merging, plans
from spark3r.reduction.attention import attend
from spark3r.reduction.plans import key_value_length, query_length, select
from spark3r.reduction.rule import ResolvedRule
from spark3r.timing import Latency, interleaved

PARTS = ("length", "mass_correction")
HEADS, DIM = 4, 32  # as in the reference model
GRID, SPECIAL = (8, 8), 5
TOKENS = (2048, 4096, 8192, 16384, 32768, 65536)
FACTORS = ((1, 4), (1, 16), (2, 8), (4, 25))


def measure(tokens: int, limit_s: float) -> list[dict[str, Any]]:
    """Return a row for every pair of factors at one length, with all calls timed in turns."""
    layout = TokenLayout(
        round(tokens / (SPECIAL + math.prod(GRID))), *GRID, SPECIAL, anchor_frame=0
    )
    query, key, value = torch.randn(3, 1, HEADS, layout.tokens, DIM).unbind(0)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(query, key, value)
    }
    for factors in FACTORS:
        calls |= reduced_calls(query, key, value, layout, ResolvedRule(*factors), factors)
    taken = interleaved(calls, rounds=20, limit_s=limit_s)
    dense_peak_mb = peak_extra_mb(calls["dense"])
    rows = []
    for factors in FACTORS:
        rule = ResolvedRule(*factors)
        timed = {
            part: taken[f"{part} {factors}"]
            for part in ("ours", "bare", "matching")
            if f"{part} {factors}" in taken
        }
        timed["dense"] = taken["dense"]
        ms = {name: latency.median_ms for name, latency in timed.items()}
        rows.append(
            {
                "tokens": layout.tokens,
                "query_factor": factors[0],
                "key_value_factor": factors[1],
                "queries": query_length(layout, rule),
                "keys": key_value_length(layout, rule),
                "ms": ms,
                "spread_ms": {name: latency.spread_ms for name, latency in timed.items()},
                "n": taken["dense"].n,
                "ours_over_bare": median_ratio(timed["ours"], timed["bare"]),
                "speed_up": median_ratio(timed["dense"], timed["ours"]),
                "matching_share_of_dense": ms.get("matching", 0.0) / ms["dense"],
                "peak_extra_mb": {
                    "dense": dense_peak_mb,
                    "ours": peak_extra_mb(calls[f"ours {factors}"]),
                },
                # query, key, value and output of the dense path
                "dense_activations_mb": 4 * query.nbytes / 1e6,
            }
        )
    return rows


def reduced_calls(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    rule: ResolvedRule,
    factors: tuple[int, int],
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the calls of one pair of factors: ours, bare attention, and matching if any."""
    selection = select(layout, rule, query.device)
    assert selection is not None
    kept_key, kept_value = selection.take(key, 2), selection.take(value, 2)
    short = torch.randn(1, HEADS, query_length(layout, rule), DIM)
    plan = plans.plan(layout, rule, query.device)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        f"ours {factors}": lambda: attend(query, kept_key, kept_value, layout, rule, selection),
        f"bare {factors}": lambda: F.scaled_dot_product_attention(short, kept_key, kept_value),
    }
    if plan is not None:

        def matching() -> torch.Tensor:
            places = merging.match(query, plan)
            return merging.copy_back(merging.merge(query, places, plan.kept.shape[0]), places)

        calls[f"matching {factors}"] = matching
    return calls


def median_ratio(above: Latency, below: Latency) -> float:
    """Return the median of the ratios inside a round, which a busy machine disturbs least."""
    ratios = sorted(a / b for a, b in zip(above.samples_ms, below.samples_ms, strict=True))
    return ratios[len(ratios) // 2]


def mass_correction_candidates(
    frames: int, dtype: torch.dtype, limit_s: float
) -> list[dict[str, Any]]:
    """Return time and error against float64 of each way to add log-mass to patch keys."""
    layout = TokenLayout(frames, *GRID, SPECIAL, anchor_frame=0)
    operators = Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1.0))
    rule = ResolvedRule(1, 8, operators)
    selection = select(layout, rule, torch.device("cpu"), by_group=True)
    assert selection is not None
    mass = selection.logit_bias
    assert mass is not None
    query = torch.randn(1, HEADS, layout.tokens, DIM).to(dtype)
    key, value = torch.randn(2, 1, HEADS, selection.length, DIM).to(dtype).unbind(0)
    bias = mass.to(dtype)

    def plain() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def extra_head_dimensions() -> torch.Tensor:
        scale = DIM**-0.5
        ones = F.pad(query.new_ones(1, 1, 1, 1), (0, 7)).expand(1, HEADS, layout.tokens, 8)
        more = F.pad((bias / scale).view(1, 1, -1, 1), (0, 7)).expand(1, HEADS, -1, 8)
        wide = F.scaled_dot_product_attention(
            torch.cat((query, ones), -1),
            torch.cat((key, more), -1),
            F.pad(value, (0, 8)),
            scale=scale,
        )
        return wide[..., :DIM]

    calls = {
        "no correction": plain,
        "broadcast bias": lambda: grouped_attention.masked(query, key, value, bias),
        "extra head dimensions": extra_head_dimensions,
        "groups joined by log-sum-exp": lambda: grouped_attention.attend(
            query, key, value, selection.groups, "flash"
        ),
    }
    exact = grouped_attention.masked(query.double(), key.double(), value.double(), mass)
    taken = interleaved(calls, rounds=20, limit_s=limit_s)
    errors = {name: call() - exact for name, call in calls.items()}
    return [
        {
            "candidate": name,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": layout.tokens,
            "keys": selection.length,
            "ms": taken[name].median_ms,
            "over_no_correction": median_ratio(taken[name], taken["no correction"]),
            "largest_error": float(errors[name].abs().max()),
            "rms_error": float(errors[name].square().mean().sqrt()),
        }
        for name in calls
    ]


def growth_from_8k(rows: list[dict[str, Any]], factors: tuple[int, int]) -> float | None:
    """Return the growth exponent of our time over tokens, from 8,000 tokens on.

    None if fewer than two such numbers of tokens were measured.
    """
    points = [
        (row["tokens"], row["ms"]["ours"])
        for row in rows
        if (row["query_factor"], row["key_value_factor"]) == factors and row["tokens"] >= 8000
    ]
    return growth_exponent(points) if len(points) > 1 else None


def over_length(tokens: Sequence[int], limit_s: float) -> dict[str, Any]:
    """Return the measurements of reduced attention by number of tokens, and print them."""
    rows = []
    print("   tokens  factors  dense ms   ours ms   bare ms  ours/bare  matching/dense  peak/act.")
    for count in tokens:
        for row in measure(count, limit_s):
            rows.append(row)
            ms, peak = row["ms"], row["peak_extra_mb"]["ours"] / row["dense_activations_mb"]
            print(
                f"{row['tokens']:>9}  {row['query_factor']:>2},{row['key_value_factor']:<4} "
                f"{ms['dense']:>9.1f} {ms['ours']:>9.1f} {ms['bare']:>9.1f} "
                f"{row['ours_over_bare']:>10.2f} {row['matching_share_of_dense']:>15.3f} "
                f"{peak:>10.2f}",
                flush=True,
            )
    growth = {f"{q},{kv}": growth_from_8k(rows, (q, kv)) for q, kv in FACTORS}
    print("growth exponent of ours:", {k: v and round(v, 2) for k, v in growth.items()})
    return {"rows": rows, "growth_exponent": growth}


def mass_correction(frames: Sequence[int], limit_s: float) -> dict[str, Any]:
    """Return the measurements of ways to correct mass, and print them."""
    rows = [
        row
        for dtype in (torch.float32, torch.bfloat16)
        for count in frames
        for row in mass_correction_candidates(count, dtype, limit_s)
    ]
    for row in rows:
        print(
            f"{row['tokens']:>9}  {row['dtype']:<9} {row['candidate']:<29} "
            f"{row['ms']:>8.1f} ms  {row['over_no_correction']:.2f}x  error at most "
            f"{row['largest_error']:.1e}, root mean square {row['rms_error']:.1e}"
        )
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: both")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="for length")
    parser.add_argument(
        "--mass-frames", type=int, nargs="+", default=(48, 128), help="for mass_correction"
    )
    parser.add_argument(
        "--limit", type=float, default=20.0, help="seconds per length (default: 20)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write, or whose part to replace")
    options = parser.parse_args()
    torch.manual_seed(0)
    document: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        document = json.loads(options.output.read_text(encoding="utf-8"))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "length": lambda: over_length(options.tokens, options.limit),
        "mass_correction": lambda: mass_correction(options.mass_frames, options.limit / 4),
    }
    for name in PARTS if options.part is None else (options.part,):
        with torch.inference_mode():
            found = parts[name]()
        document[name] = {**provenance(), "threads": torch.get_num_threads(), **found}
        if options.output is not None:
            store_json(options.output, document)


if __name__ == "__main__":
    main()
