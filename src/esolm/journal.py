"""What a run tells while it runs: JSON lines, a line in the terminal and, where asked for, TensorBoard.

    {"step": 100, "time": 1767225600.0, "loss": 5.5, "rate": 0.0003}
    {"step": 100, "time": 1767225601.0, "name": "sample", "text": "ROMEO: ..."}

The file is appended to and flushed line by line; a torn last line (a crash) is dropped on resuming, and so is
what lies beyond the resumed step. It computes no figures but the speed and the time left.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

FILE = "journal.jsonl"


class Journal:
    """The log of one run in a folder; a context manager.

    `total`: steps of the run, for the bar and the time left. `tokens_per_step`: shows tokens/s. `resume`: the
    step gone on from; entries beyond it are cut off. None begins a new log and refuses a folder that has one.
    `tensorboard`: also write its event files (needs the extra). In a terminal a bar is kept up to date,
    elsewhere a plain line is printed every `every` seconds. Raises ValueError for a log in the way.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int | None = None,
        tokens_per_step: int | None = None,
        resume: int | None = None,
        tensorboard: bool = False,
        console: Console | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        writer = _tensorboard(folder, resume) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if resume is None and path.exists() and path.stat().st_size:
            raise ValueError(f"{folder} already holds the log of a run; resume it, or choose another folder")
        if resume is not None:
            _cut(path, resume)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = writer
        self._progress = _Progress(console or Console(stderr=True), total, tokens_per_step, every, clock)

    def write(self, step: int, **figures: int | float) -> None:
        """Note figures of a step (finite or not: NaN and infinities are kept as such)."""
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}
        self._append({"step": step, "time": time.time(), **{n: _storable(v) for n, v in numbers.items()}})
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        self._progress.show(step, numbers)

    def text(self, step: int, name: str, text: str) -> None:
        """Note a text of a step: a sample, a warning, a message."""
        self._append({"step": step, "time": time.time(), "name": name, "text": text})
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, text, step)
        self._progress.say(f"step {step:,} · {name}: {text}")

    def close(self) -> None:
        """Let go of the file and the terminal; closing twice does no harm."""
        self._progress.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, entry: dict[str, object]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


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


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a log (its file or its folder), oldest first; a torn last line is left out.

    Raises ValueError naming the first line inside that is damaged.
    """
    path = path / FILE if path.is_dir() else path
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        entry = _entry(line)
        if entry is not None:
            entries.append({key: _number(value) for key, value in entry.items()})
        elif line:
            raise ValueError(f"line {number} of {path} is damaged; remove it to read the rest")
    return entries


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _tensorboard(folder: Path, resume: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed; pip install 'esolm[tensorboard]'") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=None if resume is None else resume + 1)


def _cut(path: Path, step: int) -> None:
    """Shorten a log to its whole entries up to and including a step."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            entry = _entry(line) if line.endswith(b"\n") else None
            if entry is None or entry["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _storable(value: int | float) -> int | float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: object) -> object:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


class _Progress:
    """The line in the terminal: a bar that is kept up to date, or a plain line every few seconds."""

    def __init__(
        self,
        console: Console,
        total: int | None,
        tokens_per_step: int | None,
        every: float,
        clock: Callable[[], float],
    ) -> None:
        self.console, self.every, self.clock = console, every, clock
        self.total, self.tokens_per_step = total, tokens_per_step
        self.pace = Pace(total)
        self.latest: dict[str, int | float] = {}
        self.step = 0
        self.printed: float | None = None
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(24),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=console, refresh_per_second=4)
            self.task = self.bar.add_task("", total=total)
            self.bar.start()

    def show(self, step: int, figures: dict[str, int | float]) -> None:
        now = self.clock()
        if step != self.step or not self.latest:
            self.pace.tick(now, step)
        self.step = step
        self.latest.update((name, figures[name]) for name in _SHOWN if name in figures)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=self._words())
        elif self.printed is None or now - self.printed >= self.every or step == self.total:
            self.printed = now
            of = f"/{self.total:,}" if self.total is not None else ""
            self.console.print(f"step {step:,}{of} {self._words()}", highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _words(self) -> str:
        words = [f"{name} {value:.4g}" for name, value in self.latest.items()]
        speed, left = self.pace.steps_per_second, self.pace.seconds_left
        if speed is not None and self.tokens_per_step is not None:
            words.append(f"{speed * self.tokens_per_step:,.0f} tokens/s")
        if left is not None:
            words.append(f"{_clock_time(left)} left")
        return " · ".join(words)


_SHOWN = ("loss", "validation")


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
