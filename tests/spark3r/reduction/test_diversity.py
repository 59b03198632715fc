"""Frames chosen by content: what is chosen, in slots, models and compiled graphs."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from qkv import hidden, random_qkv, reduced
from small_models import make_images, make_model

import spark3r
from spark3r import DiverseFrames, Operators, Schedule, ScheduleError, TokenLayout
from spark3r.reduction import ResolvedRule, select
from spark3r.reduction.diversity import MOST_PICKS, distances, farthest_frames, frames_by_slot

CPU = torch.device("cpu")
RULE = ResolvedRule(1, 4, Operators(key_value=DiverseFrames(mass_correction=1.0)))


def places(*along: float, layout: TokenLayout) -> torch.Tensor:
    """Return tokens whose frames lie on a line."""
    line = torch.randn(1, 1, layout.tokens_per_frame, 8, generator=torch.Generator().manual_seed(0))
    return (torch.tensor(along).view(1, -1, 1, 1) * line).flatten(1, 2)


def test_one_frame_of_each_place_is_kept() -> None:
    layout = TokenLayout(9, 3, 4, special=2)
    tokens = places(0, 0.1, 5, 5.2, 0.2, 9, 5.1, 9.1, 0.3, layout=layout)
    slots = frames_by_slot(tokens, layout, 3).tolist()
    assert slots[0] == 0
    assert slots[3] in (2, 3, 6)
    assert slots[6] == 7  # the farthest from frame 0 is taken first
    assert sorted(slots) == list(range(9))
    assert [slots[i] for i in (1, 2, 4, 5, 7, 8)] == sorted(set(range(9)) - set(slots[::3]))


def test_the_anchor_comes_first_wherever_it_is() -> None:
    layout = TokenLayout(6, 2, 2, special=1, anchor_frame=4)
    slots = frames_by_slot(places(0, 1, 2, 3, 4, 5, layout=layout), layout, 3).tolist()
    assert (slots[0], slots[3]) == (4, 0)


def test_equal_frames_are_not_taken_twice() -> None:
    layout = TokenLayout(90, 2, 2)
    tokens = places(*[1.0] * 90, layout=layout)
    for count in (1, 2, 45, 90):
        chosen = farthest_frames(distances(tokens, layout), 3, count).tolist()
        assert len(set(chosen)) == count
        assert chosen[0] == 3


def test_frames_beyond_the_last_pick_are_the_farthest_from_all_picks() -> None:
    frames, count = 150, MOST_PICKS + 20
    distance = torch.rand(frames, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    distance = torch.cdist(distance, distance)
    chosen = farthest_frames(distance, 0, count).tolist()
    picks, others = chosen[:MOST_PICKS], set(range(frames)) - set(chosen)
    assert len(set(chosen)) == count
    nearest = distance[:, picks].amin(dim=1)
    assert min(nearest[chosen[MOST_PICKS:]]) >= max(nearest[sorted(others)])


def test_a_family_that_gives_no_tokens_is_told() -> None:
    with pytest.raises(ScheduleError, match="'diverse_frames' chooses by content, but the family"):
        select(TokenLayout(4, 2, 2), RULE, CPU)


def test_a_batch_has_one_choice() -> None:
    layout = TokenLayout(8, 3, 3)
    one = places(0, 9, 0, 0, 0, 0, 0, 0, layout=layout)
    other = places(0, 0, 0, 0, 0, 0, 30, 0, layout=layout)
    assert frames_by_slot(torch.cat((one, other)), layout, 4)[4] == 6
    assert frames_by_slot(one, layout, 4)[4] == 1


def test_a_model_sees_each_of_its_places() -> None:
    """Three views, each of them four times: keys of one frame each are all there is to see."""
    model, views = make_model(), make_images(3)
    clip = views[[0, 0, 1, 0, 1, 1, 2, 2, 0, 1, 2, 2]]
    operators = Operators(key_value=DiverseFrames())
    with torch.no_grad():
        dense = model(clip)["depth"]
        apart = {}
        for name, each in (("diverse", operators), ("strided", Operators())):
            with spark3r.apply(model, Schedule.uniform(2, key_value=4, operators=each)):
                apart[name] = float((model(clip)["depth"] - dense).abs().mean())
    assert apart["diverse"] < 0.75 * apart["strided"]


@pytest.mark.slow
@pytest.mark.dynamo
def test_it_compiles_to_one_graph_per_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reduced, fullgraph=True, backend="eager")
    for frames in (9, 14):
        layout = TokenLayout(frames, 3, 4, special=2, anchor_frame=0)
        for seed in range(2):
            tensors = random_qkv(layout, seed=seed)
            expected = reduced(*tensors, layout, RULE)
            torch.testing.assert_close(compiled(*tensors, layout, RULE), expected)
    torch._dynamo.reset()


def test_another_clip_of_the_same_length_has_another_choice() -> None:
    layout = TokenLayout(12, 3, 4)
    chosen = set()
    for seed in range(4):
        selection = select(layout, RULE, CPU, tokens=hidden(random_qkv(layout, seed=seed)[1]))
        assert selection is not None
        assert selection.index is not None
        chosen.add(tuple(selection.index.tolist()))
    assert len(chosen) > 1
