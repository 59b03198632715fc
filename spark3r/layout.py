"""Token layout: how the N tokens of a global sequence split into frames and kinds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import index

from .errors import LayoutError


@dataclass(frozen=True)
class TokenLayout:
    """The order of tokens in one global-attention sequence.

    Frames follow one another. Each holds its special tokens (camera, registers) and then its
    patches row by row; with ``special_last`` the patches come first. ``tail`` tokens follow after
    all frames (MapAnything's scale token).

    Attributes:
        frames: Number of frames S, at least 1.
        height: Rows of the patch grid.
        width: Columns of the patch grid.
        special: Special tokens per frame.
        special_last: Whether a frame's special tokens stand after its patches.
        tail: Number of tokens after all frames.
        anchor_frame: Number of the frame that has special tokens of its own (VGGT: 0), or None
            (π³).
        masked: One byte per patch, frame by frame and row by row: 1 for a patch that no query
            attends to. None masks nothing.

    Raises:
        LayoutError: If a count is out of range.
    """

    frames: int
    height: int
    width: int
    special: int = 0
    special_last: bool = False
    tail: int = 0
    anchor_frame: int | None = None
    masked: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # A compiled graph's symbolic size becomes a number here, because selections depend on it.
        for name in ("frames", "height", "width", "special", "tail"):
            try:
                object.__setattr__(self, name, index(getattr(self, name)))
            except TypeError:
                raise LayoutError(
                    f"{name} is {getattr(self, name)!r}, expected an integer"
                ) from None
        if self.frames < 1 or self.height < 1 or self.width < 1:
            raise LayoutError(
                f"a layout needs at least one frame and one patch, got {self.frames} frames "
                f"of {self.height}x{self.width} patches"
            )
        if self.special < 0 or self.tail < 0:
            raise LayoutError(
                f"token counts cannot be negative, got {self.special} special, {self.tail} tail"
            )
        if self.anchor_frame is not None and not 0 <= self.anchor_frame < self.frames:
            raise LayoutError(
                f"anchor frame {self.anchor_frame} lies outside the clip's {self.frames} frames"
            )
        if self.masked is not None and len(self.masked) != self.frames * self.patches:
            raise LayoutError(
                f"masked has {len(self.masked)} patches, expected {self.frames * self.patches}"
            )

    @property
    def patches(self) -> int:
        """Patches per frame, h·w."""
        return self.height * self.width

    @property
    def tokens_per_frame(self) -> int:
        """Tokens per frame P, special tokens and patches."""
        return self.special + self.height * self.width

    @property
    def patch_start(self) -> int:
        """Offset of the first patch inside a frame."""
        return 0 if self.special_last else self.special

    @property
    def fields(self) -> tuple[int, int, int, int, bool, int, int | None, bytes | None]:
        """The constructor's arguments as plain constants, for a compiler that traces."""
        return (
            index(self.frames),
            index(self.height),
            index(self.width),
            index(self.special),
            self.special_last,
            index(self.tail),
            None if self.anchor_frame is None else index(self.anchor_frame),
            self.masked,
        )

    @property
    def unmasked(self) -> TokenLayout:
        """The same layout without a mask."""
        return self if self.masked is None else replace(self, masked=None)

    @property
    def tokens(self) -> int:
        """Length N of the whole sequence."""
        return self.frames * self.tokens_per_frame + self.tail
