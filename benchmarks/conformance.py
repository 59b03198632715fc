"""What every family's own code shows: exactness, the guard, and the guard's provocations.

    SPARK3R_UPSTREAM=... python benchmarks/conformance.py --output results/conformance.json

Small instances of the models' own code with random weights, and the tests' stand-ins. For each: the
largest difference of any output under factors of 1, and of the same forced through spark3r's own
path; the largest difference of a reduced layer from the slow loops in float64, under the paper's
operators; what the guard finds, in float32 and under autocast in bfloat16. Then VGGT's own code is
changed in one place at a time, and the guard must refuse it. `--only` takes parts of names.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results_io import print_markdown, write_result
from torch import Tensor, nn

import spark3r
from spark3r import PatchError, Schedule
from spark3r.families.registry import detect
from spark3r.patching.guard import Guard
from spark3r.reduction.rule import ResolvedRule
from spark3r.runner import Runner

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from attention_oracle import reduced_attention
from family_cases import (
    ALL_CASES,
    PATCHES_FIRST,
    Case,
    attentions,
    build,
    difference,
    images,
    missing,
    reducing,
    run,
)

FRAMES, GRID = 7, (2, 3)
DECIDED = 1e-6
"""Below this margin float32 may merge a query into another one than float64 does."""


class Reading(Guard):
    """A guard that keeps what it found."""

    found: tuple[float, ...] = ()

    def end(self, *args: Any, **kwargs: Any) -> bool:
        """End as the guard does."""
        for each in self._findings.values():
            self.found = tuple(map(float, each.layers.values()))
        return super().end(*args, **kwargs)


def row(case: Case) -> dict[str, Any]:
    """Return what one model shows."""
    model, clip = build(case), images(case, FRAMES, rows=GRID[0], columns=GRID[1])
    dense = run(model, clip)
    with spark3r.apply(model, Schedule.dense(case.layers)):
        ones = difference(run(model, clip), dense)
    return {
        "model": case.name,
        "family": case.family,
        "layers": case.layers,
        "ones": ones,
        "forced": difference(forced(model, clip), dense),
        "reduced": None if case.family == "reference" else reduced(case, model, clip),
        "guard": guarded(case, model, clip, torch.float32),
        "guard_bfloat16": guarded(case, model, clip, torch.bfloat16),
    }


def forced(model: nn.Module, clip: Tensor) -> dict[str, Tensor]:
    """Return the outputs of a pass with every layer sent through spark3r's path."""
    runner = Runner.of(model)

    def ours(attn: nn.Module, layout: Any, *args: Any, **kwargs: Any) -> Tensor:
        return runner.family.reduced_forward(attn, layout, ResolvedRule(), *args, **kwargs)

    patch = spark3r.patching.replace_attention(runner, ours)
    try:
        return run(model, clip)
    finally:
        patch.remove()


def reduced(case: Case, model: nn.Module, clip: Tensor) -> float:
    """Return the largest difference of a reduced layer from the oracle."""
    schedule, seen = reducing(case.layers), {}

    def record(attn: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        positions = kwargs.get("pos", kwargs.get("xpos"))
        seen[attn] = (args[0], positions if isinstance(positions, Tensor) else None, output)

    hooks = [
        attn.register_forward_hook(record, with_kwargs=True) for attn in attentions(model).values()
    ]
    with spark3r.apply(model, schedule):
        run(model, clip)
    for hook in hooks:
        hook.remove()
    worst = 0.0
    for rule, attn in zip(schedule.resolve(FRAMES), attentions(model).values(), strict=True):
        assert rule.operators is not None
        x, positions, output = seen[attn]
        last = case.family in PATCHES_FIRST
        with torch.no_grad():
            expected, margin = reduced_attention(
                attn,
                x,
                positions,
                frames=FRAMES,
                grid=GRID,
                special=detect(model).metadata(model)["special_tokens"],
                query=rule.query,
                key_value=rule.key_value,
                group=rule.operators.query.group,
                patches_first=last,
                tail=int(last),
            )
        if margin >= DECIDED:
            worst = max(worst, difference({"": output.double()}, {"": expected}))
    return worst


def guarded(case: Case, model: nn.Module, clip: Tensor, dtype: torch.dtype) -> float | None:
    """Return the largest difference that the guard finds; None where upstream cannot run."""
    half = dtype != torch.float32
    try:
        with spark3r.apply(model, reducing(case.layers)) as handle, torch.no_grad():
            handle._guard = guard = Reading()
            with torch.autocast("cpu", dtype, enabled=half):
                run(model, clip)
    except (RuntimeError, TypeError, NotImplementedError):
        if half:  # a head of upstream's
            return None
        raise
    assert len(guard.compared) == case.layers
    return max(guard.found)


Change = Callable[[Any, Tensor, Tensor], Tensor]


def _own(attn: Any, x: Tensor, pos: Tensor | None) -> Tensor:
    kind: Any = type(attn).__mro__[1]
    found: Tensor = kind.forward(attn, x, pos=pos)
    return found


def _scaled(attn: Any, x: Tensor, pos: Tensor) -> Tensor:
    parts = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    query, key = attn.rope(attn.q_norm(query), pos), attn.rope(attn.k_norm(key), pos)
    output = F.scaled_dot_product_attention(query * math.log(x.shape[1]), key, value)
    return attn.proj(output.transpose(1, 2).flatten(2))


PROVOCATIONS: dict[str, Change] = {
    "positions normalised": lambda attn, x, pos: _own(attn, x, pos // 2),
    "positions doubled": lambda attn, x, pos: _own(attn, x, 2 * pos),
    "no positions": lambda attn, x, pos: attn.proj(
        _without_positions(attn, x).transpose(1, 2).flatten(2)
    ),
    "an output gate": lambda attn, x, pos: _own(attn, x, pos) * torch.sigmoid(x),
    "logits scaled by log N": _scaled,
}
PATCH_BY_PATCH = "tokens ordered patch by patch"


def _without_positions(attn: Any, x: Tensor) -> Tensor:
    parts = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(attn.q_norm(parts[0]), attn.k_norm(parts[1]), parts[2])


def provoked(case: Case, name: str) -> dict[str, Any]:
    """Return whether the guard refuses VGGT's code with one change, and how wrong it would be."""
    model, clip = case.make().eval(), images(case, FRAMES, rows=3, columns=4)
    aggregator: Any = model.aggregator
    if name == PATCH_BY_PATCH:
        _reorder(aggregator)
    else:
        change = PROVOCATIONS[name]
        for block in aggregator.global_blocks:
            kind = type(block.attn)
            block.attn.__class__ = type(
                kind.__name__,
                (kind,),
                {"forward": lambda self, x, pos=None: change(self, x, pos)},
            )
    with spark3r.apply(model, reducing(case.layers)):
        try:
            run(model, clip)
        except PatchError as error:
            return {"model": case.name, "change": name, "refused": True, "said": str(error)[:120]}
    return {"model": case.name, "change": name, "refused": False, "said": ""}


def _reorder(aggregator: Any) -> None:
    """Let an aggregator's global tokens be ordered by patch, and by frame inside of a patch."""
    own = aggregator._process_global_attention

    class Turned(nn.Module):
        def __init__(self, block: nn.Module, shape: list[int]) -> None:
            super().__init__()
            self.block, self.shape = block, shape

        def forward(self, x: Tensor, pos: Tensor) -> Tensor:
            frames, tokens = self.shape

            def turned(each: Tensor, *sizes: int) -> Tensor:
                return each.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)

            x = self.block(turned(x, frames, tokens), pos=turned(pos, frames, tokens))
            return turned(x, tokens, frames)

    shape = [0, 0]
    aggregator.global_blocks = nn.ModuleList(Turned(b, shape) for b in aggregator.global_blocks)

    def process(x: Tensor, b: int, s: int, p: int, c: int, i: int, pos: Any = None) -> Any:
        shape[:] = s, p
        return own(x, b, s, p, c, i, pos=pos)

    aggregator._process_global_attention = process


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the models' names")
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of upstream code
    torch.set_num_threads(1)
    chosen = [case for case in ALL_CASES if any(part in case.name for part in options.only)]
    rows = [row(case) for case in chosen if not missing(case)]
    changed = [case for case in chosen if case.name in ("vggt-upstream", "vggt-stand-in")]
    provocations = [
        provoked(case, name)
        for case in changed
        if not missing(case)
        for name in (*PROVOCATIONS, PATCH_BY_PATCH)
    ]
    shown = ("ones", "forced", "reduced", "guard", "guard_bfloat16")
    print_markdown(
        ("model", "layers", *shown),
        [
            (
                each["model"],
                each["layers"],
                *("-" if each[key] is None else f"{each[key]:.2g}" for key in shown),
            )
            for each in rows
        ],
    )
    print()
    print_markdown(
        ("model", "change", "refused"),
        [(each["model"], each["change"], each["refused"]) for each in provocations],
    )
    absent = [case.name for case in chosen if missing(case)]
    document = {"rows": rows, "provocations": provocations, "not_installed": absent}
    write_result(document, options.output)


if __name__ == "__main__":
    main()
