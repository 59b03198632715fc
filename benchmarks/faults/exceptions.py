"""Exceptions at every step of applying, removing and pausing a schedule, and of a pass.

    python benchmarks/faults/exceptions.py --output benchmarks/results/faults_exceptions.json
    python benchmarks/faults/exceptions.py --share 0.01

A step is a line of spark3r's code as it runs, or, in a pass, the call of any module. At each of
them a RuntimeError is raised, and a KeyboardInterrupt, on the stand-in of every family. Afterwards
the model must be what it was, or, if the schedule was being removed, what it was without it:
attributes, hooks, classes' forwards, parameters and outputs, to the last bit, and no pass may be
taken for a running one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from linecache import getline
from pathlib import Path
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import spark3r
from spark3r.patching.handle import Handle

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
from family_cases import ALL_CASES, Case, build, images, reducing, run

from faults.outcome import finish, outcome_parser

PACKAGE = str(Path(spark3r.__file__).parent)
CASES = tuple(case for case in ALL_CASES if not case.needs)
ERRORS = (RuntimeError, KeyboardInterrupt)
EVERY = 50
"""Steps between two comparisons of outputs. All else is compared after every step."""


class Steps:
    """Counts steps, and raises an error at one of them."""

    def __init__(self, error: BaseException | None = None, at: int = -1) -> None:
        self.error, self.at, self.count = error, at, 0

    def take(self) -> None:
        """Take one step."""
        self.count += 1
        if self.error is not None and self.count - 1 == self.at:
            raise self.error

    @contextmanager
    def lines(self) -> Iterator[None]:
        """Take a step at each line of spark3r's code that runs in the block."""
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        path, before = frame.f_code.co_filename, 0

        def line(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal before
            # Python comes back to the line of a with statement to leave it. No signal is handled
            # between the block and its end, which releases a lock.
            back = frame.f_lineno < before and getline(path, frame.f_lineno).strip()[:5] == "with "
            before = frame.f_lineno
            if event == "line" and not back:
                self.take()
            return line

        return line if path.startswith(PACKAGE) else None

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Take a step at each call of a module in the block."""
        hook = register_module_forward_pre_hook(lambda module, inputs: self.take())
        try:
            yield
        finally:
            hook.remove()


@dataclass
class Subject:
    """A model under test.

    Attributes:
        model: The model.
        clip: A clip for it.
        layers: Number of its global attention layers.
    """

    model: nn.Module
    clip: Tensor
    layers: int

    def apply(self) -> Handle:
        """Apply a schedule."""
        return spark3r.apply(self.model, reducing(self.layers))

    def apply_another(self) -> Handle:
        """Apply a schedule that does something else."""
        return spark3r.apply(self.model, reducing(self.layers, query=1))

    def remove(self) -> None:
        """Remove the schedule."""
        spark3r.remove(self.model)

    def pause(self) -> None:
        """Enter a block of `disabled` and leave it."""
        with self.model.__dict__["_spark3r_handle"].disabled():
            pass

    def forward(self) -> None:
        """Run a pass."""
        run(self.model, self.clip)


def subject(case: Case) -> Subject:
    """Return a family's stand-in with a clip."""
    clip = images(case, 3, rows=1, columns=2)
    return Subject(deepcopy(build(case)), clip, case.layers)


ACTIONS: dict[str, tuple[bool, Callable[[Subject], object]]] = {
    "apply": (False, Subject.apply),
    "apply in place of another": (True, Subject.apply_another),
    "remove": (True, Subject.remove),
    "disabled": (True, Subject.pause),
    "forward, lines": (True, Subject.forward),
    "forward, modules": (True, Subject.forward),
}
"""By name: whether a schedule is applied before, and the action."""


def described(value: object) -> object:
    """Return what is compared of an attribute, equal for objects that do the same."""
    if isinstance(value, partial):
        return ("partial", value.func, tuple(map(id, value.args)))
    if isinstance(value, MethodType):
        return ("method", id(value.__self__), value.__func__)
    if type(value).__name__ == "_Place":
        return ("place", id(vars(value)["patch"]), vars(value)["index"])
    if isinstance(value, dict) and not value:
        return None
    if isinstance(value, dict):
        # Hooks are kept by numbers, which are new whenever they are registered.
        return [(isinstance(key, str) and key, described(each)) for key, each in value.items()]
    if isinstance(value, Tensor):
        return (id(value), value.data_ptr(), value._version)
    return value if isinstance(value, str | int | float | tuple | frozenset) else id(value)


def state(subject: Subject) -> list[object]:
    """Return everything that an action could leave behind on a model, its handle's state too."""
    found: list[object] = []
    for module in subject.model.modules():
        found += [type(module), type(module).forward, described(vars(module))]
    handle = subject.model.__dict__.get("_spark3r_handle")
    if handle is not None:
        running = handle._passes.are_running()
        found += [handle._enabled, len(handle._pauses), len(handle._undo), running]
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Return True if two outputs are equal to the last bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


def sweep(subject: Subject, name: str, kind: type[BaseException], share: float) -> dict[str, Any]:
    """Raise an error at every step of an action, or at a share of them; return what was wrong."""
    patched_before, action = ACTIONS[name]
    steps_of = Steps.modules if name.endswith("modules") else Steps.lines

    def prepare() -> None:
        subject.remove()
        if patched_before:
            subject.apply()

    prepare()
    subject.forward()  # fills upstream's caches
    counter = Steps()
    with steps_of(counter):
        action(subject)
    faults: list[str] = []
    subject.remove()
    plain, dense = state(subject), run(subject.model, subject.clip)
    weights = {key: value.clone() for key, value in subject.model.state_dict().items()}
    prepare()
    output = run(subject.model, subject.clip)
    before = state(subject)
    raised = 0
    for number, step in enumerate(range(0, counter.count, max(1, round(1 / share)))):
        steps = Steps(kind("injected"), step)
        try:
            with steps_of(steps):
                action(subject)
            if steps.count > step:
                faults.append(f"step {step}: the error was swallowed")
            else:  # something was cached since the steps were counted
                prepare()
                before = state(subject)
                continue
        except kind as error:
            if error is not steps.error:
                faults.append(f"step {step}: another error: {error}")
        except BaseException as error:
            faults.append(f"step {step}: {type(error).__name__}: {error}")
        raised += 1
        found = state(subject)
        removed = action is Subject.remove and found == plain
        if found != before and not removed:
            faults.append(f"step {step}: the model is another")
        if number % EVERY == 0 or found != before:
            expected = dense if removed else output
            if not same(run(subject.model, subject.clip), expected):
                faults.append(f"step {step}: other outputs")
            subject.remove()
            if state(subject) != plain or not same(run(subject.model, subject.clip), dense):
                faults.append(f"step {step}: not restored")
            prepare()
            before = state(subject)
    after = subject.model.state_dict()
    if any(not torch.equal(after[key], value) for key, value in weights.items()):
        faults.append("parameters changed")
    subject.remove()
    return {"steps": counter.count, "raised": raised, "faults": faults}


def run_all(cases: tuple[Case, ...], share: float) -> list[dict[str, Any]]:
    """Return one row per family, action and kind of error."""
    rows = []
    for case in cases:
        under_test = subject(case)
        for name in ACTIONS:
            for kind in ERRORS:
                result = sweep(under_test, name, kind, share)
                row = {"model": case.name, "action": name, "error": kind.__name__} | result
                print(*row.values(), file=sys.stderr)
                rows.append(row)
    return rows


def main() -> int:
    """Run all sweeps and return 1 if something was wrong."""
    parser = outcome_parser((__doc__ or "").splitlines()[0], "the steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = run_all(CASES, options.share)
    faults = [fault for row in rows for fault in row["faults"]]
    total = {"raised": sum(row["raised"] for row in rows), "faults": len(faults)}
    return finish(total | {"rows": rows}, faults, options.output)


if __name__ == "__main__":
    sys.exit(main())
