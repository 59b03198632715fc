"""The operators: how a layer merges its queries and prunes its keys and values.

An operator is one frozen dataclass. `KEY_VALUE_OPERATORS`, `QUERY_OPERATORS` and `UNMERGINGS` are
the registries that profiles and messages read names from.

Schedules and profiles are read without torch, so methods that need it import it themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..checks import integer, require_boolean, require_choice, require_fraction
from ..errors import ScheduleError
from ..layout import TokenLayout

if TYPE_CHECKING:
    from torch import Tensor

    from .merging import MergePlan
    from .pruning import KeySelection

OPERATORS_REVISION = 3
"""Revision of the operators' definitions. It is raised whenever the result of one changes, so that
older evidence can be told apart."""

PAPER_GROUP = 20
"""Frames per query-merging group, G in Spark3R §IV-B."""


@dataclass(frozen=True)
class Unmerging(ABC):
    """A way from the outputs of merged queries to the outputs of all tokens.

    Attributes:
        name: Name in `UNMERGINGS`.
        fits_map: Whether it fits a map in each pass, which the latency model charges for.
    """

    name: ClassVar[str]
    fits_map: ClassVar[bool] = False

    @abstractmethod
    def unmerge(
        self, query: Tensor, merged: Tensor, output: Tensor, places: Tensor, plan: MergePlan
    ) -> Tensor:
        """Return the outputs of all tokens, ``[B, H, N, D]`` in the dtype of ``output``.

        Args:
            query: Queries before merging, ``[B, H, N, D]``.
            merged: Merged queries, ``[B, H, K, D]``.
            output: Attention output of the merged queries, ``[B, H, K, D]``.
            places: Place of every token in the merged sequence, ``[B, N]`` int64.
            plan: Merge plan that the places come from.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return the operator in words, as tables and reports show it."""


@dataclass(frozen=True)
class CopyUnmerging(Unmerging):
    """All tokens of a merged query share its output (Spark3R §IV-B)."""

    name: ClassVar[str] = "copy"

    def unmerge(
        self, query: Tensor, merged: Tensor, output: Tensor, places: Tensor, plan: MergePlan
    ) -> Tensor:
        """Return the output of each token's place; see `Unmerging.unmerge`."""
        from . import merging

        return merging.copy_back(output, places)

    def describe(self) -> str:
        """Return ``copied back``."""
        return "copied back"


@dataclass(frozen=True)
class LinearUnmerging(Unmerging):
    """A linear map, fitted in the pass, gives tokens of a merged query different outputs again.

    See `unmerging` for the mathematics and docs/method/queries.md for the choice of the defaults.

    Attributes:
        compared_per_feature: Destinations compared, in multiples of the H·D numbers of a query.
        partners: Number of destinations that each is compared with.
        ridge: Ridge of the regression, as a share of the mean over features of the summed squared
            differences.
    """

    name: ClassVar[str] = "linear"
    fits_map: ClassVar[bool] = True
    compared_per_feature: int = 4
    partners: int = 2
    ridge: float = 0.1

    def unmerge(
        self, query: Tensor, merged: Tensor, output: Tensor, places: Tensor, plan: MergePlan
    ) -> Tensor:
        """Return the output of each token's place, moved by the map; see `Unmerging.unmerge`."""
        from . import unmerging

        slope = self.fit(merged, output, plan)
        return unmerging.move_by_map(query, merged, output, places, slope)

    def fit(self, merged: Tensor, output: Tensor, plan: MergePlan) -> Tensor:
        """Return the fitted map, ``[B, H·D, H·D]``; see `unmerging.fit`."""
        from . import unmerging

        pairs = unmerging.similar_pairs(merged, plan, self.compared_per_feature, self.partners)
        return unmerging.fit(merged, output, *pairs, self.ridge, plan.pool)

    def describe(self) -> str:
        """Return ``linear unmerging``."""
        return "linear unmerging"


UNMERGINGS: dict[str, Unmerging] = {
    each.name: each for each in (CopyUnmerging(), LinearUnmerging())
}


@dataclass(frozen=True)
class QueryMerging:
    """Merge query patches inside groups of consecutive frames (Spark3R §IV-B).

    One patch in r is a destination; every other patch joins the most similar destination of its
    group. Special tokens are never merged.

    Attributes:
        group: Frames per group, G.
        merge_anchor: Whether the anchor frame's patches take part.
        unmerge: Name in `UNMERGINGS` of the way back to all tokens.

    Raises:
        ScheduleError: If a value is out of range.
    """

    name: ClassVar[str] = "intra_group"

    group: int = PAPER_GROUP
    merge_anchor: bool = True
    unmerge: str = CopyUnmerging.name

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", integer(self.group, "group"))
        require_boolean(self.merge_anchor, "merge_anchor")
        require_choice(self.unmerge, "unmerge", UNMERGINGS)

    @property
    def unmerging(self) -> Unmerging:
        """The way back to all tokens."""
        return UNMERGINGS[self.unmerge]

    @property
    def values(self) -> tuple[Any, ...]:
        """The constructor's arguments as plain constants, which a tracing compiler can fold."""
        return _plain(self)

    def destinations(self, frames: int, height: int, width: int, factor: int) -> Tensor:
        """Return which patches of one group are destinations, ``[frames, height * width]`` bool.

        Args:
            frames: Frames of the group.
            height: Rows of the patch grid.
            width: Columns of the patch grid.
            factor: Query factor r.
        """
        from . import lattice

        return lattice.residues(frames, height, width, factor) == 0

    def plan(self, layout: TokenLayout, factor: int) -> MergePlan:
        """Return the merge plan of a layout, on the CPU.

        Args:
            layout: Token layout of the clip.
            factor: Query factor r.
        """
        from . import merging

        group = min(self.group, layout.frames)
        destinations = self.destinations(group, layout.height, layout.width, factor)
        return merging.make_plan(layout, destinations, group, merge_anchor=self.merge_anchor)

    def length(self, layout: TokenLayout, factor: int) -> int:
        """Return the number of queries after merging, without listing them."""
        from . import merging

        group = min(self.group, layout.frames)
        chosen = self.destinations(group, layout.height, layout.width, factor).sum(dim=1)
        return merging.merged_length(layout, chosen, group, merge_anchor=self.merge_anchor)

    def features(self, query: Tensor) -> Tensor:
        """Return what matching compares of queries ``[B, H, N, D]``: ``[B, N, C]``.

        It is their mean over heads, in float32, or in float64 for float64 queries.
        """
        from . import merging

        return merging.head_mean(query)

    def describe(self) -> str:
        """Return the operator in words, such as ``merged in groups of 4, linear unmerging``.

        The paper's group and anchor frame are not mentioned.
        """
        words = "merged" if self.group == PAPER_GROUP else f"merged in groups of {self.group}"
        aside = "" if self.merge_anchor else ", anchor frame left alone"
        return f"{words}{aside}, {self.unmerging.describe()}"


@dataclass(frozen=True)
class KeyValuePruning(ABC):
    """Keep some tokens among the keys and values of a layer.

    A subclass is one operator: a frozen dataclass with a `name` that says which patches stay.

    Attributes:
        name: Name in `KEY_VALUE_OPERATORS`.
        whole_frames: Whether patches of one frame stay or go together; figures mark it.
        by_content: Whether `kept_patches` speaks of slots, and not of frames: `diversity` says in
            each pass which frame is in which slot. The anchor is then in slot 0.
        keep_special: Whether the special tokens of every frame stay; otherwise those of every r-th
            frame do.
        keep_anchor: Whether the whole anchor frame stays.
        mass_correction: Strength β in [0, 1] of the bias β·log(tokens stood for / tokens kept) on
            the logits of thinned patches, and of thinned special tokens; 0 switches it off, 1
            restores their share of the softmax.

    Raises:
        ScheduleError: If a value is out of range.
    """

    name: ClassVar[str]
    whole_frames: ClassVar[bool] = False
    by_content: ClassVar[bool] = False

    keep_special: bool = False
    keep_anchor: bool = False
    mass_correction: float = 0.0

    def __post_init__(self) -> None:
        require_boolean(self.keep_special, "keep_special")
        require_boolean(self.keep_anchor, "keep_anchor")
        require_fraction(self.mass_correction, "mass_correction")
        object.__setattr__(self, "mass_correction", float(self.mass_correction))

    @property
    def values(self) -> tuple[Any, ...]:
        """The constructor's arguments as plain constants, which a tracing compiler can fold."""
        return _plain(self)

    @abstractmethod
    def kept_patches(self, layout: TokenLayout, factor: int) -> Tensor:
        """Return which patches stay, ``[S, h * w]`` bool on the CPU.

        The result may depend on nothing but the arguments: it is cached per layout.

        Args:
            layout: Token layout of the clip.
            factor: Key-value factor r, at most `largest_factor`.
        """

    def largest_factor(self, layout: TokenLayout) -> int:
        """Return the largest factor that a layout allows: one patch in each frame stays."""
        return layout.patches

    def kept_per_frame(self, layout: TokenLayout, factor: int) -> Tensor:
        """Return how many patches of each frame stay, ``[S]`` int64 on the CPU.

        Override it where they can be counted without listing them.
        """
        return self.kept_patches(layout, factor).sum(dim=1)

    def select(self, layout: TokenLayout, factor: int) -> KeySelection:
        """Return the tokens that stay, on the CPU.

        An operator overrides it, together with `length`, only if patches, special tokens and anchor
        frame do not say all about what stays.
        """
        from . import pruning

        return pruning.thinned(
            layout,
            factor,
            self.kept_patches(layout, factor),
            keep_special=self.keep_special,
            keep_anchor=self.keep_anchor,
            mass_correction=self.mass_correction,
        )

    def length(self, layout: TokenLayout, factor: int) -> int:
        """Return the number of tokens that stay, without listing them where nothing is masked."""
        from . import pruning

        if layout.masked is not None:
            return self.select(layout, factor).length
        return pruning.thinned_length(
            layout,
            factor,
            self.kept_per_frame(layout, factor),
            keep_special=self.keep_special,
            keep_anchor=self.keep_anchor,
        )

    def describe(self) -> str:
        """Return the operator in words, such as ``token stride + anchor, β 1``."""
        words = self.name.replace("_", " ")
        words += " + special tokens" * self.keep_special + " + anchor" * self.keep_anchor
        return words + (f", β {self.mass_correction:g}" if self.mass_correction else "")


@dataclass(frozen=True)
class TemporalStride(KeyValuePruning):
    """Keep every r-th frame (Spark3R §IV-C)."""

    name: ClassVar[str] = "temporal_stride"
    whole_frames: ClassVar[bool] = True

    def kept_patches(self, layout: TokenLayout, factor: int) -> Tensor:
        """Return all patches of every r-th frame, from frame 0 on."""
        import torch

        kept = torch.zeros(layout.frames, layout.patches, dtype=torch.bool, device="cpu")
        kept[::factor] = True
        return kept

    def largest_factor(self, layout: TokenLayout) -> int:
        """Return the number of frames: frame 0 stays."""
        return layout.frames


@dataclass(frozen=True)
class DiverseFrames(TemporalStride):
    """Keep as many frames as `TemporalStride`: the anchor, and those farthest from each other.

    Frames are compared by the layer's own input, see `diversity`. It is for clips whose frames do
    not follow one path: unordered photos, several cameras.
    """

    name: ClassVar[str] = "diverse_frames"
    by_content: ClassVar[bool] = True


@dataclass(frozen=True)
class TokenStride(KeyValuePruning):
    """Keep every r-th patch of each frame, at a phase that moves from frame to frame."""

    name: ClassVar[str] = "token_stride"

    def kept_patches(self, layout: TokenLayout, factor: int) -> Tensor:
        """Return the patches of the lattice; see `lattice`."""
        from . import lattice

        return lattice.residues(layout.frames, layout.height, layout.width, factor) == 0

    def kept_per_frame(self, layout: TokenLayout, factor: int) -> Tensor:
        """Return how many patches of the lattice lie in each frame."""
        import torch

        from . import lattice

        frame = torch.arange(layout.frames, device="cpu")
        return lattice.members(frame, layout.height, layout.width, factor)


QUERY_OPERATORS: dict[str, type[QueryMerging]] = {QueryMerging.name: QueryMerging}
KEY_VALUE_OPERATORS: dict[str, type[KeyValuePruning]] = {
    TemporalStride.name: TemporalStride,
    TokenStride.name: TokenStride,
    DiverseFrames.name: DiverseFrames,
}


@dataclass(frozen=True)
class Operators:
    """How queries are merged, and how keys and values are pruned. The defaults are the paper's.

    Attributes:
        query: Operator of the queries.
        key_value: Operator of the keys and values.

    Raises:
        ScheduleError: If one is no operator.
    """

    query: QueryMerging = field(default_factory=QueryMerging)
    key_value: KeyValuePruning = field(default_factory=TemporalStride)

    def __post_init__(self) -> None:
        if not isinstance(self.query, QueryMerging):
            raise ScheduleError(f"query is {self.query!r}, expected QueryMerging(...)")
        if not isinstance(self.key_value, KeyValuePruning):
            known = ", ".join(f"{each.__name__}(...)" for each in KEY_VALUE_OPERATORS.values())
            raise ScheduleError(f"key_value is {self.key_value!r}, expected one of: {known}")

    def describe(self) -> str:
        """Return the operators in words, such as ``token stride + anchor, β 1, linear``."""
        words, unmerge = self.key_value.describe(), self.query.unmerge
        return words if unmerge == QueryMerging.unmerge else f"{words}, {unmerge}"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the operators as plain values, for tables and profiles.

        Each is an object with its ``name`` and its fields, such as ``{"name": "token_stride",
        "keep_anchor": true, ...}``.

        Raises:
            ScheduleError: If an operator is not registered, so that it could not be read again.
        """
        return {
            "query": _recorded(self.query, QUERY_OPERATORS),
            "key_value": _recorded(self.key_value, KEY_VALUE_OPERATORS),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Operators:
        """Return the operators that `to_dict` wrote. A missing field has its default.

        Raises:
            ScheduleError: If an operator or a field is unknown, or a value out of range.
        """
        return cls(
            _read(values["query"], "query operator", QUERY_OPERATORS),
            _read(values["key_value"], "key-value operator", KEY_VALUE_OPERATORS),
        )


Kind = TypeVar("Kind", QueryMerging, KeyValuePruning)


def _recorded(operator: Kind, registry: Mapping[str, type[Kind]]) -> dict[str, Any]:
    if registry.get(operator.name) is not type(operator):
        raise ScheduleError(
            f"{type(operator).__name__} is not registered as '{operator.name}', expected one of: "
            f"{', '.join(registry)}. Add it to the registry in spark3r.reduction.operators"
        )
    return {"name": operator.name, **asdict(operator)}


def _read(values: Mapping[str, Any], what: str, registry: Mapping[str, type[Kind]]) -> Kind:
    own = dict(values)
    name = own.pop("name", None)
    require_choice(name, what, registry)
    make: Callable[..., Kind] = registry[str(name)]
    known = [each.name for each in fields(registry[str(name)])]
    for key in own:
        if key not in known:
            raise ScheduleError(
                f"{what} '{name}' has no field '{key}', expected only: {', '.join(known)}"
            )
    return make(**own)


def _plain(operator: QueryMerging | KeyValuePruning) -> tuple[Any, ...]:
    return tuple(_constant(getattr(operator, each.name)) for each in fields(operator))


def _constant(value: Any) -> Any:
    # A compiler takes a number that changed since its last graph for a symbol. Neither call changes
    # the value, and both make the symbol a number again.
    if type(value) is int:
        return index(value)
    return float.fromhex(value.hex()) if type(value) is float else value
