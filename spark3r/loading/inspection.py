"""Checks of checkpoint files before a library reads them.

`torch.load` with ``weights_only`` runs no code of a file, and safetensors holds none. But a small
file can still take a library's memory or hours: a compressed archive that unpacks to gigabytes, a
pickle that is one tuple inside another a million times or that doubles a tuple sixty times, a
header of a million tensors. These checks read as much as the list of tensors needs, and no tensor.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from ..errors import WeightsError

MAX_HEADER = 2**20
"""Most bytes of the list of a safetensors file's tensors. VGGT-1B has a fifth of it."""

MAX_PICKLE = 2**23
"""Most bytes of the pickle in a checkpoint. The tensors are outside of it."""

MAX_STEPS = 500_000
"""Most instructions of that pickle. A tensor takes about 25."""

MAX_DEPTH = 100
"""Most objects inside one another in that pickle. Deeper tuples overflow the stack of Python."""

MAX_SIZE = 10**7
"""Most objects of that pickle, counting an object once per place where it is used."""

_Object = tuple[int, int]  # the number of objects in it, and how many are inside one another
_PLAIN = (1, 1)
_GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_STORING = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_FETCHING = {"GET", "BINGET", "LONG_BINGET"}
_BOUNDS = (pickletools.markobject, pickletools.stackslice)
_EFFECTS = {
    opcode.name: (
        sum(kind not in _BOUNDS for kind in opcode.stack_before),
        pickletools.stackslice in opcode.stack_before,
        len(opcode.stack_after),
    )
    for opcode in pickletools.opcodes
}
"""What each instruction takes off the stack and puts there: see `_taken`, and how many objects."""


def inspect_safetensors(path: Path) -> None:
    """Check the size of a safetensors file's header.

    Raises:
        WeightsError: If the header is larger than that of any model.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < length <= path.stat().st_size:
        raise WeightsError(
            f"{path} lists its tensors in {length} bytes, expected at most {MAX_HEADER}: it is no "
            "checkpoint of a model that spark3r knows"
        )


def inspect_pickled(path: Path) -> None:
    """Check the archive and the pickles of a PyTorch checkpoint.

    Raises:
        WeightsError: If the file is of another kind, compressed, larger inside than outside, or one
            of its pickles is larger or deeper than that of any model.
        ValueError: If a pickle is damaged.
        OSError: If the file cannot be read.
        zipfile.BadZipFile: If the archive is damaged.
    """
    with path.open("rb") as file:
        start = file.read(2)
        if start != b"PK":
            if not start.startswith(b"\x80"):
                raise WeightsError(f"{path} is not a PyTorch checkpoint, in spite of its name")
            file.seek(0)
            # Before torch 1.6: a number, a version and a platform, the object, the storages' keys.
            _inspect(path, io.BytesIO(file.read(MAX_PICKLE)), pickles=5)
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise WeightsError(
                f"{path} is a compressed archive, and torch.save makes none: save the tensors as "
                "safetensors"
            )
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise WeightsError(f"{path} is an archive whose files are larger than itself")
        for entry in entries:
            if not entry.filename.endswith(".pkl"):
                continue
            if entry.file_size > MAX_PICKLE:
                raise _beyond(path, f"of {entry.file_size} bytes, expected at most {MAX_PICKLE}")
            _inspect(path, io.BytesIO(archive.read(entry)), pickles=1)


def _inspect(path: Path, content: io.BytesIO, pickles: int) -> None:
    """Follow the instructions of pickles without making the objects.

    The stack holds the size and depth of each object instead of the object, and None for a mark.
    """
    steps = 0
    memo: dict[int, _Object] = {}
    length = len(content.getbuffer())
    for _ in range(pickles):
        if content.tell() == length:  # torch.load says what is missing
            return
        stack: list[_Object | None] = []
        memo.clear()
        argument: Any
        for opcode, argument, _ in pickletools.genops(content):
            steps += 1
            if steps > MAX_STEPS:
                raise _beyond(path, f"of more than {MAX_STEPS} instructions")
            name = opcode.name
            if name in _STORING:
                memo[len(memo) if argument is None else argument] = _top(stack)
            elif name in _FETCHING:
                stack.append(memo.get(argument, _PLAIN))
            elif name == "MARK":
                stack.append(None)
            else:
                objects, to_mark, made = _EFFECTS[name]
                if not objects and not to_mark:
                    stack += (_PLAIN,) * made
                    continue
                taken = _taken(stack, objects, to_mark)
                size = 1 + sum(size for size, _ in taken)
                levels = [depth for _, depth in taken]
                if name in _GROWING:  # the lowest object takes the others in
                    levels[-1] -= 1
                depth = 1 + max(levels, default=0)
                if size > MAX_SIZE:
                    raise _beyond(path, f"of more than {MAX_SIZE} objects")
                if depth > MAX_DEPTH and made:
                    raise _beyond(path, f"nested more than {MAX_DEPTH} levels deep")
                stack += ((size, depth),) * made


def _top(stack: list[_Object | None]) -> _Object:
    return (stack[-1] if stack else None) or _PLAIN


def _taken(stack: list[_Object | None], objects: int, to_mark: bool) -> list[_Object]:
    """Take off the stack what an instruction takes, and return it from the top down.

    Args:
        stack: The stack.
        objects: Number of objects that it takes.
        to_mark: Whether it first takes everything above the last mark, and the mark.
    """
    taken: list[_Object] = []
    if to_mark:
        while stack and (above := stack.pop()) is not None:
            taken.append(above)
    for _ in range(objects):
        taken.append(_top(stack))
        del stack[-1:]
    return taken


def _beyond(path: Path, what: str) -> WeightsError:
    return WeightsError(
        f"{path} holds a pickle {what}: it is no checkpoint of a model that spark3r knows"
    )
