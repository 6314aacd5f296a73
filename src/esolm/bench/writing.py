"""How fast each method writes, through the sampler that users run, beside what this machine allows.

    step      all of it: rows, network, drawing with its truncation, bookkeeping      (a text's seconds / evaluations)
    kernels   the matrix products of such a step alone, by torch's kernels of that dtype: weights, and attention over
              what is cached on average
    bound     the bytes of weights that a step reads, at the bandwidth of a large copy

All three are measured in one run, in turns, medians of several; the weights are random, since they change no speed. It
writes no text worth reading and measures no quality.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, Group
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from esolm import sample
from esolm.algorithms import AR, Algorithm, Request
from esolm.calibrate import Machine, machine, now
from esolm.denoiser import Config, Denoiser
from esolm.draw import Draw
from esolm.engine import Engine
from esolm.inference import Inference, prepared
from esolm.noise import generator
from esolm.products import Chosen, Dtype, chosen
from esolm.tables import ruled


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is written: texts of `length` tokens, `batch` together, in `num_steps` diffusion steps (None: one token a
    step), by a network of this size."""

    length: int = 256
    vocab_size: int = 50_258
    width: int = 384
    layers: int = 6
    heads: int = 6
    batch: int = 1
    num_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in one setting. Seconds are of the whole batch."""

    method: str
    setting: Setting
    dtype: Chosen
    evaluations: float  # of the network, for the longest text of a batch
    seconds: float
    fastest: float
    slowest: float
    rows: float  # rows of an evaluation, on average
    kernels: float  # seconds of an evaluation's matrix products alone
    bound: float  # seconds to read the weights once

    @property
    def step(self) -> float:
        """Seconds of one evaluation and all around it."""
        return self.seconds / self.evaluations

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON."""
        told = asdict(self)
        setting = told.pop("setting")
        ratios = {
            "step": self.step,
            "tokens_per_second": self.setting.batch * self.setting.length / self.seconds,
            "step_over_kernels": self.step / self.kernels,
            "kernels_over_bound": self.kernels / self.bound,
            "step_over_bound": self.step / self.bound,
        }
        return {**setting, **told, **ratios}


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Rows measured in one run on one machine."""

    machine: Machine
    rows: tuple[Row, ...]
    repeats: int


def measure(
    methods: Sequence[tuple[str, Algorithm]],
    settings: Sequence[Setting],
    *,
    dtype: Dtype = "auto",
    draw: Draw | None = None,
    repeats: int = 5,
    device: str = "cpu",
    console: Console | None = None,
) -> Writing:
    """Time every method in every setting, `repeats` texts (or batches) each, taken in turns.

    ValueError for a setting that a method or a network cannot have.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if too_few := [setting.batch for setting in settings if setting.batch < 1]:
        raise ValueError(f"batch must be at least 1, got {too_few[0]}")
    found = machine()
    rows: list[Row] = []
    for number, setting in enumerate(settings):
        timings = [_Timing(name, method, setting, dtype, draw or Draw(), device) for name, method in methods]
        turns = [(timing, turn) for turn in range(repeats) for timing in timings]
        told = f"timing {setting.length} tokens, {setting.batch} together ({number + 1} of {len(settings)})"
        for timing, turn in track(turns, description=told, console=console, transient=True):
            timing.take(turn)
        rows += [timing.row(found.bandwidth) for timing in timings]
    return Writing(machine=found, rows=tuple(rows), repeats=repeats)


def table(writing: Writing) -> Group:
    """A table for the terminal of each setting."""
    settings = dict.fromkeys(row.setting for row in writing.rows)
    return Group(*(_table(setting, [row for row in writing.rows if row.setting == setting]) for setting in settings))


def _table(setting: Setting, rows: Sequence[Row]) -> Table:
    """The methods in one setting: a step over its kernels and over the bound, and MDLM's time over the method's."""
    steps = "one token a step" if setting.num_steps is None else f"{setting.num_steps:,} diffusion steps"
    size = f"vocabulary {setting.vocab_size:,}, width {setting.width}, {setting.layers} layers"
    together = f"{setting.batch} texts" if setting.batch > 1 else "a text"
    title = f"{together} of {setting.length:,} tokens, {steps}; {size}"
    shown = ruled(title)
    for label in ("method", "dtype"):
        shown.add_column(label, no_wrap=True)
    for label in ("seconds", "tokens/s", "NFE", "ms/step", "/kernels", "/bound", "MDLM/it"):
        shown.add_column(label, justify="right", no_wrap=True)
    slow = next((row.seconds for row in rows if row.method == "mdlm"), None)
    for row in rows:
        values = row.values()
        shown.add_row(
            row.method,
            row.dtype,
            f"{row.seconds:.3f}",
            f"{values['tokens_per_second']:,.0f}",
            f"{row.evaluations:.0f}",
            f"{1e3 * row.step:.2f}",
            f"{values['step_over_kernels']:.2f}",
            f"{values['step_over_bound']:.2f}",
            "" if slow is None else f"{slow / row.seconds:.1f}",
        )
    return shown


_WARM_STEPS = 8
_KERNEL_PASSES = 5


class _Timing:
    """One method in one setting, and the times taken so far."""

    def __init__(self, name: str, method: Algorithm, setting: Setting, dtype: Dtype, draw: Draw, device: str) -> None:
        self.name, self.method, self.setting, self.draw = name, method, setting, draw
        sizes = {key: getattr(setting, key) for key in ("vocab_size", "length", "width", "layers", "heads")}
        denoiser = Denoiser(Config(**sizes), torch.Generator().manual_seed(0)).to(device)
        plan = method.plan(self._request(0), generator(0))
        fed, drawn, read = plan.rows_fed.mean(), (plan.stop - plan.start).mean(), plan.shown.mean()
        self.rows = float(fed)
        self.network = prepared(denoiser, dtype, rows=_whole(fed))
        self.dtype = chosen(dtype, denoiser.device, _whole(fed), engine=isinstance(self.network, Engine))
        self.times: list[float] = []
        self.kernel_times: list[float] = []
        self.evaluations: list[int] = []
        kernels = Inference(denoiser, self.dtype) if isinstance(self.network, Engine) else self.network
        self._kernels = _Kernels(kernels, fed=_whole(fed), drawn=_whole(drawn), read=_whole(read), batch=setting.batch)
        self._write(0, at_most=_WARM_STEPS)

    def take(self, turn: int) -> None:
        """Time a batch of texts, and its kernels right beside it."""
        self.kernel_times.append(self._kernels.seconds())
        seconds, evaluations = self._write(1 + turn)
        self.times.append(seconds)
        self.evaluations.append(evaluations)

    def row(self, bandwidth: float) -> Row:
        """What was found."""
        return Row(
            method=self.name,
            setting=self.setting,
            dtype=self.dtype,
            evaluations=statistics.fmean(self.evaluations),
            seconds=statistics.median(self.times),
            fastest=min(self.times),
            slowest=max(self.times),
            rows=self.rows,
            kernels=statistics.median(self.kernel_times),
            bound=self._kernels.nbytes / bandwidth,
        )

    def _write(self, turn: int, at_most: int | None = None) -> tuple[float, int]:
        """Seconds of a batch of texts, and the evaluations they took."""
        requests = [self._request(turn * self.setting.batch + text) for text in range(self.setting.batch)]
        device = self.network.device
        began = now(device)
        writer = sample.Writer(self.network, self.method, requests)
        count = 0
        while writer.active and count != at_most:
            writer.advance()
            count += 1
        return now(device) - began, count

    def _request(self, seed: int) -> Request:
        steps = None if isinstance(self.method, AR) else self.setting.num_steps  # it has no such option
        return Request(length=self.setting.length, num_steps=steps, draw=self.draw, seed=seed, stop_at_end=False)


class _Kernels:
    """The matrix products of one evaluation and nothing else: every weight once, in the order of the network, and
    attention of its rows over what they read in every layer."""

    def __init__(self, network: Denoiser | Inference, *, batch: int, fed: int, drawn: int, read: int) -> None:
        config, rows = network.config, torch.ones(batch, fed, 1, device=network.device)
        parts: list[tuple[Callable[[Tensor], Tensor], int, int]]
        if isinstance(network, Inference):
            parts = [(product, product.inputs, product.nbytes) for product in network.products]
        else:
            rows = rows.to(network.cos.dtype)
            linears = [part for part in network.modules() if isinstance(part, nn.Linear)]
            parts = [(part, part.in_features, part.weight.nbytes) for part in linears]
        self.nbytes = sum(size for _, _, size in parts)
        self._calls = [(part, rows.expand(-1, -1, inputs).contiguous()) for part, inputs, _ in parts]
        head, x = self._calls.pop()
        self._calls.append((head, x[:, :drawn].flatten(0, 1)))
        self._layers, self._grouped = config.layers, config.num_kv_heads != config.heads
        self._q = rows.new_ones(batch, config.heads, fed, config.dim)
        self._k = rows.new_ones(batch, config.num_kv_heads, read, config.dim)

    @torch.inference_mode()
    def seconds(self) -> float:
        """Median of a few passes."""
        times = []
        for _ in range(_KERNEL_PASSES):
            began = now(self._q.device)
            for part, x in self._calls:
                part(x)
            for _ in range(self._layers):
                F.scaled_dot_product_attention(self._q, self._k, self._k, enable_gqa=self._grouped)
            times.append(now(self._q.device) - began)
        return statistics.median(times)


def _whole(mean: float) -> int:
    return max(1, round(float(mean)))
