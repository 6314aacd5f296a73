"""How fast each method learns, through the training step that users run, beside the rate of large products here.

    step     views, losses, gradients (`train.learn`), then clipping, AdamW and the averaged weights
    FLOPs    6 x parameters x rows, for each matrix product with the rows that need it
             + 12 x width of the heads x pairs of rows of which one reads the other, for each layer's attention
    share    FLOPs a second over those of a large product of the same dtype, measured in the same run

A product with `p` parameters costs `2 p` FLOPs a row forward, twice that backward. Only what the loss needs is counted:
rows with a target and rows that some row reads (no padding), the head for rows with a target, in the last layer no more
than keys and values of the others, pairs by the rule and not by the square. What a step does beyond that (all scores of
a tile, scores computed again, the last layer's queries of rows without a target) only takes time. It tells nothing of
how well a method learns.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from esolm.algorithms import AR, BD3LM, MDLM, Algorithm, EsoLM, View
from esolm.algorithms.algorithm import Batch
from esolm.attention import PADDING, attends
from esolm.calibrate import Machine, gemm, machine
from esolm.denoiser import Config, Denoiser
from esolm.optim import Config as Optim
from esolm.optim import Optimizer, WeightAverage
from esolm.tables import ruled
from esolm.train import Run, autocast, learn, views_of

_ALPHAS = (0.125, 0.5, 1.0)
_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step has to do."""

    fed: float  # rows that go through the network, padding between texts included
    rows: float  # of these, rows that carry a loss or are read
    targets: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method. Seconds are of a step; the work is the mean over the steps that were timed."""

    method: str
    alpha_0: float | None
    dtype: str
    seconds: float
    fastest: float
    slowest: float
    tokens_per_second: float
    work: Work
    share: float  # of the rate of a large product
    times_mdlm: float  # step over step, in turns: the median of the ratios

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON."""
        told = asdict(self)
        work = told.pop("work")
        return {**told, **work, "flops_per_second": self.work.flops / self.seconds}


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Rows measured in one run on one machine."""

    machine: Machine
    rows: tuple[Row, ...]
    repeats: int


def measure(
    *,
    width: int = 384,
    layers: int = 6,
    heads: int = 6,
    length: int = 256,
    vocab_size: int = 4096,
    batch_size: int = 16,
    repeats: int = 5,
    console: Console | None = None,
) -> Learning:
    """Time `repeats` steps of every method, taken in turns, and Eso-LM (B) at several `alpha_0`. The tokens are random,
    since they change no speed. ValueError for sizes that no network or batch can have."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    network = Config(vocab_size=vocab_size, length=length, width=width, layers=layers, heads=heads)
    learner = _Learner(network)
    timings = [_Timing(*method, learner, batch_size) for method in _methods(length)]
    found, rates = machine(), []
    turns = [(turn, timing) for turn in range(repeats + 1) for timing in timings]  # the first warms up
    for turn, timing in track(turns, "timing steps", console=console, transient=True, disable=console is None):
        if timing is timings[0]:
            rates.append(gemm(timing.dtype))
        timing.take(turn)
    dtype = timings[0].dtype
    rate = statistics.median(rates)
    mdlm = next(timing for timing in timings if isinstance(timing.run.algorithm, MDLM))
    return Learning(
        machine=replace(found, gemm={**found.gemm, _name(dtype): rate}),
        rows=tuple(timing.row(rate, mdlm) for timing in timings),
        repeats=repeats,
    )


def table(learning: Learning) -> Table:
    """The rows as a table for the terminal."""
    dtypes = " and ".join(dict.fromkeys(row.dtype for row in learning.rows))
    title = f"speed of learning, {dtypes}; rows: fed; share: of a large product's rate"
    shown = ruled(title)
    for label in ("method", "alpha"):
        shown.add_column(label, no_wrap=True)
    for label in ("ms/step", "range", "rows", "targets", "tokens/s", "share", "/MDLM"):
        shown.add_column(label, justify="right", no_wrap=True)
    for row in learning.rows:
        shown.add_row(
            row.method,
            "" if row.alpha_0 is None else f"{row.alpha_0:g}",
            f"{1e3 * row.seconds:,.0f}",
            f"{1e3 * row.fastest:,.0f}-{1e3 * row.slowest:,.0f}",
            f"{row.work.fed:,.0f}",
            f"{row.work.targets:,.0f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.share:.0%}",
            f"{row.times_mdlm:.2f}",
        )
    return shown


def work_of(view: View, network: Denoiser) -> Work:
    """Rows and FLOPs of one view's gradients, as the module's docstring counts them."""
    config, block = network.config, network.blocks[0]
    wanted, real = view.weights != 0, view.stage != PADDING
    reads = attends(view.stage, view.public, view.stage, view.public)
    by_others = (reads & ~torch.eye(reads.shape[1], dtype=torch.bool)).any(1)
    useful = wanted | (by_others & real)
    pairs = int((reads & useful[:, :, None] & useful[:, None]).sum())
    pairs_last = int((reads & wanted[:, :, None]).sum())
    rows, targets = int(useful.sum()), int(wanted.sum())
    key_value = 2 * config.num_kv_heads * config.dim * config.width
    all_of_block = sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear))
    products = (config.layers - 1) * all_of_block * rows + (all_of_block - key_value) * targets + key_value * rows
    attention = config.heads * config.dim * ((config.layers - 1) * pairs + pairs_last)
    return Work(
        fed=float(view.tokens.numel()),
        rows=float(rows),
        targets=float(targets),
        flops=6.0 * (products + network.head.weight.numel() * targets) + 12.0 * attention,
    )


class _Learner:
    """What learns: one network for all methods, since its weights change no speed."""

    def __init__(self, config: Config) -> None:
        self.network = Denoiser(config, torch.Generator().manual_seed(0))
        self.optimizer = Optimizer(self.network, Optim())
        self.average = WeightAverage(self.network)

    def step(self, run: Run, batch: Batch, number: int) -> None:
        with autocast(run, self.network.device):
            learn(run, self.network, batch, number)
        self.optimizer.clip()
        self.optimizer.update(run.optim.schedule.rate(number, run.num_steps))
        self.average.update(number + 1)


class _Timing:
    """One method, and the times taken so far."""

    def __init__(self, name: str, algorithm: Algorithm, learner: _Learner, batch_size: int) -> None:
        config = learner.network.config
        self.name, self.learner = name, learner
        self.run = Run(algorithm=algorithm, network=config, num_steps=1000, batch_size=batch_size)
        shape, random = (batch_size, config.length), torch.Generator().manual_seed(1)
        self.batch = Batch.of(torch.randint(0, config.mask_id, shape, generator=random))
        with autocast(self.run, learner.network.device):
            self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        self.seconds: list[float] = []
        self.work: list[Work] = []

    def take(self, turn: int) -> None:
        """Time one step. That of turn 0 warms up and does not count."""
        began = time.perf_counter()
        self.learner.step(self.run, self.batch, turn)
        seconds = time.perf_counter() - began
        if turn:
            self.seconds.append(seconds)
            works = [work_of(view, self.learner.network) for view in views_of(self.run, self.batch, turn)]
            self.work.append(_sum(works))

    def row(self, rate: float, mdlm: "_Timing") -> Row:
        seconds, total = statistics.median(self.seconds), _sum(self.work)
        work = Work(**{name: value / len(self.work) for name, value in asdict(total).items()})
        algorithm = self.run.algorithm
        return Row(
            method=self.name,
            alpha_0=algorithm.alpha_0 if isinstance(algorithm, EsoLM) else None,
            dtype=_name(self.dtype),
            seconds=seconds,
            fastest=min(self.seconds),
            slowest=max(self.seconds),
            tokens_per_second=self.batch.tokens.numel() / seconds,
            work=work,
            share=work.flops / seconds / rate,
            times_mdlm=statistics.median(a / b for a, b in zip(self.seconds, mdlm.seconds, strict=True)),
        )


def _sum(works: Sequence[Work]) -> Work:
    return Work(**{name: sum(asdict(work)[name] for work in works) for name in asdict(works[0])})


def _methods(length: int) -> list[tuple[str, Algorithm]]:
    plain = [("mdlm", MDLM()), ("ar", AR()), ("bd3lm", BD3LM(block_size=math.gcd(_BLOCK, length)))]
    ours = [("esolm-a", EsoLM(variant="A", alpha_0=0.5)), *(("esolm-b", EsoLM(alpha_0=alpha)) for alpha in _ALPHAS)]
    return [*plain, *ours]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
