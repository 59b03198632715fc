"""A CUDA device that exists in name only: passes are traced on it without a GPU.

Under torch's FakeTensorMode a tensor has a shape, a precision and a device, and no values. So code
takes the branches that it takes on CUDA, and every operator that it runs is seen. A CPU build of
torch needs help for that, which `_on_cuda` gives. A trace does not show what happens inside
kernels, nor which of its kernels a library chooses.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from cuda_functions import CUDA, REPLACED
from device_traces import Attention, Launch, Trace
from device_waits import COPIES, waits
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import spark3r
from spark3r import Schedule, TokenLayout
from spark3r.families.base import Family
from spark3r.families.parts import projection, rotary
from spark3r.families.parts.memory import queries_in_pieces
from spark3r.families.registry import detect
from spark3r.kernels import forced, grouped_attention, nearest, norm_rope
from spark3r.reduction import plans
from spark3r.reduction.rule import ResolvedRule
from spark3r.runner import autocast, without_unread

IS_TRIED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether this version of torch is one that these fakes were tried with."""

MODE = FakeTensorMode()
CPU = torch.device("cpu")


def traced(
    model: nn.Module,
    schedule: Schedule,
    clip: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = True,
    without_heads: bool = False,
) -> Trace:
    """Return what a pass of a model from `fake_model` does on CUDA.

    Args:
        model: The model.
        schedule: Schedule of its layers.
        clip: Frames, height and width of the images.
        dtype: Autocast precision; ``float32`` for none.
        fused: Whether spark3r's fused kernels run, or the plain implementations.
        without_heads: Whether the family's entry module runs alone.
    """
    family = detect(model)
    weights = {each.untyped_storage()._cdata for each in model.parameters()}
    recorder = _Recorder(weights)
    frames, height, width = clip
    with (
        _on_cuda(recorder),
        _kernels(dtype, fused),
        _followed(model, recorder),
        spark3r.apply(model, schedule),
        without_unread(model, family),
        autocast(CUDA, dtype),
    ):
        images = torch.empty(frames, 3, height, width, device=CUDA)
        if without_heads:
            family.entry(model)(images[None])
        else:
            family.call(model, images)
    return recorder.trace


def traced_call(function: Callable[..., object], *tensors: Tensor) -> Trace:
    """Return what a function does on CUDA with tensors of some forms."""
    recorder = _Recorder(set())
    with _on_cuda(recorder):
        function(*map(_to_fake, tensors))
    return recorder.trace


def traced_layer(
    family: Family,
    attn: nn.Module,
    layout: TokenLayout,
    rule: ResolvedRule,
    *arguments: object,
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = True,
    save_memory: bool = True,
) -> Trace:
    """Return what one reduced layer does on CUDA.

    Args:
        family: Family of the layer.
        attn: Attention module from `fake_model`.
        layout: Token layout of the clip.
        rule: Rule of the layer.
        arguments: What the family's ``reduced_forward`` is given after the hidden states.
        dtype: Autocast precision; ``float32`` for none.
        fused: Whether spark3r's fused kernels run, or the plain implementations.
        save_memory: Whether its queries run in pieces, as with the family's memory savers.
    """
    recorder = _Recorder({each.untyped_storage()._cdata for each in attn.parameters()})
    width = attn.get_parameter("proj.weight").shape[1]
    with ExitStack() as stack:
        for module, name, value in queries_in_pieces(attn) if save_memory else ():
            stack.enter_context(patch.dict(module.__dict__, {name: value}))
        stack.enter_context(_on_cuda(recorder))
        stack.enter_context(_kernels(dtype, fused))
        stack.enter_context(autocast(CUDA, dtype))
        hidden = torch.empty(1, layout.tokens, width, device=CUDA)
        family.reduced_forward(attn, layout, rule, hidden, *arguments)
    return recorder.trace


def fake_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model, in evaluation mode, whose weights are fake and on CUDA."""
    copy = deepcopy(model).eval()
    for module in copy.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                # One that needs a gradient would need CUDA's own code.
                module._parameters[name] = nn.Parameter(_to_fake(weight), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = _to_fake(value)
        for known in _known_positions(module):
            known.clear()  # they have values, on the CPU
    return copy


def _known_positions(module: nn.Module) -> list[dict[Any, Any]]:
    getter = getattr(module, "position_getter", getattr(module, "pos_getter", None))
    names = ("position_cache", "cache_positions")
    return [getattr(getter, name) for name in names if hasattr(getter, name)]


def _to_fake(tensor: Tensor) -> Tensor:
    """Return a fake tensor on CUDA of another one's form."""
    with MODE:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)


def _launches(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Return True if an operator launches kernels: it runs on CUDA, and makes no view."""
    if func.overloadpacket.__name__ in _MAKES_NO_VALUES or not outputs:
        return False
    returns = func._schema.returns
    is_view = any(each.alias_info and not each.alias_info.is_write for each in returns)
    return not is_view and any(map(_is_on_cuda, (*inputs, *outputs)))


def _is_on_cuda(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


_MAKES_NO_VALUES = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "_unsafe_view", "_reshape_alias", "lift_fresh"),
}


class _Recorder(TorchDispatchMode):
    """Records what runs on the device.

    Args:
        weights: Storages of the model's weights.
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.trace, self.places = Trace(), [""]
        self._weights, self._cast = weights, set[tuple[int, int]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "device":
            return func(*args, **kwargs)
        reason = None if name in COPIES else waits(func, args, kwargs, None)
        if reason and "index_put" not in name:
            raise AssertionError(f"{_caller()}: {reason}")  # there is no value to go on with
        output = func(*args, **kwargs)
        if name in COPIES:
            reason = waits(func, args, kwargs, output)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if name.startswith("_scaled_dot_product"):
            self.note_attention(name, *args[:3], None)
        if reason or (_launches(func, inputs, outputs) and not self._is_in_cache(name, inputs)):
            shapes = [tuple(tuple(each.shape) for each in part) for part in (inputs, outputs)]
            code = _caller() if reason else ""
            self.trace.launches.append(Launch(name, self.places[-1], *shapes, reason, code))
        return output

    def _is_in_cache(self, name: str, inputs: list[Tensor]) -> bool:
        """Return True if autocast would find this cast of a whole weight in its cache.

        It does not cache fake weights, because they need no gradient.
        """
        if name != "_to_copy" or inputs[0]._is_view():
            return False
        key = inputs[0].untyped_storage()._cdata, inputs[0].numel()
        known = key in self._cast
        if key[0] in self._weights:
            self._cast.add(key)
        return known

    def note_attention(
        self, name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> None:
        dtypes, lengths = (query.dtype, key.dtype, value.dtype), (query.shape[2], key.shape[2])
        of_mask = None if mask is None else mask.dtype
        self.trace.attention.append(Attention(name, self.places[-1], dtypes, of_mask, *lengths))


_TORCH = str(Path(torch.__file__).parent)
_FAKES = __file__, str(Path(__file__).with_name("cuda_functions.py"))


def _caller() -> str:
    """Return file and line of the innermost code that is neither torch's nor the fakes'."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in _FAKES and not file.startswith((_TORCH, "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _Functions(TorchFunctionMode):
    """A context in which functions that need CUDA's own code run without it.

    Attention is one operator, as it is where a fused kernel runs.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = REPLACED.get(func)
        if func is F.scaled_dot_product_attention:
            replacement = self._attention
        if replacement is None or not _is_on_cuda(args[0]):
            return func(*args, **kwargs)
        return replacement(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        self._recorder.note_attention("sdpa", query, key, value, attn_mask)
        calls = len(self._recorder.trace.attention)
        if torch.is_autocast_enabled("cuda"):
            half = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(half), key.to(half), value.to(half)
            attn_mask = None if attn_mask is None else attn_mask.to(half)
        aten: Any = torch.ops.aten
        if attn_mask is None and query.dtype != torch.float32:
            output = aten._scaled_dot_product_flash_attention(query, key, value)[0]
        else:
            mask = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
            operator = aten._scaled_dot_product_efficient_attention
            output = operator(query, key, value, mask, False)[0]
        del self._recorder.trace.attention[calls:]
        return output


def _is_plain_linear(module: nn.Module) -> bool:
    """Return what the runtime's own function returns of the real module.

    A fake parameter is an instance of nn.Parameter, but its type is FakeTensor.
    """
    is_plain = type(module) is nn.Linear and type(module.weight) is FakeTensor
    return is_plain and projection.is_unhooked(module)


def _made_once(home: Any, name: str) -> Any:
    """Return a patch that lets a cached function run on the CPU, unseen.

    What is cached is made before the passes that count. Its tensors are fake.
    """
    build: Callable[..., Any] = getattr(home, name)

    def make(*key: Any) -> Any:
        on_cpu = [CPU if isinstance(each, torch.device) else each for each in key]
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            found = build(*on_cpu)
            if isinstance(found, tuple):
                return tuple(_to_fake(each) if isinstance(each, Tensor) else each for each in found)
            tensors = {name: each for name, each in vars(found).items() if isinstance(each, Tensor)}
            return replace(found, **{name: _to_fake(each) for name, each in tensors.items()})

    return patch.object(home, name, make)


_CACHED = (
    *((plans, "_build_selection"), (plans, "_build_plan")),
    *((rotary, "_build"), (rotary, "_build_all_positions")),
)


@contextmanager
def _on_cuda(recorder: _Recorder) -> Iterator[None]:
    """Let code run on fake tensors as it would on CUDA, and record it."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        enter(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        enter(patch("torch.cuda.is_bf16_supported", lambda *_: True))
        enter(patch.object(Tensor, "as_subclass", lambda tensor, kind: tensor))  # it has its class
        enter(patch.object(projection, "is_plain_linear", _is_plain_linear))
        for home, name in _CACHED:
            enter(_made_once(home, name))
        enter(MODE)
        enter(torch.device(CUDA))
        enter(_Functions(recorder))
        enter(recorder)
        enter(torch.no_grad())  # inference mode would hide what composed operators consist of
        yield


@contextmanager
def _kernels(dtype: torch.dtype, fused: bool) -> Iterator[None]:
    """Use spark3r's fused kernels, or none of them."""
    join = "efficient" if dtype == torch.float32 else "flash"  # flash has no float32
    with (
        forced(grouped_attention.OPERATION, join if fused else grouped_attention.MASK),
        forced(norm_rope.OPERATION, norm_rope.TRITON if fused else norm_rope.PLAIN),
        forced(nearest.OPERATION, nearest.TRITON if fused else nearest.PLAIN),
    ):
        if fused and find_spec("triton") is None:
            _register_without_triton()
        yield


def _register_without_triton() -> None:
    """Define the fused operators, which have a shape and nothing to launch."""
    for kernel in (norm_rope, nearest):
        name = f"{kernel.__name__}_triton"
        stub: Any = types.ModuleType(name)
        stub.launch = _is_not_there
        with patch.dict(sys.modules, {name: stub}):
            kernel._register()


def _is_not_there(*_: Any) -> Tensor:
    raise ModuleNotFoundError("Triton is not installed")


@contextmanager
def _followed(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let a recorder know which attention module runs."""
    hooks: list[Any] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "attn":

            def begin(module: nn.Module, args: object, name: str = name) -> None:
                recorder.places.append(name)

            def end(module: nn.Module, args: object, output: object) -> None:
                recorder.places.pop()

            hooks.append(module.register_forward_pre_hook(begin))
            hooks.append(module.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
