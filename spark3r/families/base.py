"""What the runtime must know of one model architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from ..prediction import Prediction
from .parts.preprocessing import Preprocess

Replacement = tuple[nn.Module, str, object]  # module, attribute, value to set on it
LayoutFunction = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[int, TokenLayout]]


@dataclass(frozen=True)
class Family:
    """An architecture: where its global attention is, how its tokens lie, what it returns.

    A family is recognised by structure, never by importing the model's own package.

    Attributes:
        name: Short name, as in profiles and ``--model``.
        usage: The supported ways to call the model, for error messages.
        matches: Whether an unwrapped model is of this family.
        attention: The global attention modules by qualified name, in the order of a pass.
        entry: The module that every supported call goes through; its pre-hook sees the input.
        layout: From the entry module's arguments to batch size B and token layout.
        attend: Replacement of a global attention module's forward:
            ``attend(module, layout, rule, *args, **kwargs)`` with the module's own arguments
            returns what the module would, reduced by a resolved rule.
        call: Runs the model on one clip of images ``[S, 3, H, W]`` in [0, 1], normalised first
            where the model leaves that to its caller, and returns what it returns.
        predict: From the model's output for a clip of ``images`` ``[S, 3, H, W]`` to a Prediction.
        preprocess: From images of any size to what the model takes, ``[S, 3, H, W]`` in [0, 1].
        facts: Integers worth recording: ``patch_size``, ``special_tokens``.
        refuse: Why a model that resembles this family but does not match it cannot be reduced
            ("its attention takes ..."), or None when it does not even resemble it.
        traceable: What keeps a pass from waiting for the device, and a compiled graph whole,
            without changing an output: replaced while a schedule is applied.
        saver: What lowers peak memory without changing an output: replaced while a schedule is
            applied, unless the user asks for the model as it is.
    """

    name: str
    usage: str
    matches: Callable[[nn.Module], bool]
    attention: Callable[[nn.Module], dict[str, nn.Module]]
    entry: Callable[[nn.Module], nn.Module]
    layout: LayoutFunction
    attend: Callable[..., Tensor]
    call: Callable[[nn.Module, Tensor], Any] = lambda model, images: model(images[None])
    predict: Callable[[Any, Tensor], Prediction] | None = None
    preprocess: Preprocess | None = None
    facts: Callable[[nn.Module], dict[str, int]] = lambda root: {}
    refuse: Callable[[nn.Module], str | None] = lambda root: None
    traceable: Callable[[nn.Module], Iterable[Replacement]] = lambda root: ()
    saver: Callable[[nn.Module], Iterable[Replacement]] = lambda root: ()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile`` and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in _DATA_PARALLEL:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


_DATA_PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel")
