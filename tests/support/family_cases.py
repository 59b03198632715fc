"""The models of the conformance suite: stand-ins, and upstream code if it is installed.

Upstream code that is not installed makes no case. `missing` says what it is that went unverified.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import stand_in_mapanything
import stand_in_panovggt
import stand_in_worldmirror
import stand_ins
import torch
import upstream_models as upstream
from small_models import make_model
from torch import Tensor, nn

from spark3r import LayerRule, Schedule, TokenLayout
from spark3r.families.registry import detect
from spark3r.reduction.operators import Operators, QueryMerging


@dataclass(frozen=True)
class Case:
    """One model under test.

    Attributes:
        name: Shown in test names.
        family: Family that must recognise it.
        make: Builds it with random weights.
        layers: Number of its global attention layers.
        needs: Upstream packages it needs, none for a stand-in.
        patch_size: Side of a patch in pixels.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    layers: int
    needs: tuple[str, ...] = ()
    patch_size: int = 14

    def __str__(self) -> str:
        return self.name


DA3_PACKAGES = ("depth_anything_3", "addict", "omegaconf", "einops")
MAPANYTHING_PACKAGES = ("mapanything", "uniception", "hydra", "einops", "cv2")
WORLDMIRROR_PACKAGES = ("hyworld2", "huggingface_hub", "einops")
ALL_CASES = (
    Case("reference", "reference", make_model, 2, patch_size=8),
    Case("vggt-stand-in", "vggt", stand_ins.Vggt, 3),
    Case("pi3-stand-in", "pi3", stand_ins.Pi3, 3),
    Case("pi3x-stand-in", "pi3", stand_ins.Pi3X, 3),
    Case("da3-stand-in", "da3", stand_ins.Da3, 3),
    Case("omega-stand-in", "omega", stand_ins.Omega, 3, patch_size=16),
    Case("mapanything-stand-in", "mapanything", stand_in_mapanything.MapAnything, 3),
    Case("worldmirror-stand-in", "worldmirror", stand_in_worldmirror.WorldMirror, 3),
    Case("panovggt-stand-in", "panovggt", stand_in_panovggt.PanoVggt, 3),
    Case("vggt-upstream", "vggt", upstream.vggt, 4, ("vggt", "huggingface_hub", "einops")),
    Case("pi3-upstream", "pi3", upstream.pi3, 3, ("pi3", "huggingface_hub")),
    Case("pi3x-upstream", "pi3", upstream.pi3x, 3, ("pi3", "huggingface_hub")),
    Case("da3-tiny-upstream", "da3", upstream.da3_tiny, 3, DA3_PACKAGES),
    Case("da3-small-upstream", "da3", upstream.da3_small, 4, DA3_PACKAGES),
    Case("omega-upstream", "omega", upstream.omega, 5, ("vggt_omega",), 16),
    Case("mapanything-upstream", "mapanything", upstream.mapanything, 3, MAPANYTHING_PACKAGES),
    Case("worldmirror-upstream", "worldmirror", upstream.worldmirror, 4, WORLDMIRROR_PACKAGES),
    Case(
        "worldmirror-1-upstream",
        "worldmirror",
        partial(upstream.worldmirror, normalised=False),
        4,
        WORLDMIRROR_PACKAGES,
    ),
    Case("panovggt-upstream", "panovggt", upstream.panovggt, 3, ("panovggt", "huggingface_hub")),
)


PATCHES_FIRST = ("mapanything",)
"""Families whose special tokens stand after the patches of a frame, and a token after all."""


def layout_of(case: Case, frames: int, rows: int = 2, columns: int = 3) -> TokenLayout:
    """Return how the tokens of a clip of this size lie."""
    special = detect(build(case)).metadata(build(case))["special_tokens"]
    last = case.family in PATCHES_FIRST
    anchor = None if case.family in ("pi3", "panovggt") else 0
    return TokenLayout(frames, rows, columns, special, last, int(last), anchor)


def missing(case: Case) -> list[str]:
    """Return the upstream packages that a case needs and that are missing."""
    return [package for package in case.needs if find_spec(package) is None]


CASES = tuple(case for case in ALL_CASES if not missing(case))
TAKES_CLIP = tuple(case for case in CASES if case.family != "mapanything")
"""Those whose entry is given the clip itself, and not features of it."""


@contextmanager
def quiet() -> Any:
    """Return a context in which upstream's own warnings do not fail the suite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def _built(case: Case) -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(7)
    with quiet():
        model = case.make()
    randomise(model)
    torch.set_rng_state(state)
    return model


def build(case: Case) -> nn.Module:
    """Return the case's model in evaluation mode, made once."""
    return _built(case).eval()


def randomise(model: nn.Module) -> None:
    """Give LayerScale, tokens, norms and biases values that matter to outputs, in place."""
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("bias_mask"):  # upstream leaves it NaN until weights are loaded
                value.fill_(1.0).view(3, -1)[1] = 0.0
        for name, value in model.named_parameters():
            if name.endswith("gamma"):
                value.uniform_(0.5, 1.5)
            elif "head" in name or "cam_" in name or "_decoder" in name:
                continue
            elif "token" in name:
                value.normal_()
            elif "norm" in name and name.endswith("weight"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                value.normal_(std=0.1)


def images(
    case: Case, frames: int, batch: int = 1, rows: int = 2, columns: int = 3, seed: int = 0
) -> Tensor:
    """Return a random clip ``[B, S, 3, rows * patch, columns * patch]``."""
    generator = torch.Generator().manual_seed(seed)
    side = case.patch_size
    return torch.rand(batch, frames, 3, rows * side, columns * side, generator=generator)


def entry_call(model: nn.Module, clip: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that the entry module of a model's family is given for a clip."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entry = detect(model).entry(model)
    hook = entry.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    run(model, clip)
    hook.remove()
    return seen[0]


def run(model: nn.Module, clip: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Return the tensors that a model predicts for a clip, without gradients."""
    with torch.no_grad(), quiet():
        return upstream.flat(model(clip, **arguments))


def reducing(
    layers: int, query: int = 2, key_value: int = 3, group: int = 4, unmerge: str = "copy"
) -> Schedule:
    """Return a schedule that reduces every layer, its first one by keys and values alone."""
    rules = (LayerRule(1, key_value), *(LayerRule(query, key_value),) * (layers - 1))
    return Schedule(rules, Operators(QueryMerging(group=group, unmerge=unmerge)))


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's global attention modules."""
    return detect(model).attention(model)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of any output, relative to that output's largest value."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        scale = float(value.abs().max()) or 1.0
        worst = max(worst, float((found[name] - value).abs().max()) / scale)
    return worst
