"""Memory of a pass, counted by tracing it without numbers.

A copy of the model runs on torch's meta device, where tensors have shapes and no values. The bytes
of every storage are added when it is made and subtracted when it is freed, as a GPU's allocator
would. So the count needs no GPU, takes no memory, and is the same on every machine.

Half precision follows the rules of autocast on CUDA (`_LOWER`, `_WIDER`), and weights that are cast
stay until the cache of autocast is cleared. Fused attention counts as its inputs and its
output. The CUDA context, workspaces of kernels and fragmentation are not counted. Where a fused
kernel of spark3r runs on a GPU, a pass needs less than is counted, because the plain steps are.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import Spark3rError, first_line
from .families.base import Family
from .families.parts.limits import NONE, Limits, limited
from .families.parts.recognition import unwrapped
from .meta import autocast_followed, on_meta
from .patching.apply import apply
from .runner import HALF, Runner, evaluation_mode, without_unread
from .schedule import Schedule

WEIGHTS, CAST_WEIGHTS, INPUT = "weights", "cast weights", "input"
ENCODER, FRAME, GLOBAL, FEATURES, HEADS = (
    "encoder",
    "frame attention",
    "global attention",
    "features",
    "heads",
)
PARTS = (WEIGHTS, CAST_WEIGHTS, INPUT, ENCODER, FRAME, GLOBAL, FEATURES, HEADS)
"""Parts of a count. A tensor belongs to the part whose module made it. Features are made between
the blocks: normalised images, positions, and the tokens that are kept for the heads."""

_HOST = "host"
_ENCODERS = ("patch_embed", "encoder")


@dataclass(frozen=True)
class MemoryCount:
    """Memory of one pass at its peak.

    Attributes:
        frames: Length of the clip.
        parts: Bytes that are alive at the peak, by part; see `PARTS`.
        where: Qualified name of the module that runs then.
        host: Bytes of what waits on the host, where `Limits` put it there, at their own peak.
        lowered: Names of the parameters that the pass only reads after a cast to half precision.
    """

    frames: int
    parts: dict[str, int]
    where: str
    host: int = 0
    lowered: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def extra(self) -> int:
        """Bytes above the loaded model and clip, as `spark3r.memory.peak_extra_mb` measures."""
        return self.total - self.parts[WEIGHTS] - self.parts[INPUT]


def count_memory(
    model: nn.Module,
    frames: int,
    image_size: tuple[int, int],
    *,
    schedule: Schedule | None = None,
    dtype: torch.dtype | None = None,
    family: Family | str | None = None,
    save_memory: bool = True,
    prediction: bool = True,
    reading: bool = False,
    limits: Limits = NONE,
    half_weights: Collection[str] = (),
) -> MemoryCount:
    """Return the memory that a pass over one clip needs, without running it.

    Args:
        model: A model on any device, the meta device too. It is copied without its values, and
            stays as it is.
        frames: Length of the clip, S.
        image_size: Height and width of its images in pixels.
        schedule: The schedule; None counts a dense pass.
        dtype: Autocast precision as on CUDA, ``bfloat16`` or ``float16``; None or ``float32`` for
            none.
        family: The model's family or the name of one; None recognises it.
        save_memory: False leaves out the family's memory savers.
        prediction: False also counts outputs that no Prediction reads.
        reading: True also counts the Prediction that is made of the output.
        limits: Limits of the pass.
        half_weights: Names of the parameters that are stored in ``dtype``.

    Raises:
        FamilyError: If no family knows the model.
        PatchError: If the schedule does not fit the model.
        Spark3rError: If the model does not take images of this size, or does not run without
            values, for example because what it does depends on them.
    """
    runner = Runner.of(on_meta(model), family)
    root = runner.root
    rules = Schedule.dense(runner.depth) if schedule is None else schedule
    images = torch.empty(frames, 3, *image_size, device="meta")
    running = dtype if dtype in HALF else None
    for name in half_weights:
        parameter = root.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
    read = runner.family.predict if reading else None
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of shapes that the schedule was not measured on
        stack.enter_context(
            apply(root, rules, family=runner.family, save_memory=save_memory, guard=False)
        )
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(root))
        if prediction:
            stack.enter_context(without_unread(root, runner.family))
        stack.enter_context(limited(limits))
        count = _Count(root, images, running)
        _follow(root, runner.family, count)
        stack.enter_context(autocast_followed(count))
        stack.enter_context(torch.device("meta"))  # for tensors whose device a model leaves open
        stack.enter_context(_Functions(count))
        stack.enter_context(count)
        try:
            # The first pass makes what later ones find in caches, such as index plans.
            for _ in range(2):
                count.reset()
                output = runner.family.call(root, images)
                if read is not None:
                    read(output, images)
                del output
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            raise Spark3rError(
                f"the memory of {type(root).__name__} cannot be counted, because its pass over "
                f"{frames} frames of {image_size[1]}x{image_size[0]} pixels does not run without "
                f"values ({first_line(error)})"
            ) from error
    lowered = tuple(name for name, each in root.named_parameters() if count.only_lowered(each))
    return MemoryCount(frames, count.at_peak(), count.peak_place, count.host_peak, lowered)


class _Functions(TorchFunctionMode):
    """A context in which attention is fused, and convolutions follow a count's precision.

    Attention makes its output and nothing else, as fused kernels do. Convolutions compare the
    precisions of their arguments before a dispatch mode sees them.
    """

    def __init__(self, count: _Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, half = kwargs or {}, self.count.half
        if half is not None and func in _AUTOCAST:
            args, kwargs = self.count.cast(half, args, kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, _, value = args[:3]
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


_AUTOCAST = {
    F.scaled_dot_product_attention,
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}


def _names(*names: str) -> frozenset[str]:
    return frozenset(names)


_LOWER = _names(
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "addbmm", "convolution", "_convolution"
)  # fmt: skip
_WIDER = _names(
    *("native_layer_norm", "native_group_norm", "_softmax", "_log_softmax", "exp", "expm1"),
    *("log", "log2", "log10", "log1p", "pow", "rsqrt", "reciprocal", "acos", "asin", "tan"),
    *("norm", "linalg_vector_norm", "cumsum", "cumprod", "prod", "sum", "softplus"),
)
"""Operators that autocast on CUDA runs in half precision, and in float32
(https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior)."""


class _Count(TorchDispatchMode):
    """Adds up the bytes of living storages, and remembers them by part at their peak.

    Args:
        root: The model.
        images: The input.
        half: Precision of autocast; None for none.
    """

    def __init__(self, root: nn.Module, images: Tensor, half: torch.dtype | None) -> None:
        super().__init__()
        self.half = half
        self.parts: list[str] = [FEATURES]
        self.places: list[str] = [""]
        self._makes_new: dict[Any, bool] = {}
        self._known: dict[Any, tuple[Any, list[Any]]] = {}
        self._lowered: set[int] = set()
        self._read_whole: set[int] = set()
        weights = (*root.parameters(), *root.buffers())
        self._weights = {t.untyped_storage()._cdata: t.untyped_storage() for t in weights}
        self._images = images.untyped_storage()
        self.reset()

    def reset(self) -> None:
        """Begin a count, with weights and input alive."""
        self.peak_place = ""
        self._cast: dict[tuple[int, torch.dtype], Tensor] = {}
        self._seen: set[int] = {*self._weights, self._images._cdata}
        self._alive: dict[str, int] = dict.fromkeys(PARTS, 0)
        self._alive[WEIGHTS] = sum(each.nbytes() for each in self._weights.values())
        self._alive[INPUT] = self._images.nbytes()
        self._total = self._peak = sum(self._alive.values())
        self._snapshot = dict(self._alive)
        self._on_host: set[int] = set()
        self._host = self.host_peak = 0

    def only_lowered(self, parameter: Tensor) -> bool:
        """Return True if the passes read a parameter only after a cast to half precision."""
        key = parameter.untyped_storage()._cdata
        return key in self._lowered - self._read_whole

    def at_peak(self) -> dict[str, int]:
        """Return the bytes that were alive at the peak, by part."""
        return dict(self._snapshot)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in given:
            self._add(leaf.untyped_storage(), FEATURES)  # unless it is known, it was cached
        moves = func is torch.ops.aten._to_copy.default and _is_cpu(kwargs.get("device"))
        if moves:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if self.half is not None:
            name = func.overloadpacket.__name__
            if name in _LOWER:
                args, kwargs = self.cast(self.half, args, kwargs)
            elif name in _WIDER:
                args, kwargs = self.cast(torch.float32, args, kwargs)
        output = self._run(func, args, kwargs)
        # What is made of tensors on the host alone is made there.
        on_host = moves or (
            bool(given) and all(each.untyped_storage()._cdata in self._on_host for each in given)
        )
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), _HOST if on_host else self.parts[-1])
        if self._makes_new[func]:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self._read_whole.add(leaf.untyped_storage()._cdata)
        return output

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return an operator's output, of known form if it ran on such arguments before.

        Most operators work out the form of their output in Python, and a long clip runs the same
        pieces over and over.
        """
        makes = self._makes_new.get(func)
        if makes is None:
            schema = func._schema
            aliases = (*schema.arguments, *schema.returns)
            makes = all(each.alias_info is None for each in aliases)
            # Its schema does not say that it returns a view.
            makes = makes and func is not torch.ops.aten._unsafe_view.default
            self._makes_new[func] = makes
        if not makes:
            return func(*args, **kwargs)
        key = (func, _form(args), _form(tuple(kwargs.items())))
        made = self._known.get(key)
        if made is None:
            output = func(*args, **kwargs)
            listed = output if isinstance(output, (tuple, list)) else (output,)
            if all(isinstance(each, Tensor) and each.device.type == "meta" for each in listed):
                self._known[key] = (
                    None if isinstance(output, Tensor) else type(output),
                    [(each.shape, each.stride(), each.dtype) for each in listed],
                )
            return output
        kind, forms = made
        new = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in forms
        ]
        return new[0] if kind is None else kind(new)

    def cast(self, dtype: torch.dtype, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return an operator's arguments in a precision, as autocast casts them.

        Whole weights are cast once, until `forget_casts`.
        """

        def one(tensor: Tensor) -> Tensor:
            if tensor.dtype not in (torch.float32, *HALF) or tensor.dtype == dtype:
                return tensor
            storage = tensor.untyped_storage()
            key, items = (storage._cdata, dtype), storage.nbytes() // tensor.element_size()
            if dtype in HALF:
                self._lowered.add(storage._cdata)
            if key[0] not in self._weights or tensor.numel() != items:
                return self._made(self.parts[-1], tensor.shape, dtype)
            if key not in self._cast:
                self._cast[key] = self._made(CAST_WEIGHTS, (items,), dtype)
            return self._cast[key].as_strided(tensor.shape, tensor.stride())

        return tree_map_only(Tensor, one, args), tree_map_only(Tensor, one, kwargs)

    def forget_casts(self) -> None:
        """Free the weights that were cast, as ``torch.clear_autocast_cache`` does."""
        self._cast.clear()

    def _made(self, part: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.parts.append(part)  # for a call that comes back here through the dispatcher
        made = torch.empty(shape, dtype=dtype, device="meta")
        self._add(made.untyped_storage(), part)
        self.parts.pop()
        return made

    def _add(self, storage: torch.UntypedStorage, part: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        weakref.finalize(storage, self._drop, key, size, part)
        if part == _HOST:
            self._on_host.add(key)
            self._host += size
            self.host_peak = max(self.host_peak, self._host)
            return
        self._alive[part] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self.peak_place = self._total, self.places[-1]
            self._snapshot = dict(self._alive)

    def _drop(self, key: int, size: int, part: str) -> None:
        if key in self._seen:  # it may be of an earlier pass
            self._seen.remove(key)
            if part == _HOST:
                self._on_host.discard(key)
                self._host -= size
                return
            self._alive[part] -= size
            self._total -= size


def _is_cpu(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _form(value: Any) -> Any:
    """Return what an operator's output on the meta device depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_form(each) for each in value)
    return type(value), value


def _follow(root: nn.Module, family: Family, count: _Count) -> None:
    """Let a count know which module runs. The model is a copy, so its hooks are never removed.

    Layers inside a block get no hook, because families slice the weights of plain layers only.
    """
    part_of = part_of_modules(root, family)
    for name, module in root.named_modules():
        part = part_of.get(module)
        if part is None and next(module.children(), None) is None:
            continue

        def begin(
            module: nn.Module, args: object, name: str = name, part: str | None = part
        ) -> None:
            count.places.append(name)
            count.parts.append(part or count.parts[-1])

        def end(module: nn.Module, args: object, output: object) -> None:
            count.places.pop()
            count.parts.pop()

        module.register_forward_pre_hook(begin, prepend=True)
        module.register_forward_hook(end, always_call=True)


def part_of_modules(root: nn.Module, family: Family) -> dict[nn.Module, str]:
    """Return the part of each module that begins one. What is inside a module belongs to it."""
    entry, whole = family.entry(root), set(family.attention(root).values())
    parts: dict[nn.Module, str] = {}
    trunk = set(entry.modules())
    for module in root.modules():
        if module not in trunk:
            if not _holds(module, entry):
                parts[module] = HEADS
        elif isinstance(attn := getattr(module, "attn", None), nn.Module):
            parts[module] = GLOBAL if unwrapped(attn, "qkv") in whole else FRAME
    for name, child in (*root.named_children(), *entry.named_children()):
        if name in _ENCODERS:
            parts |= dict.fromkeys(child.modules(), ENCODER)
    for name, child in entry.named_children():
        is_encoder = name in _ENCODERS
        if entry is root and not is_encoder and not whole & set(child.modules()):
            parts |= dict.fromkeys(child.modules(), HEADS)
    return parts


def _holds(module: nn.Module, sought: nn.Module) -> bool:
    return any(each is sought for each in module.modules())
