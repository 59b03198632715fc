"""Run a clip dense and reduced, and compare."""

import time

import torch

import spark3r
from spark3r import Operators, Schedule, TokenStride
from spark3r.metrics import log_depth_deviation
from spark3r.reference import load
from spark3r.reference.scenes.render import rendered_clip

model = load()
clip = rendered_clip(seed=1_000_000, frames=128)
schedule = Schedule.uniform(
    layers=8,
    key_value=8,
    operators=Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1.0)),
)


def run() -> tuple[dict[str, torch.Tensor], float]:
    """Return the model's output for the clip and the seconds it took."""
    started = time.perf_counter()
    with torch.inference_mode():
        output = model(clip.images)
    return output, time.perf_counter() - started


run()  # warm up
dense, dense_seconds = run()
with spark3r.apply(model, schedule) as handle:
    print(handle)
    run()
    reduced, reduced_seconds = run()

deviation = log_depth_deviation(reduced["depth"][0, ..., 0], dense["depth"][0, ..., 0])
print(f"{clip.frames} frames: dense {dense_seconds:.2f} s, reduced {reduced_seconds:.2f} s")
print(f"speed-up {dense_seconds / reduced_seconds:.1f}x, depth differs by {deviation:.2%}")
