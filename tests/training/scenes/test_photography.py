from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from training.scenes.photography import GREY, Camera, brightness, jpeg, photograph, random_camera


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_camera(clips: int, frames: int) -> Camera:
    """A camera that only exposes and encodes."""
    kernel = torch.zeros(clips, frames, 5, 5)
    kernel[..., 2, 2] = 1.0
    one, zero = torch.ones(clips, 1), torch.zeros(clips, 1)
    return Camera(
        exposure=one,
        adaptation=zero,
        drift=torch.ones(clips, frames),
        white=torch.ones(clips, frames, 3),
        vignette=zero,
        blur=kernel,
        shot=zero,
        read=zero,
        gamma=2 * one,
        contrast=zero,
        black=torch.zeros(clips, 3),
        saturation=one,
        quality=2 * one,
    )


def scene(clips: int = 2, frames: int = 3) -> Tensor:
    return torch.rand(clips, frames, 3, 16, 24, generator=generator(1))


def test_a_plain_camera_sets_the_exposure_and_takes_the_root() -> None:
    radiance = scene()
    reference = brightness(radiance[:, 0])
    image = photograph(radiance, plain_camera(2, 3), reference, generator())
    expected = (radiance * (GREY / reference)[:, None, None, None, None]).sqrt()
    torch.testing.assert_close(image, expected.clamp(max=1.0), atol=1e-5, rtol=1e-5)


def test_the_scale_of_radiance_does_not_matter() -> None:
    radiance = scene()
    camera = random_camera(2, 3, generator(), generator(7))
    first, second = (
        photograph(k * radiance, camera, k * brightness(radiance[:, 0]), generator())
        for k in (1.0, 0.125)
    )
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)


def test_full_adaptation_makes_every_frame_equally_bright() -> None:
    radiance = scene() * torch.tensor([0.1, 0.4, 1.0])[:, None, None, None]
    camera = replace(plain_camera(2, 3), adaptation=torch.ones(2, 1))
    image = photograph(radiance, camera, brightness(radiance[:, 0]), generator())
    means = image.square().mean(dim=(2, 3, 4))
    torch.testing.assert_close(means, torch.full((2, 3), GREY), atol=0.01, rtol=0)


def test_each_effect_changes_the_image() -> None:
    radiance = scene()
    plain, drawn = plain_camera(2, 3), random_camera(2, 3, generator(3), generator(4))
    drawn = replace(drawn, quality=torch.full((2, 1), 0.7), adaptation=torch.full((2, 1), 0.5))
    reference = brightness(radiance.mean(dim=1))
    expected = photograph(radiance, plain, reference, generator())
    for field in fields(Camera):
        camera = replace(plain, **{field.name: getattr(drawn, field.name)})
        changed = photograph(radiance, camera, reference, generator())
        assert not torch.allclose(changed, expected, atol=1e-4), field.name
        assert ((changed >= 0) & (changed <= 1)).all()


def test_frames_of_a_clip_share_what_is_the_cameras() -> None:
    first, second = (random_camera(1, 1, generator(2), generator(seed)) for seed in (5, 6))
    shared = {"exposure", "adaptation", "vignette", "shot", "read", "gamma", "contrast", "black"}
    for field in fields(Camera):
        same = torch.equal(getattr(first, field.name), getattr(second, field.name))
        assert same == (field.name in shared | {"saturation", "quality"}), field.name


def test_jpeg_of_the_best_quality_is_near_and_of_the_worst_is_not() -> None:
    image = scene()
    best, worst, none = (jpeg(image, torch.full((2, 1), q)) for q in (1.0, 0.0, 1.5))
    assert (best - image).abs().max() < 0.02
    assert (worst - image).abs().mean() > 0.03
    assert torch.equal(none, image)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_jpeg_keeps_flat_blocks(level: float) -> None:
    image = torch.full((1, 1, 3, 8, 16), level)
    torch.testing.assert_close(jpeg(image, torch.tensor([[0.9]])), image, atol=0.005, rtol=0)
