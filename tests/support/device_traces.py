"""What a pass did on a device: its operators, its waits, its attention calls."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from spark3r.kernels.limits import MOST_NORMALISED

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """An operator that launches kernels on the device, or makes the host wait for it.

    Attributes:
        name: Name of the operator, without namespace and overload.
        place: Qualified name of the attention module that runs, empty outside of them.
        inputs: Shapes of the tensors that it takes.
        outputs: Shapes of those that it returns.
        waits: Why the host waits for the device, or None if it does not.
        code: File and line outside of torch that called it; empty if it does not wait.
    """

    name: str
    place: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    waits: str | None = None
    code: str = ""


@dataclass(frozen=True)
class Attention:
    """A call of ``F.scaled_dot_product_attention``, or of a fused kernel's private operator.

    Attributes:
        name: Name of the private operator, or ``sdpa``.
        place: Qualified name of the attention module that runs.
        dtypes: Precisions of queries, keys and values, before autocast would change them.
        mask: Precision of the mask, None for none.
        queries: Number of queries.
        keys: Number of keys.
    """

    name: str
    place: str
    dtypes: tuple[torch.dtype, ...]
    mask: torch.dtype | None
    queries: int
    keys: int


@dataclass
class Trace:
    """What a pass did on the device.

    Attributes:
        launches: Its operators that launch kernels or wait, in their order.
        attention: Its attention calls, in their order.
    """

    launches: list[Launch] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)

    def waits(self, folder: Path | None = None) -> list[str]:
        """Return where the host waits for the device, and why.

        Args:
            folder: Folder of the code to blame; None for any.
        """
        return [
            f"{each.code}: {each.waits}"
            for each in self.launches
            if each.waits and (folder is None or each.code.startswith(f"{folder}{os.sep}"))
        ]

    def inside(self, place: str) -> Trace:
        """Return the part of the trace inside an attention module."""
        return Trace(
            [each for each in self.launches if each.place == place],
            [each for each in self.attention if each.place == place],
        )

    @property
    def kernels(self) -> list[str]:
        """Names of its operators, in their order."""
        return [each.name for each in self.launches]

    def products(self) -> dict[int, int]:
        """Return the rows of all matrix products with weights, by their number of columns."""
        rows: dict[int, int] = {}
        for each in self.launches:
            if each.name in ("mm", "addmm"):
                ((count, width),) = each.outputs
                rows[width] = rows.get(width, 0) + count
        return rows

    def too_large(self) -> list[str]:
        """Return the operators whose kernels would count beyond what their numbers hold."""
        return [reason for each in self.launches if (reason := _too_large(each)) is not None]


def _too_large(launch: Launch) -> str | None:
    """Return why a launch's kernel would count wrong, or None.

    The numbers are those of `spark3r.kernels.limits` and of the kernels' own code. Operators that
    are not named here count in 64 bits, or torch splits them or raises an error.
    """
    most = 2**31
    if launch.name == "native_layer_norm":
        size, most = prod(launch.inputs[0]), MOST_NORMALISED
    elif launch.name == "_scaled_dot_product_efficient_attention" and len(launch.inputs) == 4:
        size = launch.inputs[0][2] * launch.inputs[1][2]
    elif launch.name == "nearest":  # offsets inside a group count in 32 bits
        size = max(shape[2] * shape[3] for shape in launch.inputs)
    elif launch.name == "norm_rope":  # tokens count in 32 bits
        size = launch.inputs[0][2]
    elif launch.name in ("sort", "topk", "searchsorted", "_embedding_bag_forward_only"):
        size = max(shape[-1] for shape in launch.inputs)
    elif launch.name.startswith("upsample"):
        size = max(prod(shape) for shape in (*launch.inputs, *launch.outputs))
    else:
        return None
    return None if size < most else f"{launch.name} of {launch.inputs}: {size} >= {most}"
