"""What the runtime needs to know about one model architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..layout import TokenLayout
from ..prediction import Prediction
from .parts.preprocessing import Preprocessed

if TYPE_CHECKING:
    from PIL.Image import Image

Replacement = tuple[nn.Module, str, object]
"""Module, name of an attribute, and the value to set on it."""

LayoutFunction = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[int, TokenLayout]]
"""From the entry module, its positional and its keyword arguments to batch size and layout."""

Preprocess = Callable[[Iterable["Image"]], Preprocessed]
"""From upright Pillow images, one per frame, to a model's input."""


@dataclass(frozen=True)
class Family:
    """An architecture: where its global attention is, how its tokens lie, what it returns.

    A family recognises a model by its structure and never imports the model's own package.

    Attributes:
        name: Short name, as in profiles and ``--model``.
        usage: Supported ways to call the model, for error messages.
        matches: Return True if an unwrapped model is of this family.
        attention: Return the global attention modules by qualified name, in the order of a pass.
        entry: Return the module that every supported call goes through. Its pre-hook sees the
            input.
        layout: Return batch size B and token layout from the entry module's arguments.
        reduced_forward: Replacement of a global attention module's forward,
            ``reduced_forward(module, layout, rule, *args, **kwargs)`` with the module's own
            arguments. It returns the module's output, reduced by a `ResolvedRule`.
        call: Run the model on one clip of images ``[S, 3, H, W]`` in [0, 1] and return its output.
            It normalises the images where the model leaves that to its caller.
        predict: Return a Prediction from the model's output and the clip's images
            ``[S, 3, H, W]``. None if the output is not known.
        preprocess: Turn images of any size into the model's input, ``[S, 3, H, W]`` in [0, 1].
            None if the model's own loader is not known.
        metadata: Return integers worth recording: ``patch_size``, ``special_tokens``.
        explain_mismatch: Return why a model that resembles this family but does not match it
            cannot be reduced ("its attention takes ..."). None if it does not resemble it.
        compile_fixes: Return replacements that keep a pass from waiting for the device and a
            compiled graph whole. They change no output and hold while a schedule is applied.
        memory_savers: Return replacements that lower peak memory. They change no output and hold
            while a schedule is applied, unless the user switches them off.
    """

    name: str
    usage: str
    matches: Callable[[nn.Module], bool]
    attention: Callable[[nn.Module], dict[str, nn.Module]]
    entry: Callable[[nn.Module], nn.Module]
    layout: LayoutFunction
    reduced_forward: Callable[..., Tensor]
    call: Callable[[nn.Module, Tensor], Any] = lambda model, images: model(images[None])
    predict: Callable[[Any, Tensor], Prediction] | None = None
    preprocess: Preprocess | None = None
    metadata: Callable[[nn.Module], dict[str, int]] = lambda root: {}
    explain_mismatch: Callable[[nn.Module], str | None] = lambda root: None
    compile_fixes: Callable[[nn.Module], Iterable[Replacement]] = lambda root: ()
    memory_savers: Callable[[nn.Module], Iterable[Replacement]] = lambda root: ()


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
