"""How the time of a training step grows with width, length, vocabulary and ranks, beside the growth of what it counts.

    seconds = c x^e      e by least squares of logarithms over the values of one axis, with its standard error
    FLOPs   = c x^e      the same fit, of the FLOPs that `learning.work_of` counts: where it is steeper, small steps are
                         bound by something else than products (their share of a large product's rate is small)

    width, length, vocabulary   one changes, all else stays; of the network one process, its threads as they are
    ranks, strong               the batch of all ranks stays       (shards: of a network in shards, FSDP2)
    ranks, weak                 the batch of each rank stays; at the most ranks it is that of `strong`

All sizes of a network take one step in turn, then the next; so do all ranks: a machine that is slower for a while is so
for all of an axis. The first turn warms up. An exponent holds between the smallest and the largest value, not beyond.
"""

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from esolm.algorithms import Algorithm, EsoLM
from esolm.bench.learning import work_of
from esolm.bench.steps import Steps, Timed, World, batch_of
from esolm.calibrate import capability, gemm
from esolm.denoiser import Config, Denoiser
from esolm.state import in_bf16
from esolm.train import Run, views_of

Size = Literal["width", "length", "vocab_size"]
_SIZES: dict[Size, str] = {"width": "widths", "length": "lengths", "vocab_size": "vocab_sizes"}
_STEPS = 1000  # of the run whose steps are timed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is timed: the values of each axis, and one network and batch for all that does not change on it.

    `threads` of each rank: None deals out those of this process, one at least."""

    algorithm: Algorithm = field(default_factory=EsoLM)
    widths: tuple[int, ...] = (128, 192, 256, 384, 512)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    vocab_sizes: tuple[int, ...] = (512, 2048, 8192, 16_384, 50_258)
    ranks: tuple[int, ...] = (1, 2, 4)
    width: int = 384
    length: int = 256
    vocab_size: int = 4096
    layers: int = 6
    heads: int = 6
    batch_size: int = 16
    repeats: int = 5
    threads: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        self.run  # noqa: B018  # says what is wrong with the network, the batch or the method
        problems = [f"{name} must be at least 1, got {n}" for name, n in self._least.items() if n is not None and n < 1]
        for name in (*_SIZES.values(), "ranks"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                problems.append(f"{name} must be different ones, at least one, got {list(values)}")
            elif min(values) < 1:
                problems.append(f"{name} must be at least 1, got {min(values)}")
        size = self.width // self.heads
        if odd := [width for width in self.widths if width % size]:
            told = f"{size} numbers (width {self.width}, {self.heads} heads)"
            problems.append(f"widths must be multiples of the size of a head, {told}, got {odd[0]}")
        if max(self.ranks, default=1) > self.batch_size:
            most = max(self.ranks)
            problems.append(f"a batch of {self.batch_size} texts is too small for {most} ranks: raise batch_size")
        if problems:
            raise ValueError("; ".join(problems))
        for axis in _SIZES:
            self._along(axis)

    @property
    def _least(self) -> dict[str, int | None]:
        return {"repeats": self.repeats, "threads": self.threads}

    @property
    def run(self) -> Run:
        """What stays where nothing else is said."""
        sizes = {name: getattr(self, name) for name in (*_SIZES, "layers", "heads")}
        return Run(
            algorithm=self.algorithm,
            network=Config(**sizes),
            num_steps=_STEPS,
            batch_size=self.batch_size,
            dtype=self.dtype,
        )

    def plan(self) -> dict[str, tuple[str, list["Job"]]]:
        """The axes: by name, what changes, and what is timed. One that would have a single value is left out."""
        axes: dict[str, tuple[str, list[Job]]] = {_NAMES[size]: (size, self._along(size)) for size in _SIZES}
        for kind, batch_size in (("strong", self.batch_size), ("weak", None)):
            for sharded in (False, True):
                jobs = [
                    Job(run=replace(self.run, batch_size=batch_size or each * n), ranks=n, sharded=sharded and n > 1)
                    for each in [self.batch_size // max(self.ranks)]
                    for n in sorted(self.ranks)
                ]
                axes[f"{'shards' if sharded else 'ranks'}, {kind}"] = ("ranks", jobs)
        return {name: (what, jobs) for name, (what, jobs) in axes.items() if len(jobs) > 1}

    def _along(self, axis: Size) -> list["Job"]:
        found, run = [], self.run
        for value in sorted(getattr(self, _SIZES[axis])):
            heads = value * self.heads // self.width if axis == "width" else self.heads
            found.append(Job(run=replace(run, network=replace(run.network, **{axis: value, "heads": heads}))))
        return found


QUICK: dict[str, Any] = {
    "widths": (32, 64),
    "lengths": (32, 64, 128),
    "vocab_sizes": (256, 1024),
    "ranks": (1, 2),
    "width": 64,
    "length": 64,
    "vocab_size": 512,
    "layers": 2,
    "heads": 4,
    "batch_size": 4,
}  # a grid of seconds, to see that it runs
_NAMES: dict[Size, str] = {"width": "width", "length": "length", "vocab_size": "vocabulary"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step that is timed. `ranks` None: in this process."""

    run: Run
    ranks: int | None = None
    sharded: bool = False

    def value(self, of: str) -> int:
        return self.ranks or 1 if of == "ranks" else int(getattr(self.run.network, of))

    @cached_property
    def _network(self) -> Denoiser:
        with torch.device("meta"):
            return Denoiser(self.run.network)

    def flops(self, number: int) -> float:
        """What the step of this number has to do, on all ranks together."""
        views = views_of(self.run, batch_of(self.run), number)
        return sum(work_of(view, self._network).flops for view in views)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One size, or one number of ranks. Seconds are of a step; FLOPs the mean over the steps that were timed."""

    width: int
    length: int
    vocab_size: int
    batch_size: int
    ranks: int
    sharded: bool
    threads: int  # of each rank
    seconds: float
    fastest: float
    slowest: float
    tokens_per_second: float
    cores: float  # that were at work
    processor: float  # seconds of it, of all ranks: what other programs on the machine change least
    flops: float
    share: float  # of the rate of a large product, in the same turn


@dataclass(frozen=True, kw_only=True)
class Fit:
    """An exponent. `error` is its standard error, None where two points leave none; `last` that of the last two."""

    exponent: float
    error: float | None
    last: float


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Rows along which one thing changes (`of`: the name of a row's field)."""

    name: str
    of: str
    rows: tuple[Row, ...]

    @property
    def values(self) -> list[int]:
        return [getattr(row, self.of) for row in self.rows]

    @property
    def seconds(self) -> Fit:
        return fitted(self.values, [row.seconds for row in self.rows])

    @property
    def processor(self) -> Fit:
        return fitted(self.values, [row.processor for row in self.rows])

    @property
    def flops(self) -> Fit:
        return fitted(self.values, [row.flops for row in self.rows])


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Axes measured in one run on one machine. `load`: processes that ran or waited for a core before, if known."""

    settings: Settings
    machine: str
    cores: int
    load: float | None
    dtype: str
    rate: float  # FLOPs a second of a large product, this process's threads
    axes: tuple[Axis, ...]

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON."""
        told = {**asdict(self), "settings": {**asdict(self.settings), "algorithm": repr(self.settings.algorithm)}}
        told["axes"] = [
            {
                "axis": axis.name,
                "of": axis.of,
                "rows": [asdict(row) for row in axis.rows],
                "seconds": asdict(axis.seconds),
                "processor": asdict(axis.processor),
                "flops": asdict(axis.flops),
            }
            for axis in self.axes
        ]
        return told


def fitted(x: Sequence[float | int], y: Sequence[float | int]) -> Fit:
    """The exponent of `y = c x^e` by least squares of logarithms. ValueError for fewer than two values of `x`."""
    if len(set(x)) < 2:
        raise ValueError(f"an exponent needs two different values at least, got {list(x)}")
    u, v = np.log(np.asarray([x, y], dtype=np.float64))
    u, v = u - u.mean(), v - v.mean()
    spread = float(u @ u)
    exponent = float(u @ v) / spread
    free = len(u) - 2
    error = math.sqrt(float(np.square(v - exponent * u).sum()) / free / spread) if free > 0 else None
    return Fit(exponent=exponent, error=error, last=float((v[-1] - v[-2]) / (u[-1] - u[-2])))


def measure(settings: Settings, *, console: Console | None = None) -> Scaling:
    """Time every size in turns, then every number of ranks. ChildProcessError if a rank fails.

    All networks of a part live at once: weights, two moments and an average of each."""
    plan = settings.plan()
    jobs = list(dict.fromkeys(job for _, axis in plan.values() for job in axis))
    if not jobs:
        raise ValueError("nothing grows: give two values of an axis, as --widths 128 256")
    load = _load()
    dtype = torch.bfloat16 if in_bf16(settings.run, torch.device("cpu")) else torch.float32
    found: dict[Job, _Timings] = {}
    with Progress(console=console, transient=True, disable=console is None) as bar:
        task = bar.add_task("counting", total=None)
        weights = {job: job.flops(0) for job in jobs}  # how long each takes, for the bar
        bar.update(task, total=sum(weights.values()) * (settings.repeats + 1))
        for part in (_here, _ranked):
            with ExitStack() as worlds:
                takers = part(settings, [job for job in jobs if (job.ranks is None) == (part is _here)], worlds)
                for turn in range(settings.repeats + 1):  # the first warms up
                    rate = gemm(dtype)
                    for job, (each, take) in takers.items():
                        bar.update(task, description=_told(job))
                        timings = found.setdefault(job, _Timings(job, each))
                        timings.add(turn, take(turn), rate)
                        bar.advance(task, weights[job])
                del takers
    return Scaling(
        settings=settings,
        machine=capability(),
        cores=_cores(),
        load=load,
        dtype=str(dtype).removeprefix("torch."),
        rate=statistics.median(rate for timings in found.values() for rate in timings.rates),
        axes=tuple(
            Axis(name=name, of=of, rows=tuple(found[job].row() for job in axis)) for name, (of, axis) in plan.items()
        ),
    )


_Taker = tuple[int, Callable[[int], Timed]]  # threads of a rank, and the step of a number


def _here(settings: Settings, jobs: Iterable[Job], worlds: ExitStack) -> dict[Job, _Taker]:
    def taker(job: Job) -> Callable[[int], Timed]:
        steps = Steps(job.run)
        return lambda number: steps.take(number, job.run.batch_size)

    return {job: (torch.get_num_threads(), taker(job)) for job in jobs}


def _ranked(settings: Settings, jobs: Iterable[Job], worlds: ExitStack) -> dict[Job, _Taker]:
    jobs = list(jobs)
    each = {n: settings.threads or max(1, torch.get_num_threads() // n) for n in settings.ranks}
    started = {n: worlds.enter_context(World(settings.run, n, each[n])) for n in {job.ranks or 1 for job in jobs}}

    def taker(job: Job) -> Callable[[int], Timed]:
        world = started[job.ranks or 1]
        return lambda number: world.take(number, job.run.batch_size, sharded=job.sharded)

    return {job: (each[job.ranks or 1], taker(job)) for job in jobs}


class _Timings:
    """A job, and its steps so far."""

    def __init__(self, job: Job, threads: int) -> None:
        self.job, self.threads = job, threads
        self.taken: list[Timed] = []
        self.flops: list[float] = []
        self.rates: list[float] = []

    def add(self, turn: int, timed: Timed, rate: float) -> None:
        if turn:
            self.taken.append(timed)
            self.flops.append(self.job.flops(turn))
            self.rates.append(rate)

    def row(self) -> Row:
        run, times = self.job.run, [timed.seconds for timed in self.taken]
        seconds = statistics.median(times)
        return Row(
            width=run.network.width,
            length=run.network.length,
            vocab_size=run.network.vocab_size,
            batch_size=run.batch_size,
            ranks=self.job.ranks or 1,
            sharded=self.job.sharded,
            threads=self.threads,
            seconds=seconds,
            fastest=min(times),
            slowest=max(times),
            tokens_per_second=run.batch_size * run.network.length / seconds,
            cores=statistics.median(timed.cores for timed in self.taken),
            processor=statistics.median(timed.cores * timed.seconds for timed in self.taken),
            flops=statistics.fmean(self.flops),
            share=statistics.median(f / t / r for f, t, r in zip(self.flops, times, self.rates, strict=True)),
        )


def _told(job: Job) -> str:
    network = job.run.network
    if job.ranks is not None:
        return f"{job.ranks} ranks{', in shards' if job.sharded else ''}, {job.run.batch_size} texts"
    return f"width {network.width}, length {network.length:,}, vocabulary {network.vocab_size:,}"


def _cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def _load() -> float | None:
    """Processes that ran or waited for a core in the last minute."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
