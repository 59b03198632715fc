"""Ranks of tests: processes that run a model over one clip together."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

Work = Callable[..., Any]


def on_ranks(works: dict[str, Work], ranks: int, folder: Path) -> dict[str, list[Any]]:
    """Return what ``work(rank)`` returns in each of some processes, one work after the other.

    It is None where a process was killed.
    """
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_run, args=(works, rank, ranks, folder)) for rank in range(ranks)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
        assert each.exitcode is not None, "a rank hangs"

    def result(name: str, rank: int) -> Any:
        file = folder / f"{name}{rank}"
        return torch.load(file, weights_only=False) if file.exists() else None

    return {name: [result(name, rank) for rank in range(ranks)] for name in works}


def _run(works: dict[str, Work], rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # gloo's own, which say nothing of ours
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    for name, work in works.items():
        torch.save(work(rank), folder / f"{name}{rank}")


@contextmanager
def told() -> Iterator[list[str]]:
    """Collect the message of an error instead of raising it."""
    found: list[str] = []
    try:
        yield found
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")


def differences(rank: int, names: list[str]) -> dict[str, float]:
    """Return how far a rank's part of a shared pass is from that part of a pass in one process."""
    import family_cases
    import patched

    import spark3r

    found = {}
    for case in family_cases.CASES:
        if case.name not in names:
            continue
        model = family_cases.build(case)
        model.text_alignment_head = None  # VGGT-Omega's reads all frames, and is refused
        model.enable_global_points = False  # PanoVGGT's are those of the middle frame, likewise
        images = family_cases.images(case, 13)
        before = patched.snapshot(model)
        schedules = {
            "copy": family_cases.reducing(case.layers),
            "linear": family_cases.reducing(case.layers, unmerge="linear"),
            "dense": spark3r.Schedule.dense(case.layers),
        }
        calls: dict[str, dict[str, Any]] = {"": {}}
        if case.family == "da3":
            calls["middle"] = {"ref_view_strategy": "middle"}
        for name, schedule in schedules.items():
            for call, words in calls.items():
                # Without memory savers, upstream's own code runs in the one process.
                options = {"save_memory": name == "linear", "family": case.family}
                with spark3r.apply(model, schedule, **options):
                    whole = family_cases.run(model, images, **words)
                options["group"] = dist.group.WORLD
                with spark3r.apply(model, schedule, **options) as handle:
                    own = handle.share(13)
                    part = family_cases.run(model, images[:, own], **words)
                expected = {output: value[:, own] for output, value in whole.items()}
                found[f"{case.name} {name} {call}"] = family_cases.difference(part, expected)
        assert patched.snapshot(model) == before
    return found


def refusals(rank: int) -> dict[str, list[str]]:
    """Return what ranks are told of passes that they cannot share."""
    import pickle

    import stand_ins
    from small_models import make_images, make_model

    import spark3r
    from spark3r import LayerRule, Operators, QueryMerging, Schedule

    group = dist.group.WORLD
    model, images = make_model(), make_images(12)
    merged = Schedule((LayerRule(2, 2),) * 2, Operators(QueryMerging(group=4)))
    found = {}
    with spark3r.apply(model, merged, group=group) as handle, torch.no_grad():
        with told() as found["uneven"]:
            model(images[slice(0, 6) if rank == 0 else slice(6, 12)])
        with told() as found["few groups"]:
            handle.share(4)
        with torch.enable_grad(), told() as found["gradients"]:
            model(images[handle.share(12)])
        with told() as found["copy"]:
            pickle.dumps(model)
        part = model(images[handle.share(12)])["depth"]  # and goes on afterwards
        found["afterwards"] = [str(tuple(part.shape))]
        with handle.disabled():  # without the other rank
            alone = model(images[:3]) if rank == 0 else None
        found["disabled"] = [] if alone is None else [str(len(alone["depth"][0]))]
    other = merged if rank == 0 else Schedule.dense(2)
    with spark3r.apply(model, other, group=group), torch.no_grad(), told() as found["schedules"]:
        model(images[:4])
    for name, each in (("pi3x", stand_ins.Pi3X()), ("da3", stand_ins.Da3())):
        with told() as found[name]:
            spark3r.apply(each, Schedule.dense(3), group=group)
        assert not spark3r.is_applied(each)
    family = spark3r.generic("aggregator.global_blocks.*.attn", patch_size=8, special=5)
    with told() as found["generic"]:
        spark3r.apply(model, merged, family=family, group=group)
    return found


def killed(rank: int) -> tuple[list[str], float]:
    """Return what a rank is told when the last one is killed in a pass, and after which time."""
    from small_models import make_images, make_model

    import spark3r

    model, images = make_model(), make_images(12)
    last = dist.get_world_size() - 1

    def die(*_: Any) -> None:
        if rank == last:
            os.kill(os.getpid(), signal.SIGKILL)

    model.aggregator.global_blocks[1].attn.proj.register_forward_pre_hook(die)
    model.aggregator.global_blocks.append(model.aggregator.global_blocks[0])
    model.aggregator.frame_blocks.append(model.aggregator.frame_blocks[0])
    schedule = spark3r.Schedule.dense(3)
    with spark3r.apply(model, schedule, group=dist.group.WORLD, guard=False) as handle:
        begin = time.monotonic()
        with torch.no_grad(), told() as found:
            model(images[handle.share(12)])
    assert not spark3r.is_applied(model)
    return found, time.monotonic() - begin


def make_dying() -> nn.Module:
    """Return a model whose process is killed in rank 1, in a pass of more frames than warm up."""
    from small_models import make_model

    model = make_model()

    def die(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if os.environ["RANK"] == "1" and args[0].shape[1] > 2 * 69:
            os.kill(os.getpid(), signal.SIGKILL)

    model.aggregator.global_blocks[0].attn.proj.register_forward_pre_hook(die)
    return model
