"""One clip over several processes: outputs of one process, refusals by name, a rank that dies."""

from __future__ import annotations

from functools import partial
from typing import Any

import family_cases
import pytest
import shared_clips

TOLERANCE = 1e-5

STAND_INS = ["reference", "vggt-stand-in", "pi3-stand-in", "omega-stand-in"]
UPSTREAM = [
    *("vggt-upstream", "pi3-upstream", "da3-tiny-upstream", "omega-upstream"),
    *("worldmirror-upstream", "panovggt-upstream"),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks return, of which one is killed at last."""
    works = {
        "differences": partial(shared_clips.differences, names=STAND_INS),
        "refusals": shared_clips.refusals,
        "killed": shared_clips.killed,
    }
    return shared_clips.on_ranks(works, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def by_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    works = {"differences": partial(shared_clips.differences, names=["reference", *UPSTREAM])}
    return shared_clips.on_ranks(works, 3, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize(("ranks", "names"), [("by_two", STAND_INS), ("by_three", UPSTREAM)])
def test_ranks_return_the_parts_of_what_one_process_returns(
    ranks: str, names: list[str], request: pytest.FixtureRequest
) -> None:
    installed = {case.name for case in family_cases.CASES} & {"reference", *names}
    for found in request.getfixturevalue(ranks)["differences"]:
        assert found is not None, "a rank failed, see its traceback"
        assert {key.split()[0] for key in found} == installed
        assert {key: value for key, value in found.items() if value > TOLERANCE} == {}


def test_what_ranks_cannot_share_is_refused_by_name(by_two: dict[str, list[Any]]) -> None:
    for found in by_two["refusals"]:
        told = {name: " ".join(lines) for name, lines in found.items()}
        assert "hold 6, 6 frames, but queries are merged in groups of 4" in told["uneven"]
        assert "begin at frames 0, 4, as handle.share(12) says" in told["uneven"]
        assert "4 frames has 1 groups of 4 frames, fewer than the 2 ranks" in told["few groups"]
        assert "without gradients only: run the model under" in told["gradients"]
        assert "cannot be copied or pickled" in told["copy"]
        assert "do not begin the same pass" in told["schedules"]
        assert "Pi3X's metric decoder attends over all frames" in told["pi3x"]
        assert "DinoVisionTransformer) is of an unknown version" in told["da3"]
        assert "family 'generic': it does not say which other parts" in told["generic"]
    shapes = [found["afterwards"] for found in by_two["refusals"]]
    assert shapes == [["(1, 4, 24, 16, 1)"], ["(1, 8, 24, 16, 1)"]]
    assert [found["disabled"] for found in by_two["refusals"]] == [["3"], []]


def test_a_killed_rank_ends_the_others_at_once(by_two: dict[str, list[Any]]) -> None:
    (found, seconds), last = by_two["killed"]
    assert last is None
    assert "RankError: another rank ended before the pass did" in found[0]
    assert seconds < 10
