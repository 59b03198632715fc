"""What `torch.compile` does to the parts that stay dense: time, and whether it is lossless.

    python benchmarks/compiled.py

A frame block and the MLP of a global block of the reference model on 128 frames, eager and
compiled, in turns; process time on one thread.
"""

from __future__ import annotations

import time

import torch

from spark3r.loading import load_model
from spark3r.reference.rope import make_rope
from spark3r.tables import print_table
from spark3r.timing import interleaved

FRAMES = 128


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    aggregator = load_model("reference").aggregator
    frame_block, mlp = aggregator.frame_blocks[0], aggregator.global_blocks[0].mlp
    rope = make_rope(8, 8, 5, 32, torch.device("cpu"))
    frames, tokens = torch.randn(FRAMES, 69, 128), torch.randn(1, FRAMES * 69, 128)
    rows = []
    with torch.inference_mode():
        for name, module, arguments in (
            ("frame block", frame_block, (frames, rope)),
            ("MLP", mlp, (tokens,)),
        ):
            compiled = torch.compile(module)
            difference = (module(*arguments) - compiled(*arguments)).abs().max()
            taken = interleaved(
                {
                    "eager": lambda module=module, arguments=arguments: module(*arguments),
                    "compiled": lambda call=compiled, arguments=arguments: call(*arguments),
                },
                warm_up_s=0.01,
                clock=time.process_time,
            )
            eager, fast = taken["eager"].median_ms, taken["compiled"].median_ms
            rows.append((name, f"{eager:.1f}", f"{fast:.1f}", f"{float(difference):.1e}"))
    print_table(("part", "eager ms", "compiled ms", "largest difference"), rows)


if __name__ == "__main__":
    main()
