"""Orders of a text: which position stands at which rank; applied, undone, and chosen for diffusion to write.

`order[b, r]` is the position written at rank `r`. `Positions` is the place to add an order of your own: a subclass with
one method. It knows no network.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from esolm.schedule import reveal_counts

_ROUNDING = 1e-9  # 3 / 0.3 must count as 10


def by_group(
    group: Int64[Tensor, "batch length"], key: Float64[Tensor, "batch length"]
) -> Int64[Tensor, "batch length"]:
    """Positions sorted by `group` and, inside a group, by `key` in [0, 1): random keys shuffle, `ramp` keeps reading
    order."""
    return torch.argsort(group.double() + key, dim=-1, stable=True)


def ramp(length: int) -> Float64[Tensor, "length"]:
    """Keys in [0, 1) that grow with the position: left to right."""
    return torch.arange(length, dtype=torch.float64) / length


def apply(values: Shaped[Tensor, "batch length"], order: Int64[Tensor, "batch rank"]) -> Shaped[Tensor, "batch rank"]:
    """Values from reading order to generation order."""
    return values.gather(1, order)


def undo(
    values: Shaped[Tensor, "batch length"], order: Int64[Tensor, "batch length"]
) -> Shaped[Tensor, "batch length"]:
    """Values from generation order back to reading order."""
    return torch.empty_like(values).scatter_(1, order, values)


@dataclass(frozen=True, kw_only=True)
class Positions(ABC):
    """Which positions diffusion writes, and which of them together. Subclass it to write in an order of your own."""

    @abstractmethod
    def choose(
        self, free: np.ndarray, alpha_0: float, num_steps: int | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """From the `free` positions (ascending) choose those that diffusion writes.

        Returns them in the order of writing, and the number that each step writes; the rest is left to the sequential
        phase. `alpha_0` is the expected share to choose; `num_steps=None` means one position a step.
        """

    def chosen(
        self, free: np.ndarray, alpha_0: float, num_steps: int | None, rng: np.random.Generator, *, every: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `choose` gives, as int64. ValueError unless it is free positions, each once (`every` one of them, if
        nothing is written otherwise), and how many of them each step writes."""
        written, counts = (np.asarray(numbers) for numbers in self.choose(free, alpha_0, num_steps, rng))
        whole = all(numbers.dtype.kind in "iu" or not numbers.size for numbers in (written, counts))
        free_once = len(np.unique(written)) == len(written) and bool(np.isin(written, free).all())
        if not (whole and free_once and counts.sum() == len(written) and (counts >= 0).all()):
            raise ValueError(
                f"{type(self).__name__}.choose must give free positions, each once, and how many of them each step "
                f"writes, all of them together; got {written} and {counts}"
            )
        if every and len(written) < len(free):
            raise ValueError(
                f"{type(self).__name__}.choose left {len(free) - len(written)} positions, and diffusion alone writes "
                "here: choose all where alpha_0 is 1"
            )
        return written.astype(np.int64), counts.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Uniform(Positions):
    """Uniformly at random, with the random counts of `reveal_counts`: the sampler of the paper."""

    def choose(
        self, free: np.ndarray, alpha_0: float, num_steps: int | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        counts = reveal_counts(len(free), alpha_0, num_steps, rng)
        return rng.permutation(free)[: counts.sum()], counts


@dataclass(frozen=True, kw_only=True)
class Interleaved(Positions):
    """Every s-th position together (Eso-LM, appendix E.10): a step's positions are far apart, so that they depend less
    on each other. With `T` steps the stride is `T / alpha_0`, rounded down, and `T` strides are taken in random order.
    Where the rounding makes them too many, the surplus is taken from them at random, so that `alpha_0` is met.

        stride 4:   0 . . . 0 . . . 0 . . .      then  . . 2 . . . 2 . . . 2 .      then ...
    """

    def choose(
        self, free: np.ndarray, alpha_0: float, num_steps: int | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}: leave it out for one token a step")
        if num_steps is None or num_steps >= alpha_0 * len(free):  # so many that each writes one position
            count = math.floor(alpha_0 * len(free) + rng.random())
            return rng.permutation(free)[:count], np.ones(count, dtype=np.int64)
        stride = math.floor(num_steps / alpha_0 + _ROUNDING)
        groups = [free[first::stride] for first in rng.permutation(stride)[:num_steps]]
        chosen, step = np.concatenate(groups), np.repeat(np.arange(num_steps), [len(group) for group in groups])
        count = math.floor(len(chosen) * min(1.0, alpha_0 * stride / num_steps) + rng.random())
        kept = np.sort(rng.permutation(len(chosen))[:count])
        return chosen[kept], np.unique(step[kept], return_counts=True)[1]
