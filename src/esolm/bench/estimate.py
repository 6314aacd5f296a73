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
from esolm.feed import Feed
from esolm.inference import Network
from esolm.noise import generator

POINTS = 12  # places of each phase
_DEGREE = 2
_LEAST_SECONDS = 0.1  # of timed evaluations at a place, where the run has so many
_WARM = 8  # steps before the timed ones: threads of the engine fall asleep while a writer is put at its place
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
    """A writer that can be put at any step of its run.

    It keeps what it has found for many steps at once, where that covers the step: to find it again wakes the threads of
    torch, which then keep a core from the engine's for the next evaluations."""

    _known: Feed | None = None
    _share = 0.0  # seconds a step of finding it

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
        self._texts, self._step, known = np.arange(len(self.requests)), step, self._known
        self._feed = known if known is not None and known.first <= step < known.last else None
        if self._cache is not None:
            self._cache.truncate(plans.kept[:, step])
        self._drop_finished()

    def fill(self) -> None:
        """Random keys and values: zeros that nobody has written yet lie in one page of memory and are read too fast."""
        for layer in [] if self._cache is None else [*self._cache.keys, *self._cache.values]:
            layer.normal_(generator=torch.Generator(layer.device).manual_seed(0))

    def look_ahead(self) -> float:
        """Find what the next steps feed, unless it is known. Returns the seconds that this takes of each of them."""
        if self._feed is None or self._step == self._feed.last:
            began = now(self.denoiser.device)
            self._known = self._look_ahead()
            self._share = (now(self.denoiser.device) - began) / (self._known.last - self._known.first)
        return self._share


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
    mean = statistics.fmean(_timed(writer, range(at, at + count), _WARM) for _ in range(passes))
    return Point(phase=phase, place=at + (count - 1) / 2, seconds=mean)


def _timed(writer: Standing, steps: range, warm: int = 0) -> float:
    """Mean seconds of these steps, after the `warm` ones before them. What the sampler finds for many steps at once is
    charged to each by its share."""
    device, spent, first = writer.denoiser.device, 0.0, max(0, steps[0] - warm)
    writer.stand(first)
    for step in range(first, steps.stop):
        share = writer.look_ahead()
        began = now(device)
        writer.advance()
        if step >= steps[0]:
            spent += now(device) - began + share
    return spent / len(steps)
