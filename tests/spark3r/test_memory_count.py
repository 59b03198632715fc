"""The count of a pass's memory, against what a CPU and simple sums say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import stand_ins
import torch
from benchmark_scripts import environment
from family_cases import CASES, Case, build, images, reducing, run
from small_models import make_model
from torch import Tensor, nn

import spark3r
from spark3r import FamilyError, Schedule, Spark3rError
from spark3r.cli.main import main
from spark3r.families import generic
from spark3r.families.registry import detect
from spark3r.fitting import most_frames
from spark3r.loading.architecture import load_architecture
from spark3r.loading.load import variant_of_name
from spark3r.loading.upstream import UPSTREAMS
from spark3r.memory_count import GLOBAL, INPUT, PARTS, WEIGHTS, count_memory, part_of_modules

BF16 = torch.bfloat16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_is_counted(case: Case) -> None:
    model, clip = build(case), images(case, 20)
    before = run(model, images(case, 3))
    size = (clip.shape[3], clip.shape[4])
    found = count_memory(model, 20, size, schedule=reducing(case.layers), dtype=BF16)
    assert tuple(found.parts) == PARTS
    assert min(found.parts.values()) >= 0
    weights = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    assert found.parts[WEIGHTS] == sum(t.untyped_storage().nbytes() for t in weights.values())
    assert found.parts[INPUT] == clip.numel() * 4
    assert found.extra > 0
    assert found.where in dict(model.named_modules())
    assert not spark3r.is_applied(model)
    after = run(model, images(case, 3))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_count_is_the_same_from_any_state_of_the_model() -> None:
    model, schedule = make_model(), reducing(2)
    found = count_memory(model, 9, (16, 24), schedule=schedule)
    run(model, torch.rand(1, 4, 3, 16, 24))
    with spark3r.apply(model, Schedule.dense(2)), torch.autocast("cpu", BF16):
        assert count_memory(model, 9, (16, 24), schedule=schedule) == found
        assert spark3r.is_applied(model)
    assert count_memory(model.to("meta").train(), 9, (16, 24), schedule=schedule) == found


class _Wrapper(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inside(*args, **kwargs)


def test_wrapped_attention_is_counted_where_attention_is() -> None:
    model = stand_ins.Vggt()
    kinds = []
    for _ in range(2):
        parts = part_of_modules(model, detect(model))
        kinds.append([parts[block] for block in model.aggregator.global_blocks])
        for block in model.aggregator.global_blocks:
            block.attn = _Wrapper(block.attn)
    assert kinds == [[GLOBAL] * 3] * 2


class _Sum(nn.Module):
    """Attention over all tokens, with known memory: everything is a multiple of a tensor of N·C."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 1, 64)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]


class _Model(nn.Module):
    def __init__(self, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.attn = _Sum()
        self.after = after

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(3).transpose(2, 3)[..., :1].expand(-1, -1, -1, 64).flatten(1, 2)
        return self.after(self.block.attn(x))


FAMILY = generic("block.attn", patch_size=1)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        # Tokens, queries, keys and values, and their sum at the peak; in units of N·C floats.
        (None, 1 + 3 + 1),
        # Under autocast the tokens are cast for the product, and the rest is half as large.
        (BF16, 1 + 0.5 + 1.5),
    ],
)
def test_a_pass_of_known_memory(dtype: torch.dtype | None, expected: float) -> None:
    frames, size = 10, (8, 8)
    found = count_memory(_Model(), frames, size, dtype=dtype, family=FAMILY)
    unit = frames * 64 * 64 * 4
    weights = 64 * 192 * 4
    cast = weights // 2 if dtype else 0
    assert found.parts[WEIGHTS] == weights
    assert found.parts["cast weights"] == cast
    assert found.total == weights + cast + frames * 3 * 64 * 4 + int(expected * unit)
    assert found.where == "block.attn"


def test_regions_without_autocast_are_counted_in_float32() -> None:
    weight = torch.empty(256, 64, device="meta")

    def plain(x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return nn.functional.linear(x.float(), weight)

    def lowered(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)

    wide, narrow = (
        count_memory(_Model(after), 10, (8, 8), dtype=BF16, family=FAMILY).extra
        for after in (plain, lowered)
    )
    out = 10 * 64 * 256
    assert wide - narrow > out
    with torch.autocast("cpu", BF16):  # autocast is itself again
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16


def test_what_depends_on_values_cannot_be_counted() -> None:
    with pytest.raises(Spark3rError, match=r"memory of _Model cannot be counted.* without values"):
        count_memory(_Model(lambda x: x[: int(x.sum())]), 3, (8, 8), family=FAMILY)
    with torch.autocast("cpu", BF16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16


def test_outputs_that_no_prediction_reads_count_where_they_are_asked_for() -> None:
    model = stand_ins.Vggt()
    whole = count_memory(model, 30, (56, 56), prediction=False)
    assert whole.extra > count_memory(model, 30, (56, 56)).extra


@pytest.mark.parametrize(
    "count",
    [lambda n: 100 + 7 * n, lambda n: n * n, lambda n: 50 + 9 * n - 40 * (n > 300)],
)
@pytest.mark.parametrize("start", [1, 10, 5000])
def test_the_longest_clip_that_fits(count: Callable[[int], int], start: int) -> None:
    calls: list[int] = []

    def counted(frames: int) -> int:
        calls.append(frames)
        return count(frames)

    found = most_frames(counted, 5000, start)
    assert count(found) <= 5000
    assert count(found + max(1, found // 100)) > 5000
    assert len(calls) < 25
    assert most_frames(lambda n: 5001, 5000, start) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs /proc")
@pytest.mark.parametrize("reduced", [False, True], ids=["dense", "reduced"])
def test_the_count_is_what_a_cpu_needs(reduced: bool) -> None:
    """The whole comparison is in benchmarks/memory.py."""
    program = f"""
import torch
from spark3r import Schedule, apply, load_model
from spark3r.memory import peak_extra_mb
from spark3r.memory_count import count_memory
torch.set_num_threads(1)
model, clip = load_model("reference:random"), torch.rand(1, 96, 3, 64, 64)
schedule = Schedule.uniform(8, 2, 4) if {reduced} else Schedule.dense(8)
with apply(model, schedule), torch.no_grad():
    model(clip[:, :20])
    measured = peak_extra_mb(lambda: model(clip))
counted = count_memory(model, 96, (64, 64), schedule=schedule).extra / 1e6
print(measured, counted)
"""
    settings = {**environment(), "MALLOC_MMAP_THRESHOLD_": "65536"}
    told = subprocess.run(
        [sys.executable, "-c", program], check=True, env=settings, stdout=subprocess.PIPE, text=True
    )
    measured, counted = map(float, told.stdout.split())
    assert abs(counted - measured) < 0.1 * measured, (measured, counted)


def tiny() -> nn.Module:
    return make_model()


@pytest.mark.slow
def test_a_table_or_one_json_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tiny_memory_model", sys.modules[__name__])
    command = ["memory", "tiny_memory_model:tiny", "--frames", "20", "--size", "64x64"]
    assert main([*command, "--card", "0.1GB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = count_memory(tiny(), 20, (64, 64), dtype=BF16)
    assert (told["bytes"], told["parts"]) == (expected.total, expected.parts)
    assert told["peak_in"] == expected.where
    fits = count_memory(tiny(), told["most_frames"], (64, 64), dtype=BF16).total
    assert 0.95e8 < fits <= 1e8
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny_memory_model:tiny, 20 frames of 64x64 pixels, dense, bfloat16"
    assert f"total {expected.total / 1e9:.2f}".split() in [line.split() for line in lines]
    assert f"The peak is in {expected.where}." in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "24"], "argument --card: '24', expected a size such as 24GB or 22.5GiB"),
        (["--card", "0GB"], "'0GB', expected a size"),
        (["--size", "64"], "argument --size: '64'"),
    ],
)
def test_wrong_usage_is_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "reference", "--frames", "2", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "weights", "variant"),
    [
        ("vggt", "facebook/VGGT-1B", "1b"),
        ("vggt", "facebook/VGGT-1B-Commercial", "1b"),
        ("pi3", "yyfz233/Pi3", "pi3"),
        ("pi3", "yyfz233/Pi3X", "pi3x"),
        ("da3", "depth-anything/DA3-LARGE-1.1", "large"),
        ("da3", "depth-anything/DA3NESTED-GIANT-LARGE", "nested"),
        ("da3", "random-giant", "giant"),
        ("omega", "facebook/VGGT-Omega/vggt_omega_1b_512.pt", "1b"),
        ("mapanything", "facebook/map-anything-apache", "v1.1"),
        ("mapanything", "facebook/map-anything-v1", "v1"),
        ("worldmirror", "tencent/HY-World-2.0/HY-WorldMirror-2.0/model.safetensors", "2"),
        ("worldmirror", "tencent/HunyuanWorld-Mirror", "1"),
        ("panovggt", "YijingGuo/PanoVGGT/model.pt", "panovggt"),
    ],
)
def test_a_name_tells_the_variant(family: str, weights: str, variant: str) -> None:
    assert variant_of_name(UPSTREAMS[family], weights) == variant


def test_a_name_that_tells_no_variant_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"da3:some/thing.*give da3:random-small or da3:random-"):
        load_architecture("da3:some/thing")
