"""The model that passes run on, with its family and its precision, as one object."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .clips import Clip
from .errors import FamilyError, Spark3rError, first_line
from .families.base import SAVES_MEMORY, Family, Replacement, unwrap
from .families.registry import detect, named_family, root_of
from .identity import describe
from .layout import TokenLayout
from .memory import is_out_of_memory
from .prediction import Prediction

if TYPE_CHECKING:
    from .profile import ModelRecord

T = TypeVar("T")


class AttentionCall(NamedTuple):
    """One call of a global attention module, as it happens in a pass.

    Attributes:
        module: The module.
        args: Its positional arguments, in the precision of the pass.
        kwargs: Its keyword arguments, in the precision of the pass.
        autocast: Precision of the autocast around the call, ``float32`` for none.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype


@dataclass(frozen=True, eq=False)
class Runner:
    """A model, its family and the precision of its passes.

    Everything that runs a model takes a Runner. Functions that users call take ``model, family,
    dtype`` and make one with `Runner.of`.

    Attributes:
        model: The model as it was given, called through its ``torch.compile`` or data-parallel
            wrapper if it has one.
        family: The model's family.
        dtype: Autocast precision of a pass: ``bfloat16`` or ``float16``; ``float32`` turns
            autocast off, so that the parameters' precision counts; None leaves autocast as it is
            around the call.
    """

    model: nn.Module
    family: Family
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        family: Family | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Runner:
        """Return the runner of a model.

        Args:
            model: A model of any family, wrapped or not.
            family: The model's family or the name of one; None recognises it by structure.
            dtype: Autocast precision, see `Runner`.

        Raises:
            FamilyError: If there is no such family, the model is not of it, or None was given and
                no family knows the model.
        """
        if family is None:
            family = detect(model)
        elif isinstance(family, str):
            family = named_family(family)
        runner = cls(model, family, dtype)
        runner.root  # noqa: B018, it is looked for here
        return runner

    @cached_property
    def root(self) -> nn.Module:
        """The model of the family, inside of its wrappers."""
        return root_of(self.model, self.family)

    @property
    def attention(self) -> dict[str, nn.Module]:
        """Global attention modules by qualified name, in the order of a pass."""
        return self.family.attention(self.root)

    @property
    def depth(self) -> int:
        """Number of global attention modules."""
        return len(self.attention)

    @property
    def device(self) -> torch.device:
        """Device that the model computes on, see `device_of`."""
        return device_of(self.model)

    def run(self, images: Tensor, cameras: tuple[Tensor, Tensor] | None = None) -> Any:
        """Return the model's output for one clip, in evaluation mode and without gradients.

        All passes run here. Whatever is computed from their outputs stays outside autocast. Modules
        in training mode are so again afterwards. Outputs that no Prediction reads may be missing.

        Args:
            images: ``[S, 3, H, W]`` in [0, 1], on any device; rounded to the precision of the
                model's parameters.
            cameras: Known extrinsics ``[S, 3, 4]`` and intrinsics ``[S, 3, 3]``, in the scale of
                which the output is; see `Family.call_with_cameras`. None if they are not known.

        Raises:
            FamilyError: If there are cameras, and the model takes none.
            Spark3rError: If the model fails in half precision, or its parameters have no values.
        """
        if cameras is not None and self.family.call_with_cameras is None:
            raise FamilyError(f"models of family '{self.family.name}' take no known cameras")
        device, own = self.device, dtype_of(self.model)
        if device.type == "meta":
            raise Spark3rError(
                f"the parameters of {type(self.root).__name__} are on the meta device, so they "
                "have no values: load its weights before it runs"
            )
        with (
            torch.inference_mode(),
            evaluation_mode(self.model),
            self._without_unread(),
            autocast(device, self.dtype),
        ):
            try:
                given = images.to(device, own)
                if cameras is None or self.family.call_with_cameras is None:
                    return self.family.call(self.model, given)
                return self.family.call_with_cameras(
                    self.model, given, *(each.to(device) for each in cameras)
                )
            except (RuntimeError, TypeError) as error:
                if is_out_of_memory(error):
                    raise
                running = matmul_dtype(own, device)
                if running not in HALF:
                    raise
                raise Spark3rError(_does_not_run(error, own, running, device)) from error

    def _without_unread(self) -> AbstractContextManager[None]:
        """Return the context of a pass: code around the model of the family may read anything."""
        if unwrap(self.model) is not self.root:
            return nullcontext()
        return without_unread(self.root, self.family)

    def predict(self, clip: Clip) -> Prediction:
        """Return the model's prediction of a clip, on the CPU.

        Raises:
            FamilyError: If the family does not know how to read the model's output.
            Spark3rError: If the model fails in half precision.
        """
        read = self.reader
        return read(self.run(clip.images), clip.images).to("cpu")

    @property
    def reader(self) -> Callable[[Any, Tensor], Prediction]:
        """Function from the model's output and its images ``[S, 3, H, W]`` to a prediction.

        Raises:
            FamilyError: If the family does not know how to read the model's output.
        """
        if self.family.predict is None:
            raise FamilyError(
                f"family '{self.family.name}' cannot read the model's output: give its Family a "
                "predict= that makes a spark3r.Prediction of it"
            )
        return self.family.predict

    def record(self, name: str | None = None, weights: str | None = None) -> ModelRecord:
        """Return the model's record, as a profile holds it.

        Args:
            name: Name of the model; None takes the family's.
            weights: Origin of the weights, or None.
        """
        metadata = self.family.metadata(self.root)
        return describe(self.family.name, self.attention, metadata, name=name, weights=weights)

    def layout(self, images: Tensor) -> TokenLayout:
        """Return the token layout of a pass over ``images`` ``[S, 3, H, W]``.

        The pass stops as soon as the family's entry module is called.
        """
        entry = self.family.entry(self.root)
        return self._seen_at(entry, lambda *call: self.family.layout(*call)[1], images)

    def precision(self, images: Tensor) -> torch.dtype:
        """Return the precision of matrix products where global attention begins.

        It is asked inside a pass over ``images`` ``[S, 3, H, W]``, because some models turn
        autocast on themselves (VGGT-Omega). The pass stops at the family's entry module.
        """
        own, device = dtype_of(next(iter(self.attention.values()))), self.device
        entry = self.family.entry(self.root)
        return self._seen_at(entry, lambda *_: matmul_dtype(own, device), images)

    def first_attention_call(self, images: Tensor) -> AttentionCall:
        """Return the call of the first global attention module in a pass of an unpatched model.

        The pass over ``images`` ``[S, 3, H, W]`` stops there, so this also works at a length at
        which a dense pass runs out of memory.
        """
        first, device = next(iter(self.attention.values())), self.device

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
            return AttentionCall(module, args, kwargs, matmul_dtype(torch.float32, device))

        return self._seen_at(first, look, images)

    def _seen_at(
        self,
        module: nn.Module,
        look: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], T],
        images: Tensor,
    ) -> T:
        """Return what ``look`` makes of a module's call in a pass, and stop the pass there."""
        found: list[T] = []

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(look(module, args, kwargs))
            raise _EnoughSeenError

        hook = module.register_forward_pre_hook(leave, with_kwargs=True, prepend=True)
        try:
            self.run(images)
        except _EnoughSeenError:
            pass
        finally:
            hook.remove()
        return found[0]


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model computes on.

    It is that of the first parameter with values, the CPU if there is no parameter. Parameters that
    accelerate's hooks have offloaded are on the meta device; the hooks know where they compute.
    """
    devices = {parameter.device: None for parameter in model.parameters()}
    for device in devices:
        if device.type != "meta":
            return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            where = getattr(each, "execution_device", None)
            if where is not None:
                return torch.device(where)
    return next(iter(devices), torch.device("cpu"))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the block with every module in evaluation mode, each as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


_LEFT_OUT: dict[nn.Module, tuple[int, list[Replacement]]] = {}
_LEFT_OUT_LOCK = threading.Lock()


@contextmanager
def without_unread(root: nn.Module, family: Family) -> Iterator[None]:
    """Run the block without what no Prediction reads, which is there again afterwards.

    While a patch saves memory, intermediate results that a Prediction does not need as they are
    may be missing or have another form, too.

    Blocks may overlap in several threads, and the last one to end restores the model. A call of the
    same model by another thread lacks these outputs meanwhile, as it is in evaluation mode. A graph
    that ``torch.compile`` made outside of such a block still computes them.
    """
    with _LEFT_OUT_LOCK:
        count, replaced = _LEFT_OUT.get(root, (0, []))
        if not count:
            wanted = [*family.unread(root)]
            if SAVES_MEMORY in root.__dict__:
                wanted += family.prediction_savers(root)
            replaced = [each for each in wanted if each[1] not in each[0].__dict__]
        _LEFT_OUT[root] = (count + 1, replaced)
    try:
        for module, name, value in replaced:
            # It hides the submodule of this name, which stays registered.
            module.__dict__[name] = value
        yield
    finally:
        with _LEFT_OUT_LOCK:
            count, replaced = _LEFT_OUT.pop(root)
            if count > 1:
                _LEFT_OUT[root] = (count - 1, replaced)
            else:
                for module, name, _ in replaced:
                    module.__dict__.pop(name, None)


def _does_not_run(
    error: Exception, own: torch.dtype, running: torch.dtype, device: torch.device
) -> str:
    reason = first_line(error)
    if own in HALF:
        return (
            f"the model does not run on {device.type} with its parameters cast to "
            f"{dtype_name(own)} ({reason}): leave them in float32 and let dtype say the "
            "precision, which is autocast"
        )
    return (
        f"the model does not run in {dtype_name(running)} on {device.type} ({reason}): use float32"
    )


class _EnoughSeenError(Exception):
    """Stops a forward pass."""


HALF = (torch.bfloat16, torch.float16)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context that a pass in this precision runs in.

    Args:
        device: Where the model is.
        dtype: ``bfloat16`` or ``float16`` by autocast; ``float32`` for none, so that the
            parameters' precision counts; None leaves autocast as it is around the call.
    """
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype in HALF)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Return the precision in which commands run passes unless they are told another.

    It is half precision on CUDA, as in upstream's own examples: bfloat16, or float16 on cards
    before compute capability 8.0, which lack bfloat16. Elsewhere it is float32.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return torch.float32
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the precision of the module's first floating-point parameter, float32 without one."""
    parameters = (each.dtype for each in module.parameters() if each.is_floating_point())
    return next(parameters, torch.float32)


def matmul_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the precision of a product of ``dtype`` matrices under the current autocast.

    Without autocast that is ``dtype``.
    """
    # The precision is that of a product, because versions of torch differ in how they report it.
    one = torch.ones(1, 1, dtype=dtype, device=device)
    return (one @ one).dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a precision as profiles and command lines have it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
