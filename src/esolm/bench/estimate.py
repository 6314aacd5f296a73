"""The seconds of a whole text from some of its evaluations: timed at evenly spread places of the run, and the curve of
seconds over places, fitted by least squares, summed over all evaluations.

    seconds = sum_{s < steps} c_0 + c_1 s + c_2 s^2       each phase of a run (diffusion, sequential) has its own curve

A writer stands at a place as if it had written up to there, with random tokens and a cache of random keys and values:
an evaluation costs there what it costs in the run. It is the sampler's own writer otherwise. It writes no text.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from esolm import sample
from esolm.algorithms import Algorithm, Request
from esolm.calibrate import now
from esolm.inference import Network
from esolm.noise import generator

POINTS = 12  # places of each phase
_DEGREE = 2
_LEAST_SECONDS = 0.1  # of timed evaluations at a place, where the run has so many
_PLACES = 30  # purpose of random tokens


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The steps `[first, stop)` of a run, whose cost is a smooth curve."""

    first: int
    stop: int

    def places(self, count: int = POINTS) -> list[tuple[int, int]]:
        """`count` parts of equal size, or each step alone if there are fewer."""
        edges = np.linspace(self.first, self.stop, min(count, self.stop - self.first) + 1).round().astype(int).tolist()
        return list(pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class Point:
    """Mean seconds of an evaluation around a place of a phase."""

    phase: Phase
    place: float
    seconds: float


class Standing(sample.Writer):
    """A writer that can be put at any step of its run."""

    @property
    def phases(self) -> list[Phase]:
        """The diffusion steps and the sequential ones, where there are any."""
        sequential = self._plans.sequential[0]
        edges = [0, *((sequential[1:] != sequential[:-1]).nonzero()[0] + 1).tolist(), len(sequential)]
        return [Phase(first=first, stop=stop) for first, stop in pairwise(edges)]

    def stand(self, step: int) -> None:
        """As if all before this step were written, in every text."""
        plans, rng = self._plans, generator(step, _PLACES)
        written = np.arange(self._tokens.shape[1]) < plans.start[:, [step]]
        mask_id = self.denoiser.config.mask_id
        self._tokens = np.where(written, rng.integers(mask_id, size=written.shape), mask_id)
        self._texts, self._step, self._feed = np.arange(len(self.requests)), step, None
        if self._cache is not None:
            self._cache.truncate(plans.kept[:, step])
        self._drop_finished()

    def fill(self) -> None:
        """Random keys and values: zeros that nobody has written yet lie in one page of memory and are read too fast."""
        for layer in [] if self._cache is None else [*self._cache.keys, *self._cache.values]:
            layer.normal_(generator=torch.Generator(layer.device).manual_seed(0))

    def look_ahead(self) -> int:
        """Find what the next steps feed. Returns how many steps that is for."""
        feed = self._look_ahead()
        return feed.last - feed.first


def points(network: Network, method: Algorithm, request: Request) -> Iterator[Point]:
    """Time evaluations of a text at the places of each phase of its run, from the first to the last."""
    writer = Standing(network, method, [request])
    writer.fill()
    for phase in writer.phases:
        for first, stop in phase.places():
            yield _point(writer, phase, range(first, stop), method.length_multiple)


def total(found: Sequence[Point]) -> float:
    """Seconds of the whole run from its points: the sum of the fitted curve of each phase."""
    seconds = 0.0
    for phase in dict.fromkeys(point.phase for point in found):
        places, values = np.array([(point.place, point.seconds) for point in found if point.phase == phase]).T
        curve = np.polynomial.Polynomial.fit(places, values, min(_DEGREE, len(places) - 1))
        seconds += float(curve(np.arange(phase.first, phase.stop)).sum())
    return seconds


def _point(writer: Standing, phase: Phase, part: range, period: int) -> Point:
    """Evaluations in the middle of a part of the run, whole periods (blocks, for BD3-LM) where they fit.

    The first one warms up, unless it is so long that it needs nothing before it.
    """
    middle = part[len(part) // 2]
    first = _timed(writer, range(middle, middle + 1))
    if first >= _LEAST_SECONDS and period == 1:
        return Point(phase=phase, place=float(middle), seconds=first)
    periods = max(1, min(math.ceil(_LEAST_SECONDS / first / period), len(part) // period))
    count = min(periods * period, len(part))
    at = part[(len(part) - count) // 2]
    passes = max(1, round(_LEAST_SECONDS / first / count))
    mean = statistics.fmean(_timed(writer, range(at, at + count)) for _ in range(passes))
    return Point(phase=phase, place=at + (count - 1) / 2, seconds=mean)


def _timed(writer: Standing, steps: range) -> float:
    """Mean seconds of these steps. What the sampler finds for many steps at once is charged to each by its share."""
    device, spent, left, share = writer.denoiser.device, 0.0, 0, 0.0
    writer.stand(steps[0])
    for _ in steps:
        began = now(device)
        if not left:
            left = served = writer.look_ahead()
            share = (now(device) - began) / served
            began = now(device)
        writer.advance()
        spent += now(device) - began + share
        left -= 1
    return spent / len(steps)
