"""MapAnything: its views, the order of its tokens, scaled queries, its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stand_in_mapanything
import torch
from attention_oracle import reduced_attention
from family_cases import CASES, Case, attentions, build, difference, images, quiet, reducing, run
from safetensors.torch import save_model
from stand_in_mapanything import MapAnythingAttention, views_of
from torch import Tensor, nn
from upstream_models import flat

import spark3r
from spark3r import FamilyError, LayoutError, Schedule
from spark3r.families.mapanything import FAMILY, HEAD_FRAMES
from spark3r.families.parts.preprocessing import imagenet_normalised
from spark3r.families.registry import detect
from spark3r.geometry import invert_pose
from spark3r.loading.checkpoints import fill, read_checkpoint
from spark3r.runner import Runner

OURS = [case for case in CASES if case.family == "mapanything"]


@pytest.fixture(params=OURS, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_tokens_of_a_changed_patch_are_those_that_the_layout_names(case: Case) -> None:
    """The guard cannot see this, because the entry is given features."""
    model, clip = build(case), images(case, 4, rows=3, columns=5)
    seen: list[Tensor] = []
    first = next(iter(attentions(model).values()))
    hook = first.register_forward_pre_hook(lambda attn, args: seen.append(args[0][0]))
    run(model, clip)
    for frame, row, column in [(0, 0, 1), (1, 2, 0), (3, 1, 4)]:
        changed = clip.clone()
        changed[0, frame, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 0.02
        run(model, changed)
        moved = (seen[-1] - seen[0]).norm(dim=1)
        # A frame has its 15 patches and then the class token.
        assert int(moved.argmax()) == frame * 16 + row * 5 + column
        assert float(moved[frame * 16 + 15]) > 0, "the class token of the frame"
        assert float(moved[-1]) == 0, "the scale token"
    hook.remove()


def test_views_of_several_sizes_are_named(case: Case) -> None:
    entry: Any = FAMILY.entry(build(case))
    given = SimpleNamespace(features=[torch.rand(1, 8, 2, 3), torch.rand(1, 8, 3, 2)])
    with spark3r.apply(build(case), reducing(3)), torch.no_grad():
        with pytest.raises(LayoutError, match=r"shapes \[1, 8, 2, 3\] and \[1, 8, 3, 2\], expect"):
            entry(given)
        with pytest.raises(LayoutError, match=r"given Tensor, expected .* call model\.infer"):
            entry(torch.rand(1, 2, 3, 28, 42))


def test_infer_follows_a_schedule_too(case: Case) -> None:
    model, clip = build(case), images(case, 4)
    views = views_of(clip)
    options: dict[str, Any] = {"use_amp": False, "apply_mask": False} if case.needs else {}

    def depths() -> Tensor:
        with quiet():
            found: list[dict[str, Tensor]] = model.infer(views, **options)  # type: ignore[operator]
        return torch.stack([view["depth_along_ray"] for view in found])

    dense = depths()
    with spark3r.apply(model, Schedule.dense(3)):
        assert torch.equal(depths(), dense)
    with spark3r.apply(model, reducing(3)):
        assert not torch.equal(depths(), dense)


def test_a_prediction_is_in_the_cameras_of_the_model(case: Case) -> None:
    model, clip = build(case), images(case, 3)
    with quiet():
        found = Runner.of(model).predict(spark3r.Clip("clip", clip[0]))
    output = run(model, imagenet_normalised(clip))
    expected = {name: value[0] for name, value in output.items()}
    assert torch.allclose(found.depth, expected["pts3d_cam"][..., 2], rtol=1e-5, atol=1e-6)
    along = expected["ray_directions"] * expected["depth_along_ray"]
    assert torch.allclose(along[..., 2], found.depth, rtol=1e-5, atol=1e-6)
    pose = invert_pose(found.extrinsics)
    assert torch.allclose(pose[..., 3], expected["cam_trans"], atol=1e-5)
    moved = along @ pose[:, None, :, :3].transpose(-1, -2) + pose[:, None, None, :, 3]
    assert torch.allclose(found.points, moved, atol=1e-4)
    if "pts3d" in expected:  # upstream's own
        assert torch.allclose(found.points, expected["pts3d"], atol=1e-4)


def test_heads_run_on_few_frames_at_a_time() -> None:
    seen: dict[str, Any] = {}

    class Seeing(stand_in_mapanything.MapAnything):
        def forward(
            self, views: Any, memory_efficient_inference: bool = False, minibatch_size: Any = None
        ) -> Any:
            seen.update(efficient=memory_efficient_inference, size=minibatch_size)
            return super().forward(views)

    Runner.of(Seeing()).run(torch.rand(2, 3, 14, 14))
    assert seen == {"efficient": True, "size": HEAD_FRAMES}


def test_images_of_a_wrong_size_and_another_encoder_are_refused_in_one_line(case: Case) -> None:
    model: Any = build(case)
    with pytest.raises(LayoutError, match=r"images of 30x28 pixels, expected .* multiples of 14"):
        Runner.of(model).run(torch.rand(2, 3, 28, 30))
    model.encoder.data_norm_type, own = "dust3r", model.encoder.data_norm_type
    try:
        with pytest.raises(FamilyError, match="normalised as 'dust3r'"):
            Runner.of(model).run(torch.rand(2, 3, 28, 28))
    finally:
        model.encoder.data_norm_type = own


@pytest.mark.parametrize("scaled", ["use_scalable_softmax", "use_entropy_scaling"])
def test_scaled_queries_keep_the_original_length(scaled: str) -> None:
    kind = type("Scaled", (MapAnythingAttention,), {scaled: True})
    torch.manual_seed(0)
    model, clip = stand_in_mapanything.MapAnything(kind).eval(), torch.rand(1, 7, 3, 28, 42)
    dense = run(model, clip)
    with spark3r.apply(model, Schedule.dense(3)) as handle:
        handle.verify(clip[0])
        assert difference(run(model, clip), dense) == 0.0
    attn: Any = attentions(model)["info_sharing.self_attention_blocks.2.attn"]
    seen: list[tuple[Tensor, Tensor]] = []
    attn.register_forward_hook(lambda attn, args, output: seen.append((args[0], output)))
    with spark3r.apply(model, reducing(3)):
        run(model, clip)
    x, output = seen[-1]
    with torch.no_grad():
        expected, _ = reduced_attention(
            attn, x, None, frames=7, grid=(2, 3), special=1, query=2, key_value=3, group=4,
            patches_first=True, tail=1,
        )  # fmt: skip
    assert difference({"output": output.double()}, {"output": expected}) < 1e-5


def test_a_model_without_class_tokens_has_no_special_ones() -> None:
    model = stand_in_mapanything.MapAnything(class_token=False).eval()
    assert detect(model).metadata(model) == {"patch_size": 14, "special_tokens": 0}
    clip = torch.rand(1, 5, 3, 28, 42)
    with spark3r.apply(model, reducing(3)):
        assert flat(model(clip))["conf"].shape == (1, 5, 28, 42)


def test_a_positional_encoding_is_refused_by_name() -> None:
    model: Any = stand_in_mapanything.MapAnything()
    model.info_sharing.self_attention_blocks[0].attn.custom_positional_encoding = nn.Identity()
    with pytest.raises(FamilyError, match=r"cannot be reduced: .* positional encoding"):
        detect(model)


def test_a_checkpoint_stores_shared_tensors_under_one_name(tmp_path: Path) -> None:
    """Upstream's dense head is the sequence of two modules that the model has, too."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feature_head, self.other = nn.Linear(3, 2), nn.Linear(3, 2)
            self.dense_head = nn.Sequential(self.feature_head)

    trained, model = Twice(), Twice()
    save_model(trained, str(tmp_path / "model.safetensors"))
    tensors = read_checkpoint(tmp_path / "model.safetensors")
    assert len(tensors) == 4 < len(trained.state_dict())
    fill(model, tensors, "model", ())
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    tensors.pop("other.weight")
    with pytest.raises(spark3r.WeightsError, match=r"1 missing \(other\.weight\)"):
        fill(model, tensors, "model", ())
