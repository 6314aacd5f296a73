"""What the steps between two lines of the journal add up to: losses by term and by noise level, speed, memory.

    loss                    mean over the steps of the sum of the terms, nats a token
    loss_diffusion, ...     mean over the steps of each term, where there are several
    loss_by_noise/0.3-0.4   nats a masked token, of the rows whose time lies there (t = 0: clean, t = 1: all noise)

`Levels` is what one step gives and adds up over micro batches and ranks. It decides nothing and prints nothing.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from esolm.algorithms.algorithm import View

NUM_LEVELS = 10
LOSS_BY_NOISE = "loss_by_noise/"


@dataclass(frozen=True)
class Levels:
    """For each of `NUM_LEVELS` equal parts of [0, 1]: the sum of `weights * nll` of rows with times there, and of their
    weights. The tensor may be added up over ranks."""

    sums: Float64[Tensor, "2 level"] = field(default_factory=lambda: torch.zeros(2, NUM_LEVELS, dtype=torch.float64))

    def add(self, view: View, weighted: Float[Tensor, "batch row"]) -> None:
        """A view and `weights * nll` of its rows, as `objective.of_view` gives them."""
        if view.times is None:
            return
        weights = view.weights.cpu()
        rows = weights.nonzero(as_tuple=True)
        level = (view.times.expand(weights.shape)[rows] * NUM_LEVELS).long().clamp_(0, NUM_LEVELS - 1)
        for sums, values in zip(self.sums, (weighted.cpu(), weights), strict=True):
            sums.index_add_(0, level, values[rows].double())


class Tally:
    """Sums of some steps; `figures` gives their means and begins anew."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._begin()

    def add(self, terms: Mapping[str, float], levels: Levels, seconds: float) -> None:
        """One step: its terms in nats a token, its losses by noise level, and how long it took."""
        self._steps += 1
        self._seconds += seconds
        self._levels += levels.sums
        for term, value in terms.items():
            self._terms[term] = self._terms.get(term, 0.0) + value

    def figures(self) -> dict[str, float]:
        """Means since the last call; nothing if there was no step."""
        if not self._steps:
            return {}
        terms = {f"loss_{term}": value / self._steps for term, value in self._terms.items()}
        found = {"loss": sum(terms.values()), **(terms if len(terms) > 1 else {})}
        for level, (nats, weight) in enumerate(self._levels.T.tolist()):
            if weight:
                found[level_name(level)] = nats / weight
        if self._seconds > 0:
            found["tokens_per_second"] = self._tokens_per_step * self._steps / self._seconds
        self._begin()
        return found

    def _begin(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._terms: dict[str, float] = {}
        self._levels = Levels().sums


def level_name(level: int) -> str:
    """The figure of one part of [0, 1]."""
    return f"{LOSS_BY_NOISE}{level / NUM_LEVELS:.1f}-{(level + 1) / NUM_LEVELS:.1f}"


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of the GPU's memory, or resident in the machine's. 0 if nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
