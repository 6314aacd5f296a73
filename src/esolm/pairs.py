"""Sums of gradients in pairs: the same bits, however many ranks share the summands.

    portions of a batch    0   1   2   3        four ranks: each has one, and their sums are added in these pairs
                            \\ /     \\ /         two ranks: 0 + 1 and 2 + 3, and then both
                             +       +          one rank: all of it
                              \\_____/
                                 +

What is added is rounded, so the order of additions counts. This one is the same for every number of ranks that have
equally many of the portions, one after another, and as many as a power of two. It sends nothing (ranks.py).
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

Tensors = dict[Any, Tensor]


class Pairs:
    """A sum of tensors by name that are given one after another; of n of them it keeps no more than log2 n + 1."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Tensors]] = []  # with the number of summands in each: falling powers of two

    def give(self, summand: Tensors) -> None:
        """One more summand. It belongs to the sum from now on, which may be made in its place."""
        count = 1
        while self._held and self._held[-1][0] == count:
            summand, count = _added(self._held.pop()[1], summand), 2 * count
        self._held.append((count, summand))

    def take(self) -> Tensors:
        """The sum; what is given next begins another."""
        found: Tensors = {}
        while self._held:
            found = _added(self._held.pop()[1], found)
        return found


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, in the place of one of them."""
    pairs = Pairs()
    for part in parts:
        pairs.give({"": part})
    return pairs.take()[""]


def taken(model: nn.Module) -> Tensors:
    """The gradients of a network by parameter; it has none any more."""
    found = {parameter: parameter.grad for parameter in model.parameters() if parameter.grad is not None}
    for parameter in found:
        parameter.grad = None
    return found


def _added(left: Tensors, right: Tensors) -> Tensors:
    """A name that only one of them has is taken from that one."""
    return left | {name: left[name].add_(part) if name in left else part for name, part in right.items()}
