"""What a long text costs with each method, and how that grows with its length, beside the ratios published for them.

    seconds of a text of L tokens, batch 1, one token an evaluation; exponent e of the fit  seconds = c L^e

One untrained network writes for all, through the sampler that users run, drawing included. A text whose estimate
(estimate.py) is longer than `whole_seconds` is not written to its end, and its row says "estimated". What the estimate
is worth is measured first, in the same run, on texts short enough to write. It measures no quality.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console, Group
from rich.progress import Progress, TaskID
from rich.table import Table

from esolm import plain, sample
from esolm.algorithms import AR, BD3LM, MDLM, Algorithm, EsoLM, Request
from esolm.bench import estimate
from esolm.calibrate import capability, now
from esolm.denoiser import Config, Denoiser
from esolm.engine import Engine
from esolm.inference import Network, prepared
from esolm.noise import generator
from esolm.products import Chosen, Dtype, chosen
from esolm.records import Records
from esolm.tables import ruled

# "A over B" at a length, on an A6000 (arXiv:2506.01928)
PUBLISHED: dict[tuple[str, str], dict[int, float]] = {
    ("mdlm", "esolm-b"): {2048: 13.8, 8192: 66.0},
    ("bd3lm-16", "esolm-b"): {2048: 1.46, 8192: 3.27},
    ("bd3lm-4", "esolm-b"): {2048: 1.66, 8192: 3.80},
    ("esolm-b", "ar"): {2048: 1.10, 8192: 1.52},
}
_REPEATS = 5  # of the check
_WARM_STEPS, _MANY_ROWS = 8, 512  # an evaluation of many rows is long: one of them warms up
_TOLD_EVERY = 64  # steps between two moves of the bar
_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which texts are written, and by a network of which size. `check_length`: of the texts on which estimates are
    compared with the truth."""

    lengths: tuple[int, ...] = (2048, 8192)
    check_length: int = 256
    whole_seconds: float = 60.0
    vocab_size: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 4
    alpha_0: float = 1.0
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if short := [length for length in (*self.lengths, self.check_length) if length < 2]:
            raise ValueError(f"lengths and check_length must be at least 2, got {short[0]}")
        if len(set(self.lengths)) < len(self.lengths) or not self.lengths:
            raise ValueError(f"lengths must be different ones, at least one, got {list(self.lengths)}")
        if not self.whole_seconds >= 0:
            raise ValueError(f"whole_seconds must be at least 0, got {self.whole_seconds}")

    @property
    def methods(self) -> dict[str, Algorithm]:
        """What is compared."""
        return {
            "ar": AR(),
            "mdlm": MDLM(),
            "bd3lm-16": BD3LM(block_size=16),
            "bd3lm-4": BD3LM(block_size=4),
            "esolm-a": EsoLM(variant="A", alpha_0=self.alpha_0),
            "esolm-b": EsoLM(variant="B", alpha_0=self.alpha_0),
        }


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of a text: written to its end (`measured`), and from the fitted curve (`estimated`)."""

    method: str
    length: int
    dtype: Chosen
    evaluations: int
    rows: float  # that an evaluation feeds, on average
    estimated: float
    measured: float | None

    @property
    def kind(self) -> Literal["measured", "estimated"]:
        return "estimated" if self.measured is None else "measured"

    @property
    def seconds(self) -> float:
        """The truth where it is known."""
        return self.estimated if self.measured is None else self.measured

    @property
    def error(self) -> float | None:
        """Of the estimate, as a share of the truth."""
        return None if self.measured is None else self.estimated / self.measured - 1

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON."""
        return {**asdict(self), "kind": self.kind, "seconds": self.seconds, "error": self.error}


@dataclass(frozen=True, kw_only=True)
class Headline:
    """Rows measured in one run on one machine."""

    machine: str
    settings: Settings
    rows: tuple[Row, ...]

    @property
    def checks(self) -> list[Row]:
        """The short texts on which the estimate was compared with the truth."""
        return [row for row in self.rows if row.length == self.settings.check_length]

    def ratios(self) -> list[tuple[str, int, float, float | None]]:
        """What is compared, the length, our ratio of seconds and the published one, if there is one."""
        seconds = {(row.method, row.length): row.seconds for row in self.rows}
        return [
            (f"{slow} / {fast}", length, seconds[slow, length] / seconds[fast, length], published.get(length))
            for (slow, fast), published in PUBLISHED.items()
            for length in self.settings.lengths
            if {(slow, length), (fast, length)} <= seconds.keys()
        ]

    def exponents(self) -> dict[str, float]:
        """How seconds grow with the length: the slope of their logarithms, of every method with two lengths or more."""
        found = {}
        for method in self.settings.methods:
            rows = [row for row in self.rows if row.method == method and row.length in self.settings.lengths]
            if len(rows) > 1:
                x, y = np.log([(row.length, row.seconds) for row in rows]).T
                found[method] = float(np.polynomial.Polynomial.fit(x, y, 1).convert().coef[1])
        return found

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON."""
        return {
            "machine": self.machine,
            "settings": {**asdict(self.settings), "lengths": list(self.settings.lengths)},
            "rows": [row.values() for row in self.rows],
            "ratios": [dict(zip(("of", "length", "ours", "published"), each, strict=True)) for each in self.ratios()],
            "exponents": self.exponents(),
        }


def measure(
    settings: Settings, *, device: str = "cpu", folder: Path | None = None, console: Console | None = None
) -> Iterator[Headline]:
    """Time every method at every length, the check first; what there is so far, after each row.

    `folder` keeps each row as it comes, so that an interrupted run goes on. ValueError for a network that cannot be.
    """
    sizes = {name: getattr(settings, name) for name in ("vocab_size", "width", "layers", "heads")}
    length = max(settings.check_length, *settings.lengths)
    denoiser = Denoiser(Config(**sizes, length=length), torch.Generator().manual_seed(0)).to(device)
    where = f"{capability()}, {torch.get_num_threads()} threads" if device == "cpu" else device
    machine = f"{where}, torch {torch.__version__}"
    records = None if folder is None else Records(folder, "headline", {"machine": machine, **asdict(settings)})
    rows = [] if records is None else [Row(**entry) for entry in records.entries]
    lengths = dict.fromkeys((settings.check_length, *settings.lengths))
    jobs = [(name, method, length) for length in lengths for name, method in settings.methods.items()]
    try:
        with Progress(console=console, transient=True) as bar:
            every, one = bar.add_task("", total=len(jobs), completed=len(rows)), bar.add_task("")
            yield Headline(machine=machine, settings=settings, rows=tuple(rows))
            for name, method, length in jobs[len(rows) :]:
                bar.update(every, description=f"{name}, {length:,} tokens")
                rows.append(_Text(name, method, length, denoiser, settings, bar, one).row())
                if records is not None:
                    records.add(asdict(rows[-1]))
                bar.advance(every)
                yield Headline(machine=machine, settings=settings, rows=tuple(rows))
    finally:
        if records is not None:
            records.close()


class _Text:
    """A text of one length by one method, and how long it takes."""

    def __init__(
        self,
        name: str,
        method: Algorithm,
        length: int,
        denoiser: Denoiser,
        settings: Settings,
        bar: Progress,
        task: TaskID,
    ) -> None:
        self.name, self.method, self.settings, self.bar, self.task = name, method, settings, bar, task
        self.request = Request(length=length, stop_at_end=False)
        plan = method.plan(self.request, generator(0))
        self.evaluations, self.rows = plan.num_steps, float(plan.rows_fed.mean())
        self.network: Network = prepared(denoiser, settings.dtype, rows=round(self.rows))
        engine = isinstance(self.network, Engine)
        self.dtype = chosen(settings.dtype, denoiser.device, round(self.rows), engine=engine)

    def row(self) -> Row:
        """Time it: by turns, if it is for the check; else whole if that does not take too long."""
        self._whole(at_most=_WARM_STEPS if self.rows < _MANY_ROWS else 1)
        checks = self.request.length == self.settings.check_length
        estimates, wholes = [], []
        for _ in range(_REPEATS if checks else 1):
            estimates.append(self._estimate())
            if checks or estimates[0] <= self.settings.whole_seconds:
                wholes.append(self._whole())
        return Row(
            method=self.name,
            length=self.request.length,
            dtype=self.dtype,
            evaluations=self.evaluations,
            rows=self.rows,
            estimated=statistics.median(estimates),
            measured=statistics.median(wholes) if wholes else None,
        )

    def _estimate(self) -> float:
        found = []
        self.bar.reset(self.task, total=estimate.POINTS, description="estimating")
        for point in estimate.points(self.network, self.method, self.request):
            found.append(point)
            self.bar.advance(self.task)
        return estimate.total(found)

    def _whole(self, at_most: int | None = None) -> float:
        """Seconds of the text, from its plan on."""
        self.bar.reset(self.task, total=self.evaluations, description="writing")
        began, count = now(self.network.device), 0
        writer = sample.Writer(self.network, self.method, [self.request])
        while writer.active and count != at_most:
            writer.advance()
            count += 1
            if not count % _TOLD_EVERY:
                self.bar.update(self.task, completed=count)
        return now(self.network.device) - began


_HEAD = ("method", "dtype", "L", "seconds", "", "ms/eval", "estimate off by")
_RATIOS = ("seconds of", "L", "here", "published (A6000)")


def table(found: Headline) -> Group:
    """Tables for the terminal: seconds, ratios beside the published ones, exponents."""
    parts: list[Table | str] = [_table(_title(found), _HEAD, _cells(found))]
    if ratios := _ratio_cells(found):
        parts.append(_table("ratios of seconds", _RATIOS, ratios))
    return Group(*parts, *_notes(found))


def markdown(found: Headline) -> str:
    """The same in Markdown."""
    parts = [_title(found) + ".", _lines(_HEAD, _cells(found)), _lines(_RATIOS, _ratio_cells(found)), *_notes(found)]
    return "\n\n".join(parts) + "\n"


def keep(found: Headline, folder: Path) -> None:
    """Write `headline.md` and `headline.json`."""
    (folder / "headline.md").write_text(markdown(found), encoding="utf-8")
    (folder / "headline.json").write_text(plain.render(found.values()), encoding="utf-8")


def draw(found: Headline, path: Path) -> None:
    """Seconds against length, both logarithmic, a line for each method; hollow points are estimated. Needs matplotlib
    (the extra `plot`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes, exponents = figure.subplots(), found.exponents()
    for number, method in enumerate(found.settings.methods):
        rows = sorted((row for row in found.rows if row.method == method), key=lambda row: row.length)
        label = f"{method} (L^{exponents[method]:.2f})" if method in exponents else method
        axes.plot([row.length for row in rows], [row.seconds for row in rows], color=f"C{number}", label=label)
        for row in rows:
            inside = f"C{number}" if row.kind == "measured" else "white"
            axes.plot(row.length, row.seconds, "o", color=f"C{number}", markerfacecolor=inside)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the text (hollow: estimated)")
    axes.set_ylabel("seconds a text, batch 1, one token an evaluation")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(_title(found), fontsize=9)
    figure.savefig(path, dpi=150)


def _title(found: Headline) -> str:
    settings = found.settings
    size = f"vocabulary {settings.vocab_size:,}, width {settings.width}, {settings.layers} layers"
    return f"A text, one token an evaluation, alpha_0 {settings.alpha_0:g}; {size}; {found.machine}"


def _cells(found: Headline) -> list[tuple[str, ...]]:
    return [
        (
            row.method,
            row.dtype,
            f"{row.length:,}",
            f"{row.seconds:,.2f}",
            row.kind,
            f"{1e3 * row.seconds / row.evaluations:.2f}",
            "-" if row.error is None else f"{100 * row.error:+.1f} %",
        )
        for row in found.rows
    ]


def _ratio_cells(found: Headline) -> list[tuple[str, ...]]:
    return [
        (of, f"{length:,}", f"{ours:.2f}", "-" if published is None else f"{published:g}")
        for of, length, ours, published in found.ratios()
    ]


def _notes(found: Headline) -> list[str]:
    """What the check says of the estimates, and how seconds grow."""
    notes, errors = [], [row.error for row in found.checks if row.error is not None]
    if errors:
        worst = max(map(abs, errors))
        within = "within" if worst <= _TOLERANCE else "NOT within"
        notes.append(
            f"Estimates at {found.settings.check_length:,} tokens are {within} {100 * _TOLERANCE:.0f} % of the truth: "
            f"off by {100 * worst:.1f} % at most (medians of {_REPEATS}, in turns)."
        )
    if exponents := found.exponents():
        told = ", ".join(f"{method} {value:.2f}" for method, value in exponents.items())
        notes.append(f"Seconds grow as a power of the length: {told}.")
    return notes


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    shown = ruled(title)
    for label in head:
        left = label in ("method", "dtype", "", "seconds of")
        shown.add_column(label, justify="left" if left else "right", no_wrap=True)
    for cells in lines:
        shown.add_row(*cells)
    return shown


def _lines(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *lines))
