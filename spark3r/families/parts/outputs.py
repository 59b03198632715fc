"""Reading a model's output for one clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import FamilyError


def first_clip(output: Any, *names: str) -> tuple[Tensor, ...]:
    """Return the named outputs of the first batch element.

    Args:
        output: Mapping that the model returned, of tensors with a batch dimension.
        names: Names of the outputs. If one is on the CPU, all are returned there.

    Raises:
        FamilyError: If an output is missing, for example because its head is switched off.
    """
    missing = [name for name in names if name not in output]
    if missing:
        raise FamilyError(
            f"the model returned {', '.join(sorted(map(str, output)))}, but a prediction needs "
            f"{' and '.join(missing)} too: is a head switched off?"
        )
    found = tuple(output[name][0] for name in names)
    if any(each.device.type == "cpu" for each in found):  # a head's outputs may be on the host
        return tuple(each.to("cpu") for each in found)
    return found
