"""Parts of a model that couple frames, on one rank's frames of a clip that several share.

Each replacement asks the exchange whether a pass is shared, and is the module's own forward if it
is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...errors import FamilyError
from ...reduction.exchange import Exchange
from ...reduction.rule import ResolvedRule
from ...reduction.sharding import sharded
from ..base import Replacement, overridden
from .recognition import names_used

_DENSE = ResolvedRule()


def on_whole_clip(
    module: nn.Module, exchange: Exchange, whole: Callable[[Any], Any]
) -> Iterator[Replacement]:
    """Yield what lets a head see some tokens of all frames, and return its own frames.

    Args:
        module: Head whose first argument has the tokens, and whose output is one tensor
            ``[B, S, ...]``, or a list of them.
        exchange: The exchange.
        whole: Function from that argument to the argument for the whole clip.
    """
    yield module, "forward", partial(_on_whole_clip, module, exchange, whole)


def _on_whole_clip(
    self: nn.Module,
    exchange: Exchange,
    whole: Callable[[Any], Any],
    tokens: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if exchange.layout is None:
        return type(self).forward(self, tokens, *args, **kwargs)
    found = type(self).forward(self, whole(tokens), *args, **kwargs)
    return (
        [exchange.own(each) for each in found] if isinstance(found, list) else exchange.own(found)
    )


def special_of_last(exchange: Exchange, special: int, layers: Any) -> list[Tensor]:
    """Return the special tokens of the last layer of the whole clip, ``[B, S, special, C]``.

    Args:
        exchange: The exchange.
        special: Number of special tokens per frame to gather.
        layers: Tokens of the layers of this rank, ``[B, s, P, C]``.
    """
    return [exchange.gather(layers[-1][:, :, :special])]


def special_tokens_attend(
    attn: nn.Module, exchange: Exchange, special: int, reduced_forward: Callable[..., Tensor]
) -> Iterator[Replacement]:
    """Yield what lets an attention over the special tokens of all frames gather their keys.

    Args:
        attn: The attention module.
        exchange: The exchange.
        special: Special tokens per frame.
        reduced_forward: The family's, see `Family`.
    """
    yield attn, "forward", partial(_special_tokens, attn, exchange, special, reduced_forward)


def _special_tokens(
    self: nn.Module,
    exchange: Exchange,
    special: int,
    reduced_forward: Callable[..., Tensor],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    layout = exchange.layout
    if layout is None:
        return type(self).forward(self, *args, **kwargs)
    # The last special token stands for the patches that a layout needs.
    whole = replace(layout.shard.whole, height=1, width=1, special=special - 1)
    own = sharded(replace(layout.shard, whole=whole))
    return reduced_forward(self, own, _DENSE, *args, **kwargs)


def refuse_unlike(head: nn.Module, uses: tuple[str, ...], what: str) -> None:
    """Raise an error if a head is not of the version of upstream's code that ranks can share.

    Args:
        head: The head.
        uses: Names that the forward of the known version uses, in the order of their first use.
        what: What it is, in words.

    Raises:
        FamilyError: If the forward uses others, or the instance has one of its own.
    """
    if names_used(head, "forward") != uses or overridden(head):
        raise FamilyError(
            f"the model's {what} ({type(head).__name__}) is of an unknown version, which may "
            "couple frames in another way, so several processes cannot share a clip"
        )


def refused(module: nn.Module, exchange: Exchange, what: str) -> Iterator[Replacement]:
    """Yield what refuses a module that couples frames in a way that ranks cannot share.

    Args:
        module: The module.
        exchange: The exchange.
        what: What it is, in words.
    """
    yield module, "forward", partial(_refused, module, exchange, what)


def _refused(self: nn.Module, exchange: Exchange, what: str, *args: Any, **kwargs: Any) -> Any:
    if exchange.layout is None:
        return type(self).forward(self, *args, **kwargs)
    raise FamilyError(f"{what}, which several ranks cannot share: run it in one process")
