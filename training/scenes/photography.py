"""What a camera makes of the light that reaches it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = 0.2  # mean radiance that an exposure brings the frames to
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Camera:
    """How B clips of S frames are recorded; fp32."""

    exposure: Tensor  # [B, 1] of the clip, factor
    adaptation: Tensor  # [B, 1] how far each frame's exposure follows its own brightness, 0 to 1
    drift: Tensor  # [B, S] of the exposure, factor
    white: Tensor  # [B, S, 3] gains of the channels
    vignette: Tensor  # [B, 1] darkening of the corners, 0 to 1
    blur: Tensor  # [B, S, 5, 5] kernels; some sharpen
    shot: Tensor  # [B, 1] noise that grows with the signal
    read: Tensor  # [B, 1] noise that does not
    gamma: Tensor  # [B, 1]
    contrast: Tensor  # [B, 1] of the S-shaped tone curve
    black: Tensor  # [B, 3] level of black
    saturation: Tensor  # [B, 1]
    quality: Tensor  # [B, 1] of JPEG, 0 to 1; above 1 there is none


def random_camera(
    clips: int,
    frames: int,
    generator: torch.Generator,
    moments: torch.Generator,
) -> Camera:
    """Draw cameras and how they are handled.

    Args:
        clips: Number of clips, B.
        frames: Frames per clip, S.
        generator: CPU generator of what a clip's frames share.
        moments: CPU generator of what is each frame's own; may be the same.

    Returns:
        The cameras.
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    own = torch.randn(clips, frames, 4, generator=moments)
    return Camera(
        exposure=torch.exp(0.3 * normal(clips, 1) + 0.25),
        adaptation=uniform(clips, 1).square() * (uniform(clips, 1) < 0.7),
        drift=torch.exp(uniform(clips, 1, high=0.06) * own[..., 0]),
        white=torch.exp(
            0.12 * normal(clips, 1, 3) * uniform(clips, 1, 1)
            + 0.01 * own[..., 1:] * uniform(clips, 1, 1)
        ),
        vignette=uniform(clips, 1, high=0.35) * uniform(clips, 1),
        blur=_kernels(generator, torch.rand(clips, frames, 2, 1, 1, generator=moments)),
        shot=0.02 * uniform(clips, 1).square(),
        read=0.008 * uniform(clips, 1).square(),
        gamma=uniform(clips, 1, low=1.9, high=2.5),
        contrast=uniform(clips, 1, low=0.1, high=1.0),
        black=0.03 * normal(clips, 1).expand(clips, 3) + 0.008 * normal(clips, 3),
        saturation=uniform(clips, 1, low=0.75, high=1.35),
        quality=uniform(clips, 1, low=0.7, high=1.5),
    )


def _kernels(generator: torch.Generator, own: Tensor) -> Tensor:
    """Draw blur of lens and motion, `[B, S, 5, 5]`, each summing to 1; own is `[B, S, 2, 1, 1]`."""
    line = torch.arange(5.0) - 2
    fast, sharp, edge = torch.rand(3, len(own), 1, 1, 1, generator=generator)
    angle, length = torch.pi * own[:, :, 0], 1.2 * fast**3 * own[:, :, 1]
    spread = 0.03 + 0.2 * sharp**2  # variance in pixels
    along = angle.cos() * line + angle.sin() * line[:, None]
    across = angle.cos() * line[:, None] - angle.sin() * line
    kernel = torch.exp(
        -along.square() / (2 * spread + 2 * length**2) - across.square() / (2 * spread)
    )
    kernel = kernel / kernel.sum(dim=(2, 3), keepdim=True)
    centre, box = torch.zeros(2, 5, 5)
    centre[2, 2] = 1.0
    box[1:4, 1:4] = 1 / 9
    # Devices sharpen, and so does resizing.
    return kernel + 0.6 * edge * (sharp < 0.6) * (centre - box)


def brightness(radiance: Tensor) -> Tensor:
    """Return what a light meter reads for frames `[..., 3, H, W]`, `[...]`, never 0."""
    return radiance.clamp(max=8 * GREY).mean(dim=(-3, -2, -1)).clamp(min=1e-4)


def photograph(
    radiance: Tensor, camera: Camera, reference: Tensor, moments: torch.Generator
) -> Tensor:
    """Record clips.

    Args:
        radiance: Scene-linear, `[B, S, 3, H, W]`, of any scale.
        camera: B cameras for S frames.
        reference: Brightness that each clip's exposure is set by, `[B]`.
        moments: CPU generator of the noise.

    Returns:
        Images as files encode them, `[B, S, 3, H, W]` in [0, 1].
    """
    height, width = radiance.shape[-2:]
    metered = brightness(radiance) / reference[:, None]  # [B, S]
    exposure = GREY / reference[:, None] * camera.exposure * camera.drift
    gain = exposure * metered**-camera.adaptation
    light = radiance * (gain[:, :, None] * camera.white)[..., None, None]
    light = light * _vignette(camera.vignette, height, width)
    light = _filtered(light, camera.blur)
    sigma = (camera.shot[..., None, None, None] ** 2 * light.clamp(min=0)).add_(
        camera.read[..., None, None, None] ** 2
    )
    light = light + sigma.sqrt() * torch.randn(light.shape, generator=moments)
    image = light.clamp(0.0, 1.0) ** (1 / camera.gamma)[..., None, None, None]
    curve = image * image * (3 - 2 * image)
    image = torch.lerp(image, curve, camera.contrast[..., None, None, None])
    black = camera.black[:, None, :, None, None]
    image = black + (1 - black) * image
    luma = (torch.tensor(LUMA)[:, None, None] * image).sum(dim=2, keepdim=True)
    image = torch.lerp(luma, image, camera.saturation[..., None, None, None]).clamp(0.0, 1.0)
    return jpeg(image, camera.quality)


def _vignette(strength: Tensor, height: int, width: int) -> Tensor:
    """Gains `[B, 1, 1, H, W]` that fall towards the corners."""
    y = (torch.arange(height) + 0.5) * (2 / height) - 1
    x = (torch.arange(width) + 0.5) * (2 / width) - 1
    fall = (y[:, None].square() + x.square()) / 2
    return 1 - strength[:, :, None, None, None] * fall


def _filtered(light: Tensor, kernels: Tensor) -> Tensor:
    """Convolve every frame with its own kernel."""
    batch, frames, channels, height, width = light.shape
    flat = F.pad(light.flatten(0, 1), (2, 2, 2, 2), mode="replicate").transpose(0, 1)
    weight = kernels.view(batch * frames, 1, 5, 5)
    result = F.conv2d(flat, weight, groups=batch * frames)
    return result.transpose(0, 1).reshape(batch, frames, channels, height, width)


LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)  # ITU-T T.81, table K.1


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Lose what JPEG loses: quantise the cosine transform of blocks of 8x8 pixels.

    Footage is compressed before it is resized, which averages most of the loss away; so what is
    left is weak, and the luma table serves all channels.

    Args:
        images: `[B, S, 3, H, W]` in [0, 1]; sides multiples of 8.
        quality: `[B, 1]` in [0, 1]; above 1 a clip stays as it is.

    Returns:
        Images in [0, 1], the same shape.
    """
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)
    basis = torch.cos((2 * n + 1) * k * (torch.pi / 16)) * 0.5
    basis[0] *= 0.5**0.5
    batch, frames, _, height, width = images.shape
    blocks = images.reshape(batch, frames, 3, height // 8, 8, width // 8, 8).transpose(4, 5)
    coefficients = basis @ (blocks * 255) @ basis.T
    step = (
        torch.tensor(LUMA_TABLE)
        * (1.02 - quality.clamp(max=1.0))[..., None, None, None, None, None]
    )
    step = step.clamp(min=1.0)
    quantised = (coefficients / step).round() * step
    decoded = (basis.T @ quantised @ basis) / 255
    decoded = decoded.transpose(4, 5).reshape(images.shape).clamp(0.0, 1.0)
    return torch.where(quality[..., None, None, None] > 1, images, decoded)
