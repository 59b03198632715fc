"""WorldMirror: its versions, positions that are normalised to the grid, what its code imports."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import stand_in_worldmirror
import torch
import torch.nn.functional as F
from attention_oracle import reduced_attention
from family_cases import attentions, difference, randomise, reducing, run
from stand_in_worldmirror import NormalisedRotary, WorldMirror

import spark3r
from spark3r import FamilyError
from spark3r.families.registry import detect
from spark3r.loading import worldmirror as loading


@pytest.mark.parametrize("way", ["separate", "max"])
def test_positions_are_normalised_as_the_model_does(way: str) -> None:
    torch.manual_seed(3)
    model = WorldMirror(rope=NormalisedRotary(way)).eval()
    randomise(model)
    clip = torch.rand(1, 5, 3, 28, 56)
    seen = {}

    def record(attn: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        seen[attn] = (args[0], kwargs["pos"], output)

    for attn in attentions(model).values():
        attn.register_forward_hook(record, with_kwargs=True)
    with spark3r.apply(model, reducing(3)):
        run(model, clip)
    attn = list(attentions(model).values())[1]
    x, positions, output = seen[attn]
    layout = {"frames": 5, "grid": (2, 4), "special": 4, "query": 2, "key_value": 3, "group": 4}
    with torch.no_grad():
        expected, _ = reduced_attention(attn, x, positions, **layout)
    assert difference({"": output.double()}, {"": expected}) < 1e-5


def test_a_model_for_several_devices_is_refused() -> None:
    class Dist(stand_in_worldmirror.AttentionOf2):
        def forward(self, x, pos=None, sp_size=1, sp_group=None, padding_tokens=0):  # type: ignore[no-untyped-def]
            return self.run(x, pos)

    with pytest.raises(FamilyError, match=r"Build it with sp_size=1, and let spark3r share"):
        detect(WorldMirror(Dist))


def test_a_checkpoint_tells_its_version() -> None:
    assert loading.variant(WorldMirror().state_dict()) == "2"
    assert loading.variant(stand_in_worldmirror.version_1().state_dict()) == "1"
    assert loading.variant({"aggregator.camera_token": torch.ones(1)}) is None


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_torchs_attention_takes_the_place_of_flash_attn() -> None:
    with loading.without_kernels():
        from flash_attn.flash_attn_interface import flash_attn_func
    assert "flash_attn" not in sys.modules
    assert "gsplat.rendering" not in sys.modules
    query, key, value = torch.rand(3, 2, 7, 4, 8).unbind(0)
    expected = F.scaled_dot_product_attention(
        *(each.transpose(1, 2) for each in (query, key, value))
    )
    assert torch.equal(flash_attn_func(query, key, value), expected.transpose(1, 2))
