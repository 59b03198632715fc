"""Stages of a command: what a terminal shows, and how the layers of a pass are counted."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest
import torch
from torch import nn

from spark3r.cli.progress import LayerProgress, counted
from spark3r.cli.stages import Stages, _progress_line
from spark3r.cli.termination import Terminated


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def layers(number: int) -> list[nn.Module]:
    return [nn.Linear(2, 2) for _ in range(number)]


def test_layers_are_counted_and_the_hooks_go() -> None:
    modules = layers(3)
    with counted(modules, torch.device("cpu")) as progress:
        assert (progress.done, progress.total, progress.left_s) == (0, 3, None)
        for number, module in enumerate(modules, 1):
            module(torch.ones(2))
            assert progress.done == number
    assert not any(module._forward_hooks for module in modules)
    with pytest.raises(RuntimeError, match="halfway"), counted(modules, torch.device("cpu")):
        raise RuntimeError("halfway")
    assert not any(module._forward_hooks for module in modules)


def test_the_time_left_follows_the_layers_that_are_done() -> None:
    clock = Clock()
    progress = LayerProgress(5, torch.device("cpu"), clock=clock)
    lines = []
    for _ in range(5):
        clock.now += 10
        progress._count(nn.Identity(), (), None)
        clock.now += 2
        lines.append(_progress_line("dense pass", clock.now - 100, progress))
    # 12 s from one layer to the next, 2 s of which are over.
    assert lines == [
        "dense pass, 12 s, layer 1 of 5",
        "dense pass, 24 s, layer 2 of 5, about 34 s left",
        "dense pass, 36 s, layer 3 of 5, about 22 s left",
        "dense pass, 48 s, layer 4 of 5, about 10 s left",
        "dense pass, 60 s, heads",
    ]


def test_the_heads_are_foretold_by_an_earlier_pass() -> None:
    """A pass of 100 frames after one of 2: encoder and heads take 50 times as long, layers more."""
    clock, earlier = Clock(), None
    for encoder_s, layer_s, heads_s in ((0.5, 0.25, 0.125), (25.0, 100.0, 6.25)):
        modules, left = layers(4), []
        with counted(modules, torch.device("cpu"), earlier, clock) as progress:
            for module in modules:
                clock.now += encoder_s if module is modules[0] else layer_s
                module(torch.ones(2))
                left.append(progress.left_s)
            clock.now += heads_s
        earlier = progress
    assert left == [None, 206.25, 106.25, 6.25]


class Event:
    """An event of a GPU that is reached when the test says so."""

    made: list[Event]

    def __init__(self) -> None:
        self.reached = False
        self.stream: object = None
        Event.made.append(self)

    def record(self, stream: object) -> None:
        self.stream = stream

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        raise AssertionError("the device was waited for")


def test_on_a_gpu_a_layer_counts_when_its_event_has_happened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = Clock()
    progress = LayerProgress(3, torch.device("cuda:1"), clock=clock)
    for _ in range(3):
        progress._count(nn.Identity(), (), None)
    assert progress.done == 0
    assert [event.stream for event in Event.made] == ["stream of cuda:1"] * 3
    clock.now, Event.made[0].reached = 107.0, True
    assert progress.done == 1
    clock.now, Event.made[1].reached = 110.0, True
    assert (progress.done, progress.left_s) == (2, 3.0)
    Event.made[2].reached = True
    assert progress.done == 3


@pytest.mark.slow  # it imports the compiler
def test_a_compiled_graph_is_not_broken_by_the_hooks() -> None:
    model = nn.Sequential(*layers(2))
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with counted(list(model), torch.device("cpu")) as progress:
        compiled(torch.ones(2))
    assert progress.done == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_stage_and_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    clock, modules, terminal = Clock(), layers(2), Terminal()
    with contextlib.redirect_stderr(terminal):
        stages = Stages(clock=clock)
        with stages("dense", modules):
            modules[0](torch.ones(2))
            clock.now += 7
        assert "spark3r: dense pass, 7 s, layer 1 of 2" in terminal.getvalue()
        assert terminal.getvalue().endswith("spark3r: dense pass: done after 7.0 s\n")
        with stages("write"):
            pass
    assert "writing" not in terminal.getvalue()  # it took less than a second


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_where_no_line_can_be_redrawn_there_is_one_at_the_start_and_no_hook(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    modules, shown = layers(2), stream()
    with contextlib.redirect_stderr(shown), Stages()("reduced", modules):
        assert not any(module._forward_hooks for module in modules)
        assert shown.getvalue() == "spark3r: reduced pass\n"


def test_a_stage_that_fails_or_is_interrupted_is_logged() -> None:
    clock, log = Clock(), io.BytesIO()
    stages = Stages(log, clock)

    def fail(error: BaseException) -> None:
        with stages("read"):
            clock.now += 3
            raise error

    for raised in (ValueError("no such thing\nand more"), KeyboardInterrupt(), Terminated()):
        with pytest.raises(type(raised)):
            fail(raised)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(line["stage"], line["seconds"], line["error"]) for line in lines] == [
        ("read", 3.0, "no such thing"),
        ("read", 3.0, "interrupted"),
        ("read", 3.0, "terminated"),
    ]


def test_a_log_that_fills_the_disk_does_not_end_the_work(capsys: pytest.CaptureFixture) -> None:
    class Full(io.RawIOBase):
        def write(self, line: bytes) -> int:
            return len(line) - 1

    class Gone(io.RawIOBase):
        def write(self, line: bytes) -> int:
            raise OSError(28, "No space left on device")

    for log in (Full(), Gone()):
        stages = Stages(log)
        with stages("read"):
            pass
        with stages("write"):
            pass
        told = capsys.readouterr().err
        assert told.count("the log cannot be written any more (No space left on device)") == 1
