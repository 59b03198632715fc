"""What the runtime needs to know about one model architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..layout import TokenLayout
from ..prediction import Prediction
from .parts.preprocessing import Preprocessed

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..reduction.exchange import Exchange

Replacement = tuple[nn.Module, str, object]
"""Module, name of an attribute, and the value to set on it."""

SAVES_MEMORY = "_spark3r_saves_memory"
"""Mark on the root module while a patch with the family's memory savers is on it."""

MASKED = "_spark3r_masked"
"""Mark on the root module while a patch masks patches."""

LayoutFunction = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[int, TokenLayout]]
"""From the entry module, its positional and its keyword arguments to batch size and layout."""

Preprocess = Callable[[Iterable["Image"]], Preprocessed]
"""From upright Pillow images, one per frame, to a model's input."""


def _call(model: nn.Module, images: Tensor) -> Any:
    return model(images[None])


def _keeps_order(entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    return None


def _no_metadata(root: nn.Module) -> dict[str, int]:
    return {}


def _no_modules(root: nn.Module) -> tuple[nn.Module, ...]:
    return ()


def _no_reason(root: nn.Module) -> None:
    return None


def _no_replacements(root: nn.Module) -> tuple[Replacement, ...]:
    return ()


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
        frame_attention: Return the modules that attend inside frames and that ``frame_forward`` can
            run.
        frame_forward: Replacement of such a module's forward, with the arguments of
            ``reduced_forward``: the layout is that of one frame, and the rule reduces nothing. It
            runs in place of the module's own forward where a fused kernel makes it faster, and only
            in passes that reduce something, because kernels round differently. None if there is
            none.
        call: Run the model on one clip of images ``[S, 3, H, W]`` in [0, 1] and return its output.
            It normalises the images where the model leaves that to its caller.
        call_with_cameras: Run the model like ``call`` with known cameras: extrinsics ``[S, 3, 4]``
            (world to camera, OpenCV) and intrinsics ``[S, 3, 3]`` in pixels. The output is in their
            scale and has them in the place of its own. None if the architecture takes none. It
            raises a FamilyError for a model of the family that takes none.
        predict: Return a Prediction from the model's output and the clip's images
            ``[S, 3, H, W]``. None if the output is not known.
        preprocess: Turn images of any size into the model's input, ``[S, 3, H, W]`` in [0, 1].
            None if the model's own loader is not known.
        reorders: Return why frames may lie in another order in global attention than in the clip,
            from the entry module and its arguments, and how to call the model so that they do not.
            None if they lie as in the clip. A mask is refused otherwise, because it could not be
            placed. ``call`` keeps the order while the root module has the mark `MASKED`.
        patches_overlap: True if a token sees pixels of neighbouring patches, as after a stem of
            convolutions. Which tokens change with a patch then does not tell their order.
        pinhole: False if depth is the distance along rays, and intrinsics are not those of a
            pinhole camera, as with panoramas. Such predictions are not exported to programs that
            expect one, and their frames are not compared with each other.
        metadata: Return integers worth recording: ``patch_size``, ``special_tokens``.
        explain_mismatch: Return why a model that resembles this family but does not match it
            cannot be reduced ("its attention takes ..."). None if it does not resemble it.
        compile_fixes: Return replacements that keep a pass from waiting for the device and a
            compiled graph whole. They change no output and hold while a schedule is applied.
        memory_savers: Return replacements that lower peak memory. They change no output and hold
            while a schedule is applied, unless the user switches them off.
        unread: Return replacements that leave out what no Prediction reads, such as a head. Each
            sets something else in the place of a submodule. They hold in passes of a Runner, and
            change nothing that ``predict`` reads.
        prediction_savers: Return replacements that lower peak memory and change what submodules
            return. They hold in passes of a Runner as long as the memory savers do, and change
            nothing that ``predict`` reads.
        sharding: Return replacements by which several ranks can share one clip: for every part of
            the model but global attention that couples frames, and a refusal of what cannot be
            shared. None if that is not known, and then it is refused.
    """

    name: str
    usage: str
    matches: Callable[[nn.Module], bool]
    attention: Callable[[nn.Module], dict[str, nn.Module]]
    entry: Callable[[nn.Module], nn.Module]
    layout: LayoutFunction
    reduced_forward: Callable[..., Tensor]
    frame_attention: Callable[[nn.Module], Iterable[nn.Module]] = _no_modules
    frame_forward: Callable[..., Tensor] | None = None
    call: Callable[[nn.Module, Tensor], Any] = _call
    call_with_cameras: Callable[[nn.Module, Tensor, Tensor, Tensor], Any] | None = None
    predict: Callable[[Any, Tensor], Prediction] | None = None
    preprocess: Preprocess | None = None
    reorders: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], str | None] = _keeps_order
    patches_overlap: bool = False
    pinhole: bool = True
    metadata: Callable[[nn.Module], dict[str, int]] = _no_metadata
    explain_mismatch: Callable[[nn.Module], str | None] = _no_reason
    compile_fixes: Callable[[nn.Module], Iterable[Replacement]] = _no_replacements
    memory_savers: Callable[[nn.Module], Iterable[Replacement]] = _no_replacements
    unread: Callable[[nn.Module], Iterable[Replacement]] = _no_replacements
    prediction_savers: Callable[[nn.Module], Iterable[Replacement]] = _no_replacements
    sharding: Callable[[nn.Module, Exchange], Iterable[Replacement]] | None = None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that stand for it (``torch.compile``, data-parallel, PEFT).

    A wrapper holds one module and hands attributes on to it, whatever its class is called.
    """
    while True:
        children = list(model.children())
        if len(children) != 1 or not _stands_for_another(model):
            return model
        model = children[0]


def _stands_for_another(module: nn.Module) -> bool:
    kind = type(module)
    return (
        isinstance(module, nn.parallel.DistributedDataParallel)
        or getattr(kind, "__getattr__", None) is not nn.Module.__getattr__
    )


def overridden(module: nn.Module, method: str = "forward") -> bool:
    """Return True if others have replaced a method on the instance, as offloading hooks do.

    A removed hook may leave the class's own method behind on the instance. That does not count, nor
    does a replacement of spark3r's.
    """
    found = module.__dict__.get(method)
    if found is None:
        return False
    if isinstance(found, partial):
        return not (found.func.__module__.startswith("spark3r.") and found.args == (module,))
    own = getattr(type(module), method, None)
    return not (
        getattr(found, "__self__", None) is module and getattr(found, "__func__", None) is own
    )
