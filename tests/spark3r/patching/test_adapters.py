"""Models inside PEFT's wrappers, whose linear layers have low-rank adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_cases import CASES, Case, attentions, build, difference, images, quiet, reducing, run
from torch import Tensor, nn

import spark3r


class LoraLinear(nn.Module):
    """A linear layer with an adapter beside it, as PEFT puts in its place."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.merged = base_layer, False
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x)
        return output if self.merged else output + self.lora_B(self.lora_A(x))

    def merge(self, sign: int) -> None:
        with torch.no_grad():
            self.base_layer.weight += sign * self.lora_B.weight @ self.lora_A.weight
        self.merged = sign > 0


class BaseTuner(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for attn in attentions(model).values():
            attn.qkv = LoraLinear(attn.qkv)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class LoraModel(BaseTuner):
    """Recognised by the name of its base, as PEFT's."""


class PeftModel(nn.Module):
    """PEFT's wrappers in short."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = LoraModel(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)

    def merge_adapter(self) -> None:
        for attn in attentions(self.base_model.model).values():
            attn.qkv.merge(1)

    def unmerge_adapter(self) -> None:
        for attn in attentions(self.base_model.model).values():
            attn.qkv.merge(-1)

    def merge_and_unload(self) -> nn.Module:
        self.merge_adapter()
        for attn in attentions(self.base_model.model).values():
            attn.qkv = attn.qkv.base_layer
        return self.base_model.model


def real(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False)
    with quiet():
        return peft.get_peft_model(model, config)


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.mark.parametrize("adapted", [PeftModel, real], ids=["like", "real"])
def test_an_adapted_model_is_patched_merged_and_restored(
    case: Case, adapted: Callable[[nn.Module], Any]
) -> None:
    torch.manual_seed(0)
    model = adapted(copy.deepcopy(build(case))).eval()
    clip = images(case, 5)
    dense = run(model, clip)
    handle = spark3r.apply(model, reducing(case.layers))
    assert spark3r.is_applied(model)
    reduced = run(model, clip)
    assert difference(reduced, dense) > 1e-6
    with handle.disabled():
        assert difference(run(model, clip), dense) == 0.0
    for step in (model.merge_adapter, model.unmerge_adapter):
        step()
        assert difference(run(model, clip), reduced) < 1e-4
    handle.remove()
    assert difference(run(model, clip), dense) < 1e-4
    with spark3r.apply(model, reducing(case.layers)):
        whole = model.merge_and_unload()
        assert spark3r.is_applied(whole)
        assert difference(run(whole, clip), reduced) < 1e-4
    assert not spark3r.is_applied(whole)
    assert difference(run(whole, clip), dense) < 1e-4


def test_adapters_may_come_after_the_schedule(case: Case) -> None:
    torch.manual_seed(0)
    inner, clip = copy.deepcopy(build(case)), images(case, 5)
    handle = spark3r.apply(inner, reducing(case.layers))
    before = run(inner, clip)
    model = PeftModel(inner).eval()
    after = run(model, clip)
    assert difference(after, before) > 1e-6
    handle.remove()
    with spark3r.apply(model, reducing(case.layers)):
        assert difference(run(model, clip), after) == 0.0
