"""FastVGGT's merging against loops over frames, cells and tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spark3r
from spark3r.benchmark.fastvggt import apply_fastvggt, joint_places, joint_plan
from spark3r.layout import TokenLayout
from spark3r.runner import Runner

CPU = torch.device("cpu")
LAYOUTS = [
    TokenLayout(4, 4, 6, special=5, anchor_frame=0),
    TokenLayout(3, 5, 3, special=2, special_last=True),  # rows and columns that fill no cell
    TokenLayout(5, 4, 4, tail=1),
    TokenLayout(1, 2, 2),
]


def position(layout: TokenLayout, frame: int, y: int, x: int) -> int:
    return frame * layout.tokens_per_frame + layout.patch_start + y * layout.width + x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_destinations_are_frame_0_specials_and_one_token_per_cell(layout: TokenLayout) -> None:
    plan = joint_plan(layout, CPU)
    destinations = set(plan.destinations.tolist())
    patches = set()
    for frame in range(layout.frames):
        grid = [(y, x) for y in range(layout.height) for x in range(layout.width)]
        patches |= {position(layout, frame, y, x) for y, x in grid}
        if frame == 0:
            assert {position(layout, 0, y, x) for y, x in grid} <= destinations
            continue
        chosen = 0
        for top in range(0, layout.height - 1, 2):
            for left in range(0, layout.width - 1, 2):
                cell = [(top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)]
                inside = [position(layout, frame, y, x) in destinations for y, x in cell]
                assert sum(inside) == 1
                chosen += 1
        assert chosen == sum(position(layout, frame, y, x) in destinations for y, x in grid)
    assert set(range(layout.tokens)) - patches <= destinations  # specials and tail


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tenth_of_the_tokens_is_protected(layout: TokenLayout) -> None:
    plan = joint_plan(layout, CPU)
    step = layout.tokens // max(1, layout.tokens // 10)
    protected = set(range(0, layout.tokens, step)) if layout.tokens >= 10 else set()
    sources = set(range(layout.tokens)) - set(plan.destinations.tolist()) - protected
    assert set(plan.sources.tolist()) == sources
    assert plan.kept == layout.tokens - len(sources)
    assert plan is joint_plan(layout, CPU)  # drawn once from the seed


def test_the_pattern_is_random_but_the_same_for_the_same_seed() -> None:
    from spark3r.benchmark.fastvggt import _build

    layout = TokenLayout(30, 8, 8)
    first = joint_plan(layout, CPU).destinations
    _build.cache_clear()
    assert torch.equal(joint_plan(layout, CPU).destinations, first)
    inside = first[first >= 64] % 64
    assert set(inside.tolist()) == set(range(64))  # over 29 frames every offset is drawn


def test_sources_join_the_most_similar_destination_and_others_stay() -> None:
    layout = LAYOUTS[0]
    plan = joint_plan(layout, CPU)
    generator = torch.Generator().manual_seed(0)
    # Each token repeats one destination's direction, so that rounding cannot change the answer.
    hidden = torch.zeros(1, layout.tokens, len(plan.destinations))
    hidden[0, plan.destinations] = torch.eye(len(plan.destinations))
    drawn = torch.randint(len(plan.destinations), (len(plan.sources),), generator=generator)
    hidden[0, plan.sources] = 3 * torch.eye(len(plan.destinations))[drawn]
    places = joint_places(hidden, plan)[0]
    assert torch.equal(places[plan.sources], drawn)
    assert torch.equal(places[plan.destinations], torch.arange(len(plan.destinations)))
    others = sorted(
        set(range(layout.tokens)) - set(plan.destinations.tolist()) - set(plan.sources.tolist())
    )
    assert places[others].tolist() == list(range(len(plan.destinations), plan.kept))


def test_a_layer_attends_over_means_and_copies_back(model: nn.Module) -> None:
    images = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    layout = TokenLayout(4, 4, 6, special=5, anchor_frame=0)
    attn = model.aggregator.global_blocks[0].attn  # type: ignore[union-attr,index]
    seen: list[torch.Tensor] = []
    hook = attn.register_forward_hook(lambda _, args, output: seen.extend((*args, output)))
    runner = Runner.of(model)
    with apply_fastvggt(runner):
        runner.run(images)
    hook.remove()
    hidden, (cos, sin), output = seen[0], seen[1], seen[2]
    places = joint_places(hidden, joint_plan(layout, CPU))[0].tolist()
    sets = [[t for t, p in enumerate(places) if p == k] for k in range(max(places) + 1)]

    from spark3r.rope import apply_rope

    with torch.inference_mode():
        q, k, v = attn.qkv(hidden).unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4).unbind(0)
        q = apply_rope(attn.q_norm(q), (cos, sin))
        k = apply_rope(attn.k_norm(k), (cos, sin))
        means = [
            torch.stack([t[0][:, members].mean(dim=1) for members in sets], dim=1)[None]
            for t in (q, k, v)
        ]
        attended = F.scaled_dot_product_attention(*means)[:, :, places]
        expected = attn.proj(attended.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_it_is_removed_again(model: nn.Module) -> None:
    images = torch.rand(3, 3, 16, 16)
    runner = Runner.of(model)
    dense = runner.run(images)["depth"]
    with apply_fastvggt(runner):
        assert not torch.equal(runner.run(images)["depth"], dense)
    assert not spark3r.is_applied(model)
    assert torch.equal(runner.run(images)["depth"], dense)
