"""Where a run's figures and texts go: the terminal, TensorBoard, Weights & Biases, behind one small interface.

    sink.open(folder, resume=..., facts=...)    sink.write(step, figures)    sink.text(step, name, text)    sink.close()

A sink is made before any text is read, so that a missing package is told at once; it is opened when the run begins.
Its own log, `journal.jsonl`, a run always keeps (journal.py). A sink computes no figures but the terminal's speed.
"""

import math
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Figures = Mapping[str, int | float]


class Sink(ABC):
    """Somewhere that a run's figures go."""

    @abstractmethod
    def open(self, folder: Path, *, resume: int | None, facts: Mapping[str, Any]) -> None:
        """The run in `folder` begins, or goes on from step `resume`; `facts` say what it is."""

    @abstractmethod
    def write(self, step: int, figures: Figures) -> None:
        """Figures of a step, finite or not."""

    @abstractmethod
    def text(self, step: int, name: str, text: str) -> None:
        """A text of a step: a sample, a warning."""

    @abstractmethod
    def close(self) -> None:
        """The run is over, whatever its end."""


class TensorBoard(Sink):
    """Event files in `FOLDER/tensorboard` (the extra `tensorboard`). Steps that are done again replace the old ones."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("TensorBoard is not installed; pip install 'esolm[tensorboard]'") from None
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None

    def open(self, folder: Path, *, resume: int | None, facts: Mapping[str, Any]) -> None:
        purge = None if resume is None else resume + 1
        self._writer = self._make(str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Sink):
    """A run of a project on Weights & Biases (the extra `wandb`), named as the folder; `WANDB_MODE=offline` keeps it
    in `FOLDER/wandb`, to be sent later with `wandb sync`. A resumed run goes on as the same run there.

    Steps are a figure of their own (`step`, the axis of all charts): steps that are done again after a crash are drawn
    twice, since what was sent cannot be taken back.
    """

    def __init__(self, project: str = "esolm") -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("Weights & Biases is not installed; pip install 'esolm[wandb]'") from None
        mode = os.environ.get("WANDB_MODE", "online")
        if mode not in ("offline", "disabled", "dryrun") and not wandb.api.api_key:
            raise ValueError("Weights & Biases has no key: run `wandb login` first, or set WANDB_MODE=offline")
        self.project = project
        self._wandb = wandb
        self._run: Any = None

    def open(self, folder: Path, *, resume: int | None, facts: Mapping[str, Any]) -> None:
        kept = folder / "wandb-id.txt"
        known = kept.read_text(encoding="utf-8").strip() if resume is not None and kept.exists() else None
        self._run = run = self._wandb.init(
            project=self.project,
            name=folder.resolve().name,
            dir=str(folder),
            id=known,
            resume="allow",
            config=dict(facts),
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        kept.write_text(run.id + "\n", encoding="utf-8")

    def write(self, step: int, figures: Figures) -> None:
        if self._run is not None:
            self._run.log({"step": step, **figures})

    def text(self, step: int, name: str, text: str) -> None:
        if self._run is not None:
            table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
            self._run.log({"step": step, name: table})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class Pace:
    """Steps a second and seconds left, from the steps of the last `window` seconds."""

    def __init__(self, total: int | None = None, window: float = 60.0) -> None:
        self.total = total
        self.window = window
        self._seen: deque[tuple[float, int]] = deque()

    def tick(self, now: float, step: int) -> None:
        """Step `step` is done at time `now` (seconds on any steady clock)."""
        self._seen.append((now, step))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self.window:
            self._seen.popleft()

    @property
    def steps_per_second(self) -> float | None:
        """None until two moments are known."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (start, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - start)

    @property
    def seconds_left(self) -> float | None:
        """None while the speed or the length of the run is not known."""
        speed = self.steps_per_second
        if self.total is None or not speed:
            return None
        return max(0.0, (self.total - self._seen[-1][1]) / speed)


class Terminal(Sink):
    """The line in the terminal: a bar that is kept up to date; elsewhere a plain line every `every` seconds."""

    def __init__(
        self,
        console: Console,
        *,
        total: int | None = None,
        tokens_per_step: int | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.every, self.clock = console, every, clock
        self.total, self.tokens_per_step = total, tokens_per_step
        self._pace = Pace(total)
        self._latest: dict[str, int | float] = {}
        self._step = 0
        self._printed: float | None = None
        self._bar: Progress | None = None

    def open(self, folder: Path, *, resume: int | None, facts: Mapping[str, Any]) -> None:
        if self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(24),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()

    def write(self, step: int, figures: Figures) -> None:
        now = self.clock()
        if step != self._step or not self._latest:
            self._pace.tick(now, step)
        self._step = step
        self._latest.update((name, figures[name]) for name in _SHOWN if name in figures)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._words())
        elif self._printed is None or now - self._printed >= self.every or step == self.total:
            self._printed = now
            of = f"/{self.total:,}" if self.total is not None else ""
            self.console.print(f"step {step:,}{of} {self._words()}", highlight=False, markup=False, soft_wrap=True)

    def text(self, step: int, name: str, text: str) -> None:
        words = f"step {step:,} · {name}: {text}"
        self.console.print(words, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _words(self) -> str:
        words = [f"{name} {value:.4g}" for name, value in self._latest.items()]
        speed, left = self._pace.steps_per_second, self._pace.seconds_left
        if speed is not None and self.tokens_per_step is not None:
            words.append(f"{speed * self.tokens_per_step:,.0f} tokens/s")
        if left is not None:
            words.append(f"{clock_time(left)} left")
        return " · ".join(words)


def clock_time(seconds: float) -> str:
    """Seconds as a clock shows them: `4:05`, `1:00:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plus_minus(value: float, error: float | None) -> str:
    """A figure with its error: `3.142 ± 0.012`; without one that is not known (None, or NaN: of a single text)."""
    return f"{value:.3f}" if error is None or math.isnan(error) else f"{value:.3f} ± {error:.3f}"


_SHOWN = ("loss", "validation")
