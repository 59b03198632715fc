"""The weights in the package."""

import json
from pathlib import Path

import pytest
import torch

from spark3r.reference import ReferenceModel, load
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import CALIBRATION
from spark3r.reference.weights import SHIPPED_WEIGHTS
from training.evaluate import evaluate, path_times

STORED = Path(__file__).with_name("shipped_outputs.json")
SEED, FRAMES = CALIBRATION[0], 4


def describe(model: ReferenceModel) -> dict[str, list[float]]:
    """Return a few outputs on a fixed clip, as `shipped_outputs.json` stores them."""
    with torch.no_grad():
        output = model(rendered_clip(SEED, FRAMES).images)
    return {
        "pose_enc": output["pose_enc"].flatten().tolist(),
        "depth": output["depth"][0, :, ::21, ::21, 0].flatten().tolist(),
        "depth_conf": output["depth_conf"].mean(dim=(0, 2, 3)).tolist(),
    }


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return load()


def test_outputs_match_the_stored_numbers(model: ReferenceModel) -> None:
    stored = json.loads(STORED.read_text())
    for name, values in describe(model).items():
        torch.testing.assert_close(values, stored[name], atol=2e-3, rtol=2e-3)


def test_weights_are_small_and_in_half_precision() -> None:
    assert SHIPPED_WEIGHTS.stat().st_size <= 16 * 2**20


def test_better_than_constant_depth_and_still_cameras(model: ReferenceModel) -> None:
    result = evaluate(model, CALIBRATION[:3], 8)
    assert result["scenes"] == 3
    assert result["abs_rel"] < 0.6 * result["trivial_abs_rel"]
    assert result["rotation_deg"] < 0.6 * result["trivial_rotation_deg"]
    assert result["translation_deg"] < 45
    assert result["auc_30"] > 0.2


@torch.no_grad()
def test_other_frames_matter(model: ReferenceModel) -> None:
    clip = rendered_clip(SEED, FRAMES)
    together = model(clip.images)["depth"][0, 0]
    alone = model(clip.images[:1])["depth"][0, 0]
    assert (together.log() - alone.log()).abs().mean() > 0.01


@pytest.mark.parametrize("frames", [1, 17])
@torch.no_grad()
def test_any_length_is_finite(model: ReferenceModel, frames: int) -> None:
    output = model(rendered_clip(SEED, frames).images)
    assert all(torch.isfinite(value).all() for value in output.values())


def test_key_frames_are_the_same_at_every_length() -> None:
    keys = []
    for frames in (8, 9, 48, 128):
        u, places = path_times(frames)
        assert len(u) == frames
        assert (u[1:] > u[:-1]).all()
        keys.append(u[places])
    for other in keys[1:]:
        assert torch.equal(other, keys[0])
    with pytest.raises(ValueError, match="at least the 8 key frames"):
        path_times(7)
